"""What benchmarks/refit.py rests on: checkpoints without weights, its arithmetic, and the example in the docs. The
benchmark itself is run by hand."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.refit import find_case, summarize
from benchmarks.refits.models import RandomCheckpoint, hf_shapes, make_model, write_shape
from benchmarks.refits.stack import Case
from megatron_fapo.config.policy import ParallelConfig
from megatron_fapo.errors import UserError
from megatron_fapo.plan.shapes import BUILT_IN
from megatron_fapo.plan.targets import planned_target
from megatron_fapo.policy.hf_config import ModelShape, read_model_shape
from megatron_fapo.policy.source_index import planned_indexes
from megatron_fapo.weight_sync.checkpoint import checkpoint_shapes
from megatron_fapo.weight_sync.plan import Endpoint, make_plan

SMALL = ModelShape(
    architecture="Qwen2ForCausalLM", layers=2, hidden=64, ffn=128, heads=4, kv_heads=2, head_dim=16, vocab=500,
    max_positions=512, rope_theta=1e6, rope_scaling=None, norm_eps=1e-6, tied=True, qkv_bias=True, qk_norm=False,
    dtype="float32",
)  # fmt: skip


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Qwen3-8B", "Qwen2.5-32B", "Llama-3.1-8B"])
def test_a_checkpoint_of_a_shape_describes_the_model_and_takes_no_disk(tmp_path: Path, name: str) -> None:
    shape = dataclasses.replace(BUILT_IN[name], layers=2)  # all 65 GB of a file cannot be mapped on a small machine
    write_shape(shape, tmp_path)
    assert read_model_shape(tmp_path) == shape
    assert checkpoint_shapes(str(tmp_path)) == hf_shapes(shape)
    (file,) = tmp_path.glob("*.safetensors")
    assert file.stat().st_size > 2 * shape.parameters > 100 * 512 * file.stat().st_blocks


def test_weights_of_a_shape_depend_on_their_names_alone(tmp_path: Path) -> None:
    write_shape(SMALL, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    zeros, drawn, again = load_file(file), RandomCheckpoint(tmp_path), RandomCheckpoint(tmp_path)
    assert drawn.names() == sorted(zeros)
    for name, zero in zeros.items():
        assert (drawn[name].shape, drawn[name].dtype) == (zero.shape, zero.dtype)
        assert torch.equal(drawn[name], again[name])
        assert bool(drawn[name].any())
    assert not torch.equal(drawn["model.layers.0.mlp.up_proj.weight"], drawn["model.layers.0.mlp.gate_proj.weight"])


def test_cases_and_their_gpus() -> None:
    asked = {"tensor": None, "pipeline": None, "rollout_tensor": None}
    gpus = {
        (case, cards): find_case(argparse.Namespace(case=case, **asked), cards).gpus
        for case, cards in (("colocated", 1), ("disaggregated", 2), ("disaggregated", 4), ("pp2-tp2", 4))
    }
    assert list(gpus.values()) == [1, 2, 4, 4]
    with pytest.raises(UserError, match="takes 4 GPUs, and this machine has 2"):
        find_case(argparse.Namespace(case="tp4-colocated", **asked), 2)
    with pytest.raises(UserError, match="no built-in shape"):
        make_model("9B", Path("nowhere"), layers=None, dtype="bfloat16", positions=512)


def test_the_floor_is_what_a_worker_takes_by_the_best_link() -> None:
    sent = {"total_s": 1.0, "transfer_s": 0.5, "local_bytes": 4e9, "node_bytes": 8e9, "network_bytes": 0.0}
    rates = {"copy_gb_s": 1000.0, "pull_gb_s": 100.0, "send_gb_s": 400.0}
    rounds = {"ours": [sent], "reference": [{"total_s": 12.0}], "floors": [rates]}
    found = summarize({"rounds": rounds}, Case(2, 1, 2, colocated=False))
    assert found["floor_s"] == pytest.approx(4 / 2 / 100 + 8 / 2 / 400)
    assert found["reference_over_ours"] == 12
    assert found["transfer_over_floor"] == pytest.approx(0.5 / 0.03)


def test_the_worked_example_of_the_docs_is_what_is_planned() -> None:
    """One layer's linear_qkv, TP2 -> TP1: every number that docs/weight_sync.md has of it."""
    sources = [Endpoint("node", "", index) for index in planned_indexes(SMALL, ParallelConfig(tensor=2), "float32")]
    plan = make_plan(sources, [Endpoint("node", "", planned_target(SMALL, 1, 0, "float32"))])
    rows = [
        f"| {hop.giver} | {copy.name.split('.')[-2]} | {copy.source.offset} | {copy.target.offset} "
        f"| {' x '.join(map(str, copy.shape))} | {copy.nbytes} |"
        for hop in plan.hops
        for copy in plan.parts[hop.part].copies
        if copy.target.tensor == "model.layers.0.self_attn.qkv_proj.weight"
    ]
    docs = (Path(__file__).parents[2] / "docs" / "weight_sync.md").read_text(encoding="utf-8")
    assert len(rows) == 6
    assert [row for row in rows if row not in docs] == []
    assert plan.bytes_by_link()["node"] == 425_216
    assert "425,216" in docs
