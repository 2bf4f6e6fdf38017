"""Refits into real vLLM models, compared bit for bit with models that vLLM loaded from disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from megatron_fapo.weight_sync.landing import Landing, is_plain
from megatron_fapo.weight_sync.protocol import RefitError
from megatron_fapo.weight_sync.trace import checkpoint_form
from tests.weight_sync.vllm_ranks import FFN, HIDDEN, Case, VllmRanks, build, contents, different, refit

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


def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's post-load steps and ours decide as on a GPU machine. Nothing is computed with the model."""
    import vllm.model_executor.layers.linear as linear
    import vllm.model_executor.layers.vocab_parallel_embedding as vocabulary
    import vllm.platforms

    class Cuda:
        def __getattr__(self, name: str) -> Any:
            return {"is_cuda": lambda: True, "is_cpu": lambda: False}.get(name) or getattr(real, name)

    real = vllm.platforms.current_platform
    for module in (linear, vocabulary, vllm.platforms):
        monkeypatch.setattr(module, "current_platform", Cuda())


def written_in_place(case: Case, paths: list[str]) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        as_on_cuda(monkeypatch)
        expected = contents(build(paths[1], 2)[0])
        model, config = build(paths[0], 2)
        landing = Landing(model, config.model_config, case.checkpoint())
        in_place = landing.in_place()
        addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
        with torch.no_grad():  # as after a sleep that dropped the weights
            for name in in_place:
                model.get_parameter(name).fill_(float("nan"))
        refit(landing, case.tensors(1))
        return {
            "unlike a fresh load": different(contents(model), expected),
            "moved": [name for name, p in model.named_parameters() if addresses[name] != p.data_ptr()],
            "staged": set(landing.index().tensors) - in_place,
        }


@pytest.mark.parametrize("case", [Case("qwen2"), Case("llama", tied=True), Case("qwen3_moe")], ids=lambda c: c.family)
def test_on_cuda_only_experts_need_staging(case: Case, vllm_ranks: VllmRanks, tmp_path: Path) -> None:
    paths = [case.write(tmp_path / str(seed), seed) for seed in range(2)]
    for found in vllm_ranks.run(written_in_place, case, paths):
        assert found["unlike a fresh load"] == found["moved"] == []
        assert all(".experts." in name for name in found["staged"])
        assert bool(found["staged"]) == (case.family == "qwen3_moe")


def which_backends_are_plain(path: str) -> dict[str, bool]:
    """Of the MoE layer as this machine has it, were its backend another."""
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend

    with pytest.MonkeyPatch.context() as monkeypatch:
        as_on_cuda(monkeypatch)
        model, _ = build(path, 1)
        form = checkpoint_form(model)
        (layer,) = [
            layer for layer in form.layers if any("layers.0." in n and "w13" in n for n in form.layers[layer].values())
        ]
        tensors = {own: form.tensors[full] for own, full in form.layers[layer].items()}
        found = {}
        for backend in UnquantizedMoeBackend:
            monkeypatch.setattr(layer.quant_method, "unquantized_backend", backend)
            found[backend.name] = is_plain(layer, tensors)
        monkeypatch.setattr(layer.quant_method, "unquantized_backend", UnquantizedMoeBackend.TRITON)
        layer.w13_weight.data = layer.w13_weight.data.transpose(1, 2)
        return found | {"other strides": is_plain(layer, tensors)}


def test_experts_are_plain_only_where_triton_takes_them_as_loaded(vllm_ranks: VllmRanks, tmp_path: Path) -> None:
    found = vllm_ranks.run(which_backends_are_plain, Case("qwen3_moe").write(tmp_path / "model", 0))[0]
    assert {name for name, plain in found.items() if plain} == {"TRITON", "BATCHED_TRITON"}
    assert {"CPU", "FLASHINFER_TRTLLM", "FLASHINFER_CUTLASS", "other strides"} < found.keys()


DOWN = "model.layers.0.mlp.down_proj.weight"


