"""A real run one step off, with refits between the tokens of running samples: whose weights every token comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_fapo.data.datasets import write_testbed
from megatron_fapo.data.tokenizer import init_tiny_model
from megatron_fapo.observe.metrics import read_metrics
from megatron_fapo.observe.samples import read_samples
from tests.training.runs import FapoProcess, write_config

STEPS = 5


@pytest.mark.timeout(600)
def test_tokens_come_from_the_versions_that_are_said(tmp_path: Path) -> None:
    write_testbed(tmp_path / "data", 40, 4, seed=0)
    init_tiny_model(tmp_path / "model", seed=0)
    config = {
        "run_dir": str(tmp_path / "run"),
        "device": "cpu",
        "data": {"train": [str(tmp_path / "data" / "train.jsonl")], "max_prompt_tokens": 160},
        "policy": {"model_path": str(tmp_path / "model"), "optimizer": {"lr": 3e-3, "warmup_steps": 0}},
        "rollout": {"samples_per_prompt": 4, "max_response_tokens": 240, "cpu_kv_cache_gb": 0.05},
        "genrm": {"enabled": False},
        "reward": {
            "compute_score": "tests.training.runs:reward_of_length",
            "overlong": {"enabled": False},
            "verifier_processes": 1,
        },
        "algorithm": {"tis_cap": 2.0},
        "weight_sync": {"in_flight": True},
        "training": {
            "steps": STEPS,
            "prompts_per_step": 4,
            "prompts_per_mini_batch": 2,
            "asynchrony": {"max_staleness": 1},
            "evaluation": {"every_steps": 0},
            "checkpoint": {"every_steps": 2, "keep": 2},
        },
    }
    process = FapoProcess(tmp_path / "log", "train", "-c", str(write_config(tmp_path / "config.yaml", config)))
    assert process.wait() == 0, process.output()
    assert process.wait_until_gone() == []

    records = {int(record["step"]): record for record in read_metrics(tmp_path / "run")}
    assert records[1]["staleness/max"] == 0
    assert all(records[step]["staleness/max"] == 1 for step in range(2, STEPS + 1))
    assert any(records[step]["staleness/crossed_share"] > 0 for step in records), "no refit went in between"
    for step, record in records.items():
        # The engine and the policy of one version agree to rounding, so tokens are stamped with the right one; older
        # tokens do not.
        assert record.get("mismatch/abs_max", 0.0) < 1e-3, step
        assert record.get("staleness/abs_max", 1.0) > 1e-2, step
    for step in records:
        for sample in read_samples(tmp_path / "run", step):
            versions = [sample["weight_version"], *(version for _, version in sample["later_versions"])]
            assert versions == sorted(set(versions))
            assert {step - 2, step - 1} >= set(versions) or step == 1

    prompts = [{sample["prompt_id"] for sample in read_samples(tmp_path / "run", step)} for step in sorted(records)]
    assert len(set.union(*prompts)) == sum(map(len, prompts)) == 4 * STEPS, "every prompt once"
    for path in (tmp_path / "run" / "checkpoints").glob("step_*/state.json"):
        state = json.loads(path.read_text())
        assert state["cursor"]["offset"] == 4 * state["step"], "what ran ahead is not of the checkpoint"
