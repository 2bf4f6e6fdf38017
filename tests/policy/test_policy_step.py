"""The arithmetic of benchmarks/policy_step.py; the benchmark itself is run by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_fapo.errors import UserError
from megatron_fapo.plan.shapes import BUILT_IN

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import kernel_groups
import policy_step


def test_flops_by_both_ways_of_counting() -> None:
    """Of Qwen3-8B: 6.95e9 weights in 36 layers, 151,936 x 4,096 each in the embedding and in the output layer."""
    shape = BUILT_IN["Qwen3-8B"]
    flops = policy_step.step_flops(shape, [4096, 1024], responses=1000)
    scores = 6 * 36 * 4096 * (4096**2 + 1024**2)
    layers, head = 6.946e9, 151936 * 4096
    assert flops["mfu"] == pytest.approx(6 * layers * 5120 + 6 * head * 1000 + scores, rel=1e-3)
    assert flops["mfu_6n"] == pytest.approx(6 * (layers + 2 * head) * 5120 + scores, rel=1e-3)


def test_layouts_are_read() -> None:
    assert policy_step.parse_layout("TP2xPP2+VPP2+SP") == {
        "tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence_parallel": True,
    }  # fmt: skip
    with pytest.raises(UserError, match="2tp: write sp or a number after one of tp"):
        policy_step.parse_layout("2tp")


def test_kernels_are_told_by_who_launched_them_then_by_name() -> None:
    assert kernel_groups.group_of("nvjet_sm90_TNT", ["aten::mm", "_LogprobEntropyBackward"]) == "output layer"
    assert kernel_groups.group_of("ncclDevKernel_ReduceScatter", ["optimizer"]) == "communication"
    assert kernel_groups.group_of("nvjet_sm90_TNT", ["_LayerNormLinear"]) == "gemm"
    assert kernel_groups.group_of("multi_tensor_adam", []) == "optimizer"
    assert kernel_groups.busy([(5.0, 7.0), (0.0, 3.0), (1.0, 2.0), (2.0, 4.0)]) == 6.0
