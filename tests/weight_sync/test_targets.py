"""What is planned for engines that do not run is what is traced from those that do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_fapo.plan.shapes import BUILT_IN
from megatron_fapo.plan.targets import planned_target
from megatron_fapo.policy.hf_config import read_model_shape
from megatron_fapo.weight_sync.regions import Index
from megatron_fapo.weight_sync.trace import trace_target
from tests.weight_sync.vllm_ranks import Case, VllmRanks, build


def traced(case: Case, path: str, workers: int) -> Index:
    return trace_target(build(path, workers)[0], case.checkpoint())


@pytest.mark.parametrize(
    ("case", "workers"),
    [
        (Case("qwen2"), 1),
        (Case("qwen2", tied=True, kv_heads=1), 2),
        (Case("qwen3"), 2),
        (Case("llama", tied=True), 2),
        (Case("qwen3_moe"), 2),
    ],
    ids=lambda value: f"{value.family}-{value.kv_heads}kv" if isinstance(value, Case) else f"{value} workers",
)
def test_planned_targets_are_the_traced_ones(case: Case, workers: int, vllm_ranks: VllmRanks, tmp_path: Path) -> None:
    path = case.write(tmp_path / "model", 0)
    shape = read_model_shape(path)
    for rank, found in enumerate(vllm_ranks.run(traced, case, path, workers)):
        planned = planned_target(shape, workers, rank % workers, "float32")
        assert list(planned.tensors.items()) == list(found.tensors.items())
        assert planned.regions == found.regions
        assert planned.fills == found.fills


def test_neighbouring_workers_have_the_same_kv_heads() -> None:
    """Two KV heads on eight workers, as vLLM's QKVParallelLinear deals them."""
    shape = BUILT_IN["Qwen2.5-0.5B"]
    shape = dataclasses.replace(shape, heads=16, layers=1)
    first = []
    for rank in range(8):
        regions = {region.name: region for region in planned_target(shape, 8, rank, "bfloat16").regions}
        first.append(regions["model.layers.0.self_attn.k_proj.weight"].start[0] // shape.head_dim)
    assert first == [0, 0, 0, 0, 1, 1, 1, 1]
