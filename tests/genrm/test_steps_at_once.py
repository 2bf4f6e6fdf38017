"""Steps that are scored at once: lambda, counts and shared judgements are each step's own, on real verifier processes
and a server on a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

from megatron_fapo.config.genrm import GenRMConfig
from megatron_fapo.config.reward import OverlongConfig, RewardConfig
from megatron_fapo.data.records import Sample
from megatron_fapo.genrm.reward_loop import RewardLoop
from megatron_fapo.genrm.scoring import Scoring
from tests.faults.fake_server import FakeServer, says
from tests.genrm.samples import make_sample

REWARD = RewardConfig(
    verifier="recipe_string",
    compare_rules=False,
    verifier_processes=1,
    overlong=OverlongConfig(buffer_tokens=4),
    rho_shift_schedule=[(1, 3.0), (2, 1.0)],
)


async def scored(scoring: Scoring, samples: list[Sample], go: asyncio.Event | None = None) -> list[float | None]:
    async def stream() -> AsyncIterator[Sample]:
        for sample in samples:
            yield sample
        if go is not None:
            await go.wait()

    async with aclosing(scoring.score_stream(stream(), group_size=1)) as results:
        return [each.score.reward async for each in results]


def test_a_step_that_runs_on_is_not_touched_by_the_next() -> None:
    async def main() -> None:
        async with FakeServer(lambda *_: says("\\boxed{0}")) as server:
            genrm = GenRMConfig(deadline_s=20.0, request_timeout_s=10.0, hedge_share=0.0)
            async with RewardLoop(REWARD, genrm, [server.url], max_response_tokens=10) as loop:
                go = asyncio.Event()
                first = loop.begin_step(1)
                running = asyncio.create_task(scored(first, [make_sample(index=i) for i in (0, 1)], go))
                while first.metrics()["scoring/scored"] != 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                second = loop.begin_step(2)
                assert await scored(second, [make_sample(index=0)]) == [0.0], "lambda 1 from step 2 on"
                late = await first.score(make_sample(index=5))
                assert late.reward == 0.5, "lambda 1/2 in step 1, whatever has begun since"
                again = await first.score(make_sample(index=0))
                assert again.reward == 0.5
                go.set()
                assert await running == [0.5, 0.5]
                one, two = first.metrics(), second.metrics()
                assert [one[f"genrm/{name}"] for name in ("called", "answered", "shared", "requests")] == [3, 3, 1, 3]
                assert [two[f"genrm/{name}"] for name in ("called", "answered", "requests")] == [1, 1, 1]
                assert (one["scoring/scored"], two["scoring/scored"]) == (4, 1)
                assert (one["scoring/flawed_penalty"], two["scoring/flawed_penalty"]) == (0.5, 1.0)
                assert one["scoring/groups_complete"] == 2
                assert loop.live().counters["genrm"].counts["called"] == 4, "of the run"

    asyncio.run(asyncio.wait_for(main(), 30))


def test_closing_ends_the_judgements_of_all_steps() -> None:
    async def main() -> None:
        async with FakeServer(lambda *_: says("\\boxed{0}", after_s=60.0)) as server:
            loop = RewardLoop(REWARD, GenRMConfig(), [server.url], max_response_tokens=10)
            await loop.start()
            asking = [asyncio.create_task(loop.begin_step(step).score(make_sample())) for step in (1, 2)]
            while server.open < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await loop.close()
            outcomes = await asyncio.gather(*asking, return_exceptions=True)
            assert [type(each) for each in outcomes] == [asyncio.CancelledError] * 2
            assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("genrm")]

    asyncio.run(asyncio.wait_for(main(), 30))
