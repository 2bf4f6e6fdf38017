"""`fapo plan refit` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_fapo.cli import main

LARGE = ["plan", "refit", "--model", "qwen2.5-32b"]


def test_a_refit_is_planned_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "refit.json"
    layout = ["--train", "tp=4,pp=4,dp=2", "--rollout", "tp=4,replicas=8"]
    assert main([*LARGE, *layout, "--json", str(file)]) == 0
    plan = json.loads(file.read_text())
    assert f"predicted {plan['predicted_s']:.3f} s" in capsys.readouterr().out
    assert plan["ranks"] == {"policy": 32, "engines": 32}
    assert plan["bytes"] == plan["minimum_bytes"]
    assert plan["bytes_over_minimum"] == 1.0
    assert plan["limits"] == "network"
    assert 0.18 < plan["predicted_s"] < 0.2
    assert plan["plan_seconds"] > 0
    assert main([*LARGE, *layout, "--colocated", "--kind", "h200", "--json", str(file)]) == 0
    colocated = json.loads(file.read_text())
    assert colocated["bytes"]["local"] > 0
    assert colocated["predicted_s"] < plan["predicted_s"]
    assert main([*LARGE, "--train", "tp=4", "--rollout", "tp=4", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["limits"] == "node"  # engines on the four GPUs that the policy leaves


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train", "tp=3,pp=5,dp=0,xp=2"], ["attention heads", "64 layers", "'dp=0'", "'xp=2'"]),
        (["--rollout", "tp=16", "--kind", "B200"], ["16 workers", "an engine's workers share a node", "--kind B200"]),
        (["--train", "tp=4", "--rollout", "tp=4,replicas=2", "--colocated"], ["2 engines of 4 GPUs", "room for 1"]),
        (["--gpus-per-node", "0"], ["--gpus-per-node 0"]),
    ],
)
def test_everything_that_is_wrong_is_said_at_once(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*LARGE, *arguments]) == 2
    error = capsys.readouterr().err
    assert [word for word in words if word not in error] == []
