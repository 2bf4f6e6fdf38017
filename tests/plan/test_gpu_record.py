"""What one H100 allocated and how long its updates took, against the formulas as they are now."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.plan_check import GPU_MODELS, PROMPT, write_config
from megatron_fapo.config.policy import PolicyConfig
from megatron_fapo.plan import memory
from megatron_fapo.plan.hardware import parse_cluster
from megatron_fapo.plan.work import PolicyWork
from megatron_fapo.policy.hf_config import read_model_shape
from tests.plan.conftest import ROOT, make_planner

CASES = json.loads((ROOT / "benchmarks" / "results" / "plan_check_h100.json").read_text())["cases"]


def name_of(case: dict[str, Any]) -> str:
    return f"{case['model']} {case['recompute']} {case['micro_batch_tokens']}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_memory_and_speed_of_an_h100(case: dict[str, Any], tmp_path: Any) -> None:
    shape = read_model_shape(write_config(tmp_path, GPU_MODELS[case["model"]]))
    tokens, length = case["micro_batch_tokens"], case["sample_tokens"]
    cfg = PolicyConfig(micro_batch_tokens=tokens, logprob_micro_batch_tokens=tokens, recompute=case["recompute"])
    batch = memory.MicroBatch(length, tokens // length)
    responses = batch.count * (length - PROMPT)
    state = memory.rank_state(shape, cfg.parallel, 0, 2)
    assert sum(state.values()) == pytest.approx(sum(case["state"]["real"].values()), rel=0.001)
    inputs = memory.BATCH_BYTES * 4 * tokens
    for phase, parts in (
        ("train", memory.train_working(shape, cfg, 0, batch, responses, 4, 2, True)),
        ("logprobs", memory.logprob_working(shape, cfg, 0, batch, responses, 4, 2, True)),
    ):
        predicted = sum(state.values()) + sum(parts.values()) + inputs
        assert predicted == pytest.approx(case[phase]["real"], rel=0.01), phase

    base = make_planner("baseline_7b.yaml", "1x1xH100").config
    groups = {"prompts_per_step": 4 * batch.count, "prompts_per_mini_batch": 4 * batch.count}
    config = base.model_copy(
        update={
            "policy": cfg,
            "training": base.training.model_copy(update=groups),
            "rollout": base.rollout.model_copy(update={"samples_per_prompt": 1}),
        }
    )
    times = PolicyWork(config, shape, parse_cluster("1x1xH100"), 2).times([length] * 4 * batch.count)
    assert times.train_s == pytest.approx(case["update_s"], rel=0.12)
