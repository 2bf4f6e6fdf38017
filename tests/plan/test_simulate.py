"""The discrete-event simulation: by hand, by a second method, and what always holds."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fapo.plan.simulate import Rollout, SimSample, Speed, Stage, simulate

FREE = Speed(base_s=1.0, sequence_s=0.0, context_s=0.0, prompt_token_s=0.0, slots=10**6)
"""One token a second, however many sequences."""


def run(
    samples: list[SimSample], engines: Stage, judges: Stage | None = None, group: int = 1, rule: float = 0.0
) -> Rollout:
    return simulate(samples, group, engines, judges, rule_s=rule, rule_processes=1)


def test_by_hand() -> None:
    # One slot: 3 s, then 5 s. Each answer takes the only verifier 1 s; the second's critique of 4 tokens 2 s each.
    engine = Stage(1, Speed(1.0, 0.0, 0.0, 0.0, slots=1))
    judge = Stage(1, Speed(2.0, 0.0, 0.0, 0.0, slots=1))
    result = run([SimSample(10, 3), SimSample(10, 5, critique=4)], engine, judge, rule=1.0)
    assert result.generated == [3.0, 8.0]
    assert result.scored == [4.0, 17.0]
    assert (result.generation_s, result.tail_s) == (8.0, 9.0)
    assert (result.engine_busy_s, result.judge_busy_s) == ([8.0], [8.0])


def test_a_step_takes_longer_the_more_sequences_run() -> None:
    # Two sequences: 2 steps of 1 + 2 x 0.5 s; then one alone: 2 steps of 1.5 s.
    result = run([SimSample(0, 2), SimSample(0, 4)], Stage(1, Speed(1.0, 0.5, 0.0, 0.0, 8)))
    assert result.generated == pytest.approx([4.0, 7.0])


def test_prompts_are_read_once_for_a_group() -> None:
    samples = [SimSample(100, 1)] * 4
    speed = Speed(1.0, 0.0, 0.0, 0.01, 8)
    assert run(samples, Stage(1, speed), group=4).generation_s == pytest.approx(1.0 + 1.0)
    assert run(samples, Stage(1, speed), group=1).generation_s == pytest.approx(4.0 + 1.0)


def token_by_token(lengths: list[tuple[int, int]], speed: Speed) -> list[float]:
    """The same server, one decoding step after the other; prompts cost nothing to read."""
    ends, waiting, running, now = [math.nan] * len(lengths), list(range(len(lengths))), {}, 0.0
    while waiting or running:
        while waiting and len(running) < speed.slots:
            running[waiting.pop(0)] = 0
        context = sum(lengths[i][0] + done for i, done in running.items())
        # The cache grows during the step: half of what it adds counts.
        now += speed.base_s + len(running) * (speed.sequence_s + speed.context_s / 2) + speed.context_s * context
        for i in list(running):
            running[i] += 1
            if running[i] == lengths[i][1]:
                ends[i] = now
                del running[i]
    return ends


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), min_size=1, max_size=12),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.01]),
)
@settings(max_examples=60, deadline=None)
def test_against_a_second_method(lengths: list[tuple[int, int]], slots: int, context_s: float) -> None:
    speed = Speed(0.3, 0.07, context_s, 0.0, slots)
    result = run([SimSample(*pair) for pair in lengths], Stage(1, speed))
    assert result.generated == pytest.approx(token_by_token(lengths, speed), rel=1e-9)


def drawn(count: int, seed: int) -> list[SimSample]:
    rng = random.Random(seed)
    return [
        SimSample(rng.randint(1, 50), rng.randint(1, 300), rng.randint(1, 200) if rng.random() < 0.5 else 0)
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_every_sample_once_and_no_token_lost(seed: int) -> None:
    samples, slots = drawn(200, seed), 16
    speed = Speed(0.01, 0.0, 0.0, 0.0, slots)  # a step takes the same whatever runs, so busy time counts steps
    result = run(samples, Stage(3, speed), Stage(2, speed), group=4, rule=0.002)
    assert all(g > 0 for g in result.generated)
    assert all(s >= g + 0.002 for s, g in zip(result.scored, result.generated, strict=True))
    for trace, servers, tokens in (
        (result.engine_trace, 3, sum(s.response for s in samples)),
        (result.judge_trace, 2, sum(s.critique for s in samples)),
    ):
        assert max(running for _, running in trace) <= servers * slots
        assert trace[-1][1] == 0
        area = sum(running * (after - at) for (at, running), (after, _) in pairwise(trace))
        assert area / 0.01 == pytest.approx(tokens)


@pytest.mark.parametrize("seed", range(4))
def test_more_servers_never_take_longer(seed: int) -> None:
    samples, speed = drawn(256, seed), Speed(0.01, 0.001, 1e-6, 1e-4, 16)
    ends = [max(run(samples, Stage(n, speed), Stage(4, speed), group=4).generated) for n in (1, 2, 4, 8)]
    assert ends == sorted(ends, reverse=True)
    tails = [run(samples, Stage(4, speed), Stage(n, speed), group=4).tail_s for n in (1, 2, 4, 8)]
    assert tails == sorted(tails, reverse=True)


def test_judging_overlaps_with_generation() -> None:
    samples = [SimSample(0, length, critique=10) for length in (10, 20, 30, 200)]
    assert run(samples, Stage(1, FREE), Stage(1, FREE)).tail_s == pytest.approx(10.0)
    assert run(samples, Stage(1, FREE)).tail_s == 0.0


def test_judging_can_wait_for_the_last_answer() -> None:
    samples = [SimSample(0, length, critique=length) for length in (10, 20, 200)]
    result = simulate(samples, 1, Stage(1, FREE), Stage(1, FREE), rule_s=1.0, rule_processes=1, streamed=False)
    assert result.generated == pytest.approx([10.0, 20.0, 200.0])
    assert result.scored == pytest.approx([211.0, 221.0, 401.0])
    alone = simulate(
        [SimSample(0, 5)] * 2, 1, Stage(1, FREE), Stage(1, FREE), rule_s=1.0, rule_processes=1, streamed=False
    )
    assert alone.scored == [6.0, 7.0]


def test_a_critique_goes_to_the_server_with_the_fewest_outstanding_tokens() -> None:
    # The last critique finds one server busy with 1,000 tokens, the other done with all of its 600 and 300.
    samples = [SimSample(0, n, critique) for n, critique in ((1, 1000), (2, 600), (650, 300), (960, 10))]
    one_slot = Stage(2, Speed(1.0, 0.0, 0.0, 0.0, slots=1))
    assert run(samples, Stage(1, FREE), one_slot).scored == pytest.approx([1001.0, 602.0, 950.0, 970.0])
