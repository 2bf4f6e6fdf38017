"""Drift alarms: how rarely they are false, how soon they are true, and that a resume changes none."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from statistics import median

import pytest

from megatron_fapo.config.observe import ObserveConfig
from megatron_fapo.observe.drift import LEAST_VALUES, WATCHED, DriftWatch, Watched

OBSERVE = ObserveConfig()
ONE = (Watched("genrm/x", "x"),)


def watch(watched: tuple[Watched, ...] = ONE, window: int = OBSERVE.drift_window) -> DriftWatch:
    return DriftWatch(window, OBSERVE.drift_threshold, watched)


def first_alarms(series: Callable[[random.Random, int], float], steps: int, runs: int) -> list[list[int]]:
    """Of each run, the steps at which an alarm began."""
    found = []
    for seed in range(runs):
        noise, drift = random.Random(seed), watch()
        began = [
            t for t in range(steps) if any("has drifted" in s for s in drift.add({"genrm/x": series(noise, t)})[1])
        ]
        found.append(began)
    return found


def autocorrelated(noise: random.Random, step: int, state: dict[str, float] = {}) -> float:  # noqa: B006
    rho = 0.3
    state["x"] = noise.gauss(0, 1) if step == 0 else rho * state["x"] + math.sqrt(1 - rho**2) * noise.gauss(0, 1)
    return state["x"]


@pytest.mark.parametrize(
    ("series", "most_per_1000"),
    [(lambda noise, _t: noise.gauss(0, 1), 0.1), (autocorrelated, 0.5)],
    ids=["independent", "autocorrelated"],
)
def test_false_alarms_are_rare(series, most_per_1000: float) -> None:
    alarms = first_alarms(series, steps=1000, runs=20)
    assert sum(map(len, alarms)) <= most_per_1000 * 20


@pytest.mark.parametrize(("shift", "half_within", "missed"), [(3.0, 6, 0), (-3.0, 6, 0), (6.0, 4, 0), (2.0, 10, 12)])
def test_a_shift_is_soon_an_alarm(shift: float, half_within: int, missed: int) -> None:
    alarms = first_alarms(lambda noise, t: noise.gauss(0, 1) + shift * (t >= 100), steps=140, runs=40)
    delays = [next(t for t in began if t >= 100) - 99 for began in alarms if any(t >= 100 for t in began)]
    assert len(delays) >= 40 - missed
    assert median(delays) <= half_within


def test_one_odd_step_is_none_and_an_alarm_ends_with_its_cause() -> None:
    drift, noise = watch(), random.Random(0)

    def add(mean: float) -> tuple[float | None, list[str]]:
        alarms, said = drift.add({"genrm/x": mean + noise.gauss(0, 1), "other": 1.0})
        return alarms.get("alarm/x"), said

    assert [add(10.0) for _ in range(LEAST_VALUES)] == [(None, [])] * LEAST_VALUES, "too little is known"
    assert all(add(10.0) == (0.0, []) for _ in range(20))
    assert add(1000.0) == (0.0, [])
    assert all(add(10.0) == (0.0, []) for _ in range(10))
    during = [add(20.0) for _ in range(10)]
    (line,) = [line for _, said in during for line in said]
    assert "x has drifted" in line
    assert "(genrm/x, alarm/x)" in line
    assert during[-1][0] == 1.0
    after = [add(10.0) for _ in range(25)]
    assert after[-1][0] == 0.0
    assert ["steady again" in line for _, said in after for line in said] == [True]


def test_what_hardly_varies_has_to_move_by_something_that_matters() -> None:
    """A share that is 0 in most steps has no spread: then any sample that fails would be an alarm."""
    drift, noise = watch(WATCHED), random.Random(0)
    for step in range(300):
        record = {
            "score/unscored_share": 1 / 512 if noise.random() < 0.05 else 0.0,
            "genrm/completion_tokens_mean": 2000 * (1 + step / 600),
            "genrm/agreement_mean": 1.0,
        }
        alarms, said = drift.add(record)
        assert said == []
    assert set(alarms) == {"alarm/unscored_share", "alarm/completion_tokens_mean", "alarm/agreement_mean"}
    said = [line for _ in range(6) for line in drift.add({"score/unscored_share": 0.05})[1]]
    assert "share of samples without a score has drifted" in said[0]


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped() -> None:
    noise = random.Random(1)
    records = [{"step": t, "genrm/x": noise.gauss(0, 1) + 4 * (t > 60)} for t in range(80)]
    whole = watch()
    expected = [whole.add(record) for record in records]
    kept = [record | expected[t][0] for t, record in enumerate(records)]
    for stopped in (10, 61, 63, 70):
        resumed = watch()
        for record in kept[:stopped]:
            resumed.add(record)
        assert [resumed.add(record) for record in records[stopped:]] == expected[stopped:]


def test_a_window_of_0_is_off() -> None:
    drift = watch(window=0)
    assert all(drift.add({"genrm/x": 10.0**t}) == ({}, []) for t in range(40))
