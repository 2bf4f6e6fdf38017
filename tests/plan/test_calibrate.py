"""Rates fitted to a recorded run of the demo, and what they then predict."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest

from megatron_fapo.errors import UserError
from megatron_fapo.plan.calibrate import calibrate, fit, fitted
from megatron_fapo.plan.layouts import PHASES
from megatron_fapo.plan.lengths import Record, find_lengths, log_normal, read_records, write_records
from megatron_fapo.plan.simulate import SimSample
from tests.plan.conftest import ROOT, make_planner, tiny_planner

RECORDED = ROOT / "benchmarks" / "results" / "plan_demo_steps.json"


def test_steps_that_were_not_looked_at_are_predicted() -> None:
    records = read_records(RECORDED)
    planner = fit(tiny_planner(), records[::2], "run")
    assert abs(planner.errors(records[::2])["total"]) < 0.02
    errors = planner.errors(records[1::2])
    assert abs(errors["total"]) < 0.1
    assert all(abs(errors[name]) < 0.2 for name in PHASES)


def test_known_rates_are_found_again() -> None:
    """A run that the simulation itself made, with other rates."""
    planner = tiny_planner()
    rates = dataclasses.replace(
        planner.hardware.rates, decode_base_s=0.02, decode_sequence_s=0.000252, judge_factor=3.0, train_mfu=0.1,
        forward_mfu=0.2, refit_s=0.5,
    )  # fmt: skip
    truth = dataclasses.replace(planner, hardware=dataclasses.replace(planner.hardware, rates=rates))
    samples = [truth.drawn(seed) for seed in range(4)]
    records = [Record(truth.step(each).phases, each) for each in samples]
    found = fit(planner, records, "run").hardware.rates
    for name in ("decode_base_s", "decode_sequence_s", "judge_factor", "train_mfu", "forward_mfu", "refit_s"):
        assert getattr(found, name) == pytest.approx(getattr(rates, name), rel=0.02), name


def test_rates_by_name(tmp_path: Path) -> None:
    planner, file = tiny_planner(), tmp_path / "rates.json"
    file.write_text(json.dumps({"train_mfu": 0.45}))
    changed = calibrate(planner, file)
    assert fitted(planner.hardware.rates, changed.hardware.rates) == {"train_mfu": 0.45}
    assert str(file) in changed.hardware.sources["train_mfu"]
    for text, words in (('{"trian_mfu": 1}', "no rate is called"), ('{"train_mfu": 0}', "above 0"), ("[", "not JSON")):
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            calibrate(planner, file)


def test_records_are_read_as_written(tmp_path: Path) -> None:
    records = [Record({"rollout": 1.5}, [SimSample(3, 4, 5), SimSample(3, 9)])]
    write_records(records, tmp_path / "records.json", {"machine": "none"})
    assert read_records(tmp_path / "records.json") == records


def test_a_log_normal_has_its_mean_and_percentile() -> None:
    rng, draw = random.Random(0), log_normal(1000, 4000, 10**9)
    values = sorted(draw(rng) for _ in range(40_000))
    assert sum(values) / len(values) == pytest.approx(1000, rel=0.03)
    assert values[int(0.99 * len(values))] == pytest.approx(4000, rel=0.06)
    assert max(log_normal(1000, 4000, 2048)(rng) for _ in range(1000)) == 2048


def test_lengths_are_drawn_as_stated() -> None:
    planner = make_planner("fapo_7b.yaml", "4x8xH100", lengths="mean=500,p99=1500,prompt=120,right=0.25,critique=800")
    samples = planner.drawn()
    assert len(samples) == 512 * 8
    assert {s.prompt for s in samples} == {120}
    assert sum(s.critique > 0 for s in samples) / len(samples) == pytest.approx(0.25, abs=0.03)
    assert planner.drawn() == samples  # the same seed
    pool = {dataclasses.astuple(s) for record in read_records(RECORDED) for s in record.samples}
    drawn = find_lengths(str(RECORDED), planner.config, True).draw(100, 1)
    assert {dataclasses.astuple(s) for s in drawn} <= pool


@pytest.mark.parametrize("text", ["mean=x", "typo=3", "mean=100,p99=50", "no/such/run"])
def test_lengths_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(UserError):
        find_lengths(text, tiny_planner().config, True)


def test_a_run_directory_is_read(tmp_path: Path) -> None:
    """The first step is left out, and a verdict that two equal solutions share costs one critique."""
    sample = {"question": "q", "text": "a", "prompt_tokens": 7, "response_tokens": 5}
    judged = sample | {"verdict": {"completion_tokens": 30}}
    other = judged | {"text": "b", "response_tokens": 6}
    (tmp_path / "samples").mkdir()
    for step in (1, 2):
        lines = "".join(json.dumps(each) + "\n" for each in (judged, judged, other, sample | {"verdict": None}))
        (tmp_path / "samples" / f"step_{step:06d}.jsonl").write_text(lines)
    metrics = ({"step": step, "phase_s/rollout": float(step), "reward/mean": 0.0} for step in (1, 2))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in metrics))
    expected = [SimSample(7, 5, 30), SimSample(7, 5), SimSample(7, 6, 30), SimSample(7, 5)]
    assert read_records(tmp_path) == [Record({"rollout": 2.0}, expected)]


def test_a_run_whose_rollouts_ran_ahead_gives_no_rates(tmp_path: Path) -> None:
    metrics = ({"step": step, "phase_s/rollout": 0.0, "staleness/max": step - 1.0} for step in (1, 2))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in metrics))
    with pytest.raises(UserError, match="max_staleness=0"):
        calibrate(tiny_planner(), tmp_path)
