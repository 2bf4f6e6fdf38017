"""Rollouts ahead, simulated: by hand, against the simulation of one rollout, and what always holds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fapo.plan.asynchrony import StepTime, StepWork, simulate_run
from megatron_fapo.plan.simulate import SimSample, Speed, Stage, simulate

FREE = Stage(1, Speed(base_s=1.0, sequence_s=0.0, context_s=0.0, prompt_token_s=0.0, slots=10**6))
"""One token a second, however many sequences."""


def run(
    lengths: list[list[int]], policy_s: float, max_staleness: int, *, in_flight: bool, refit_s: float = 1.0
) -> list[StepTime]:
    steps = [StepWork([SimSample(0, length) for length in each], 0.0, policy_s) for each in lengths]
    return simulate_run(steps, 1, FREE, max_staleness=max_staleness, in_flight=in_flight, refit_s=refit_s)


def test_by_hand() -> None:
    long, short = [10, 20], [10, 4]
    steps = run([long, short, short], 6.0, 0, in_flight=False)
    assert [step.total_s for step in steps] == [27.0, 17.0, 17.0]
    assert [step.older_share for step in steps] == [0.0, 0.0, 0.0]
    # The second step's samples are generated beside the first's; the third begins after the first refit, at 27 s.
    steps = run([long, short, short], 6.0, 1, in_flight=True)
    assert [step.total_s for step in steps] == [
        27.0,
        7.0,
        11.0,
    ]  # its 10 s have the refit's from 33 to 34 s between them
    assert [step.waited_s for step in steps] == [20.0, 0.0, 4.0]
    assert [step.older_share for step in steps] == [0.0, 1.0, pytest.approx((6 + 4) / 14)]


def test_a_refit_waits_for_the_samples_of_later_steps_unless_it_is_in_flight() -> None:
    lengths = [[4], [30]]
    waiting = run(lengths, 6.0, 1, in_flight=False)
    assert [(step.total_s, step.drained_s) for step in waiting] == [(31.0, 20.0), (7.0, 0.0)]
    crossing = run(lengths, 6.0, 1, in_flight=True)
    assert [(step.total_s, step.drained_s) for step in crossing] == [(11.0, 0.0), (27.0, 0.0)]
    assert crossing[1].older_share == pytest.approx(10 / 30), "10 s were generated before the refit of 1 s"


def test_tokens_in_flight_are_read_again_after_a_refit() -> None:
    reader = Stage(1, Speed(1.0, 0.0, 0.0, 0.5, 8))
    work = [StepWork([SimSample(0, 4)], 0.0, 6.0), StepWork([SimSample(0, 30)], 0.0, 6.0)]
    steps = simulate_run(work, 1, reader, max_staleness=1, in_flight=True, refit_s=1.0)
    assert steps[1].waited_s == pytest.approx(20 + 10 * 0.5)


samples = st.lists(st.builds(SimSample, st.integers(0, 20), st.integers(1, 50)), min_size=2, max_size=2)
speeds = st.builds(
    Speed, st.floats(0.5, 2), st.floats(0, 0.5), st.floats(0, 0.01), st.floats(0, 0.01), st.integers(1, 4)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(samples, min_size=1, max_size=4), speeds, st.integers(1, 2), st.floats(0, 20))
def test_what_always_holds(lengths: list[list[SimSample]], speed: Speed, count: int, policy_s: float) -> None:
    engines = Stage(count, speed)
    steps = [StepWork(each, 0.5, policy_s) for each in lengths]
    for step, each in zip(steps, lengths, strict=True):
        (alone,) = simulate_run([step], 1, engines, max_staleness=0, in_flight=False, refit_s=1.0)
        rollout = simulate(each, 1, engines, None, rule_s=0.0, rule_processes=1)
        assert alone.total_s == pytest.approx(rollout.generation_s + 0.5 + policy_s + 1.0)
        assert alone.engine_busy_s == pytest.approx(sum(rollout.engine_busy_s))
    for max_staleness in (0, 1, 2):
        for in_flight in (False, True):
            times = simulate_run(steps, 1, engines, max_staleness=max_staleness, in_flight=in_flight, refit_s=1.0)
            assert len(times) == len(steps)
            for time in times:
                assert time.total_s >= policy_s + 1.0 - 1e-9
                assert -1e-9 <= time.older_share <= 1 + 1e-9
                assert time.engine_busy_s <= count * time.total_s + 1e-9
                assert time.drained_s == pytest.approx(0) or not in_flight
            if max_staleness == 0:
                assert all(time.older_share == 0 for time in times)
