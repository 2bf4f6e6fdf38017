"""What one H100 held of weights, gradients and optimizer state, against the formulas as they are now."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.plan_check import GPU_MODELS, write_config
from megatron_fapo.config.policy import PolicyConfig
from megatron_fapo.plan import memory
from megatron_fapo.policy.hf_config import read_model_shape
from tests.plan.conftest import ROOT

CASES = json.loads((ROOT / "benchmarks" / "results" / "plan_check_h100.json").read_text())["cases"]


@pytest.mark.parametrize("model", GPU_MODELS)
def test_state_of_an_h100(model: str, tmp_path: Any) -> None:
    shape = read_model_shape(write_config(tmp_path, GPU_MODELS[model]))
    state = memory.rank_state(shape, PolicyConfig(), 0, 2)
    cases = [case for case in CASES if case["model"] == model]
    assert cases
    for case in cases:
        assert sum(state.values()) == pytest.approx(sum(case["state"]["real"].values()), rel=0.001)
