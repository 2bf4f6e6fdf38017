"""`fapo plan` from the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_fapo.cli import main
from tests.plan.conftest import ROOT

SEVEN = str(ROOT / "examples" / "fapo_7b.yaml")
SMALL = ("training.prompts_per_step=64", "training.prompts_per_mini_batch=16")


def test_a_plan_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, chart = tmp_path / "plan.json", tmp_path / "step.html"
    code = main(["plan", SEVEN, "--cluster", "4x8xH100", "--json", str(file), *SMALL, "--timeline", str(chart)])
    assert code == 0
    text = capsys.readouterr().out
    assert "built-in shape Qwen2.5-Math-7B" in text
    assert "bottleneck: " in text
    plan = json.loads(file.read_text())
    step = sum(plan["configured"]["phases_s"].values())
    assert f"step {step:.1f} s" in text
    assert plan["ranking"][0]["step_s"] <= plan["ranking"][-1]["step_s"]
    assert all(rate["source"] for rate in plan["rates"].values())
    assert "<svg" in chart.read_text()


def test_what_does_not_run_ends_with_1_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", SEVEN, "--cluster", "2x8xH100", *SMALL]) == 1
    text = capsys.readouterr().out
    assert "DOES NOT RUN: `cluster` has 4 nodes, and 2x8xH100 has 2" in text
    assert re.search(r"All ways to divide the cluster", text)  # and what would run instead


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cluster", "8xH100"], "nodes x GPUs x kind"),
        (["--cluster", "1x8xB200"], "kinds: H100"),
        (["--cluster", "1x8xH100", "--model", "Qwen9-1B"], "one of Qwen2.5-0.5B"),
        (["--cluster", "1x8xH100", "--timeline", "x.gif"], "must end in"),
    ],
)
def test_bad_input(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", SEVEN, *arguments]) == 2
    assert words in capsys.readouterr().err