def unfinished_refits(case: Case, paths: list[str], directory: Path) -> dict[str, Any]:
    model, config = build(paths[0], 1)
    before = contents(model)
    landing = Landing(model, config.model_config, case.checkpoint())
    tensors = case.tensors(1)
    errors: dict[str, str] = {}

    def fails(name: str, attempt: Callable[..., Any], *args: Any) -> None:
        with pytest.raises(RefitError) as caught:
            attempt(*args)
        errors[name] = str(caught.value)

    fails("before begin", landing.view, "model.norm.weight", 0, (1,), (1,))
    fails("finish before begin", landing.finish)
    landing.begin()
    norm = landing.view("model.norm.weight", 0, (HIDDEN,), (1,))
    fails("unknown", landing.view, "model.nothing.weight", 0, (1,), (1,))
    fails("too many", landing.wrote, "model.norm.weight", HIDDEN + 1)
    landing.view(DOWN, 0, (HIDDEN, FFN), (FFN, 1)).copy_(tensors[DOWN])
    landing.abort()
    untouched = different(contents(model), before)
    fails("missing", refit, landing, tensors, "model.layers.1.self_attn.k_proj.bias")
    partial = different(contents(model), before)
    landing.begin()
    landing.view(DOWN, 0, (HIDDEN, FFN), (FFN, 1)).copy_(tensors[DOWN])
    assert landing.wrote(DOWN, HIDDEN * FFN - 1) == 0
    assert landing.wrote(DOWN, 1) > 0
    fails("complete", landing.view, DOWN, 0, (1,), (1,))
    refit(landing, tensors)
    fails("after finish", landing.wrote, DOWN, 1)
    landing.export(str(directory / "held.safetensors"))
    model.model.embed_tokens.weight.data[3, 3] += 1
    fails("export", landing.export, str(directory / "other.safetensors"))
    return {
        "errors": errors, "live": norm.data_ptr() == model.model.norm.weight.data_ptr(), "untouched": untouched,
        "partial": partial, "unlike a fresh load": different(contents(model), contents(build(paths[1], 1)[0])),
    }  # fmt: skip


def test_unfinished_refits_say_what_is_missing_and_a_whole_one_follows(vllm_ranks: VllmRanks, tmp_path: Path) -> None:
    case = Case("qwen2")
    paths = [case.write(tmp_path / str(seed), seed) for seed in range(2)]
    found = vllm_ranks.run(unfinished_refits, case, paths, tmp_path)[0]
    assert found["live"]
    assert found["untouched"] == [], "what was staged when a refit is given up reaches no kernel"
    assert "model.layers.1.self_attn.qkv_proj.packed" not in found["partial"]
    assert "model.layers.0.self_attn.qkv_proj.packed" in found["partial"]
    assert found["errors"] == {
        "before begin": "model.norm.weight cannot be written: no refit is under way",
        "finish before begin": "no refit is under way",
        "unknown": "this model has no tensor model.nothing.weight: the plan is of another model",
        "too many": "65 elements were written into model.norm.weight, but 64 are missing",
        "missing": "1 tensors are not complete: model.layers.1.self_attn.qkv_proj.bias (32 elements)",
        "complete": f"{DOWN} is complete: nothing more can be written into it in this refit",
        "after finish": f"1 elements were written into {DOWN}, but no refit is under way",
        "export": "model.embed_tokens.weight: the packed copy differs from the plain one",
    }
    assert found["unlike a fresh load"] == ["model.embed_tokens.weight"], "which the test has changed afterwards"
    held, expected = load_file(tmp_path / "held.safetensors"), case.tensors(1)
    assert different(held, expected) == []


def most_staged(case: Case, path: str) -> int:
    model, config = build(path, 1)
    landing, most = Landing(model, config.model_config, case.checkpoint()), 0
    wrote = landing.wrote

    def count_and_write(tensor: str, elements: int) -> float:
        nonlocal most
        most = max(most, sum(bool(unit.staged) for unit in dict.fromkeys(landing._unit_of.values())))
        return wrote(tensor, elements)

    landing.wrote = count_and_write  # type: ignore[method-assign]
    refit(landing, case.tensors(1))
    return most


def test_one_layer_is_staged_at_a_time(vllm_ranks: VllmRanks, tmp_path: Path) -> None:
    case = Case("qwen3_moe")
    assert vllm_ranks.run(most_staged, case, case.write(tmp_path / "model", 0))[0] == 1


class DerivesMore(nn.Module):
    def process_weights_after_loading(self, model: nn.Module) -> None: ...


def hidden_copies(case: Case, path: str) -> list[str]:
    from vllm.model_executor import offloader

    model, config = build(path, 1)
    errors = []

    def try_again() -> None:
        with pytest.raises(RefitError) as caught:
            Landing(model, config.model_config, case.checkpoint()).begin()
        errors.append(str(caught.value))

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(offloader.base, "_instance", offloader.UVAOffloader(0))
        try_again()
    model.model.layers[1].more = DerivesMore()
    try_again()
    return errors


def test_models_whose_kernels_compute_with_more_are_refused(vllm_ranks: VllmRanks, tmp_path: Path) -> None:
    case = Case("qwen2")
    offloads, derives = vllm_ranks.run(hidden_copies, case, case.write(tmp_path / "model", 0))[0]
    assert "vLLM offloads weights (UVAOffloader)" in offloads
    assert "post-load steps of their own cannot be refitted: model.layers.1.more (DerivesMore)" in derives
