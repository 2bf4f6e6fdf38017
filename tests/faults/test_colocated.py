"""Servers that sleep during the rollout: nobody asks them before their turn, and the scores are those of the stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from megatron_fapo.data.records import Sample, Score
from megatron_fapo.genrm.reward_loop import RewardLoop
from tests.faults.fake_server import FakeServer, says
from tests.faults.test_reward_loop import PATIENT, RIGHT, WRONG, judge_says, run, tasks
from tests.genrm.samples import make_sample

SAMPLES = [make_sample(f"{i}\n\n{RIGHT if i % 3 else WRONG}", index=i) for i in range(12)]


async def source() -> AsyncIterator[Sample]:
    for sample in SAMPLES:
        yield sample


def test_nobody_is_judged_before_the_turn_and_wrong_answers_do_not_wait() -> None:
    async def test(loop: RewardLoop, servers: list[FakeServer]) -> None:
        streamed = {s.sample.key: s.score async for s in loop.score_stream(source())}
        asked = len(servers[0].bodies)
        loop.begin_step()
        order: list[str] = []
        wrong_came = asyncio.Event()

        async def late() -> AsyncIterator[Sample]:
            async for sample in source():
                yield sample
            await wrong_came.wait()
            order.append("ended")

        async def turn() -> None:
            assert len(servers[0].bodies) == asked
            await asyncio.sleep(0.05)
            assert len(servers[0].bodies) == asked
            order.append("turn")

        scores: dict[object, Score] = {}
        async for scored in loop.score_stream(late(), turn=turn):
            scores[scored.sample.key] = scored.score
            order.append(scored.sample.text[-2])
            if order == ["3"] * 4:  # they come out while the rollout goes on
                wrong_came.set()
        assert order == ["3"] * 4 + ["ended", "turn"] + ["2"] * 8
        assert len(servers[0].bodies) == 2 * asked == 16
        for key, score in streamed.items():
            late_score = scores[key]
            assert (late_score.reward, late_score.correct) == (score.reward, score.correct)
            assert late_score.extra.get("genrm_s", 0.0) < 1.0, "waiting for the turn is nobody's latency"

    run([judge_says(1)], test, max_in_flight=4)


def test_a_turn_that_cannot_be_taken_ends_the_stream() -> None:
    async def test(loop: RewardLoop, servers: list[FakeServer]) -> None:
        async def turn() -> None:
            raise RuntimeError("they sleep on")

        before = tasks()
        with pytest.raises(RuntimeError, match="they sleep on"):
            [scored async for scored in loop.score_stream(source(), turn=turn)]
        assert tasks() == before
        assert servers[0].bodies == []

    run([lambda _body, _number: says("\\boxed{-1}")], test, genrm=PATIENT)
