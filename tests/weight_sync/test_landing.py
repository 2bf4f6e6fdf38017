"""Refits into real vLLM models, compared bit for bit with models that vLLM loaded from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_fapo.weight_sync.landing import Landing
from tests.weight_sync.vllm_ranks import Case, VllmRanks, build, contents, different, refit

CASES = [
    Case("qwen2"),
    Case("qwen2", tied=True, kv_heads=1),
    Case("qwen3", tied=True),
    Case("llama", tied=True),
    Case("qwen3_moe"),
]


def refitted_against_loaded(case: Case, paths: list[str], workers: int) -> dict[str, Any]:
    expected = contents(build(paths[1], workers)[0])
    model, config = build(paths[0], workers)
    before, objects = contents(model), {name: id(p) for name, p in model.named_parameters()}
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    landing = Landing(model, config.model_config, case.checkpoint())
    landing.index()
    traced = different(contents(model), before)
    refit(landing, case.tensors(1))
    return {
        "touched by tracing": traced,
        "unlike a fresh load": different(contents(model), expected),
        "changed": different(contents(model), before),
        "new objects": [name for name, p in model.named_parameters() if objects[name] != id(p)],
        "moved": [name for name, p in model.named_parameters() if addresses[name] != p.data_ptr()],
        "in place": landing.in_place(),
        "tensors": list(landing.index().tensors),
    }


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}{'-tied' * case.tied}-{case.kv_heads}kv")
def test_refit_equals_a_fresh_load(case: Case, workers: int, vllm_ranks: VllmRanks, tmp_path: Path) -> None:
    paths = [case.write(tmp_path / str(seed), seed) for seed in range(2)]
    for found in vllm_ranks.run(refitted_against_loaded, case, paths, workers):
        assert found["unlike a fresh load"] == found["touched by tracing"] == []
        assert found["new objects"] == found["moved"] == []
        assert all(
            name in found["changed"] or f"{name.rpartition('.')[0]}.packed" in found["changed"]
            for name in found["tensors"]
        )
        assert {name for name in found["tensors"] if "norm" in name} == found["in place"]
