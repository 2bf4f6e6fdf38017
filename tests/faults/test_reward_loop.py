"""The reward loop on real sockets and processes: every sample comes out once, and no failure comes out as sound."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from megatron_fapo.config.genrm import GenRMConfig
from megatron_fapo.config.reward import OverlongConfig, RewardConfig
from megatron_fapo.data.records import Sample, SampleKey, Score
from megatron_fapo.genrm.membership import GenRMUnavailable
from megatron_fapo.genrm.reward_loop import RewardLoop
from tests.faults.fake_server import Behaviour, FakeServer, Script, body, breaks_off, hangs, says, status
from tests.genrm.samples import make_sample

REWARD = RewardConfig(
    verifier="recipe_string", compare_rules=False, verifier_processes=1, overlong=OverlongConfig(buffer_tokens=4)
)
PATIENT = GenRMConfig(deadline_s=60.0, request_timeout_s=60.0, max_tokens=512)
GENRM = GenRMConfig(deadline_s=3.0, request_timeout_s=0.5, max_tokens=512)
RIGHT, WRONG = "1+1=2\n\n\\boxed{2}", "\\boxed{3}"


def run(
    scripts: list[Script],
    test: Callable[[RewardLoop, list[FakeServer]], Awaitable[None]],
    reward: RewardConfig = REWARD,
    genrm: GenRMConfig = GENRM,
    **options: float,
) -> None:
    async def main() -> None:
        servers = [await FakeServer(script).start() for script in scripts]
        try:
            async with RewardLoop(reward, genrm, [s.url for s in servers], max_response_tokens=10, **options) as loop:
                pids = [worker._process.pid for worker in loop._verifier._workers]
                await test(loop, servers)
            await asyncio.sleep(0.05)
            assert [server.open for server in servers] == [0] * len(servers)
            assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
        finally:
            for server in servers:
                await server.stop()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def tasks() -> set[str]:
    """Our tasks by name (the fake server's have none); the worker of a cancelled sample may still be being replaced."""
    names = {task.get_name() for task in asyncio.all_tasks()}
    return {name for name in names if not name.startswith("Task-")} - {"replace verifier worker"}


def judge_says(index: int) -> Script:
    return lambda _body, _number: says(f"\\boxed{{{index}}}")


def test_rule_then_verdict_then_overlong() -> None:
    async def test(loop: RewardLoop, servers: list[FakeServer]) -> None:
        wrong = await loop.score(make_sample(WRONG))
        assert (wrong.reward, wrong.correct, wrong.prediction, wrong.verdict) == (-1.0, False, "3", None)
        assert servers[0].bodies == [], "only right answers are judged"
        flawed = await loop.score(make_sample(RIGHT))
        assert (flawed.reward, flawed.correct, flawed.flawed) == (0.0, True, True)
        assert flawed.verdict is not None
        assert flawed.verdict.server == servers[0].url
        assert flawed.extra["genrm_s"] >= flawed.verdict.latency_s > 0
        unjudged = await loop.score(make_sample(RIGHT), judge=False)
        assert (unjudged.reward, unjudged.flawed) == (1.0, False)
        long = await loop.score(make_sample(RIGHT, tokens=8))
        assert (long.reward, long.overlong) == (-0.5, -0.5)
        metrics = loop.metrics()
        assert (metrics["scoring/scored"], metrics["genrm/called"], metrics["genrm/shared"]) == (4, 1, 1)
        loop.begin_step()
        assert loop.metrics()["scoring/scored"] == 0

    run([judge_says(1)], test)


def test_sound_and_measured_only() -> None:
    async def sound(loop: RewardLoop, _servers: list[FakeServer]) -> None:
        score = await loop.score(make_sample(RIGHT))
        assert (score.reward, score.flawed) == (1.0, False)

    async def measured(loop: RewardLoop, _servers: list[FakeServer]) -> None:
        score = await loop.score(make_sample(RIGHT))
        assert (score.reward, score.flawed) == (1.0, True)

    run([judge_says(-1)], sound)
    run([judge_says(0)], measured, REWARD.model_copy(update={"flawed_penalty": 0.0}))


def test_without_the_genrm_no_server_is_needed() -> None:
    async def test(loop: RewardLoop, _servers: list[FakeServer]) -> None:
        assert (await loop.score(make_sample(RIGHT))).reward == 1.0
        assert not [key for key in loop.metrics() if key.startswith("genrm/")]

    run([], test, genrm=GenRMConfig(enabled=False))


def test_an_unscored_sample_keeps_what_is_known_of_it() -> None:
    async def test(loop: RewardLoop, _servers: list[FakeServer]) -> None:
        score = await loop.score(make_sample(RIGHT))
        assert (score.reward, score.correct, score.prediction, score.verdict) == (None, True, "2", None)
        assert score.unscored_reason == "genrm_unparsable"
        assert "no idea" in score.extra["unscored_detail"]
        assert (await loop.score(make_sample(WRONG))).reward == -1.0
        metrics = loop.metrics()
        assert (metrics["scoring/unscored"], metrics["scoring/unscored/genrm_unparsable"]) == (1, 1)

    run([lambda _body, _number: says("no idea")], test)


def chaos(seed: int) -> Script:
    """A server that misbehaves in half of its answers. Its right verdict is always `flawed`."""
    rng = random.Random(seed)
    faults: list[Behaviour] = [
        hangs(),
        breaks_off(),
        status(500),
        status(429),
        body("{}"),
        says("fine, \\boxed{fine}"),
        says("\\boxed{-1}", finish_reason="length"),
        says("\\boxed{-1}", finish_reason="abort"),
    ]
    return lambda _body, _number: (
        rng.choice(faults) if rng.random() < 0.5 else says("\\boxed{0}", after_s=rng.random() / 20)
    )


def test_under_chaos_every_sample_comes_out_once_and_none_as_sound() -> None:
    samples = [make_sample(RIGHT if index % 3 else WRONG, index=index) for index in range(150)]

    async def source() -> AsyncIterator[Sample]:
        for sample in samples:
            yield sample
            await asyncio.sleep(0)

    async def test(loop: RewardLoop, servers: list[FakeServer]) -> None:
        async def outage() -> None:
            await asyncio.sleep(0.3)
            await servers[1].stop()
            await asyncio.sleep(0.5)
            await servers[1].start()

        breaking = asyncio.create_task(outage())
        scores: dict[str, Score] = {}
        started = time.monotonic()
        async for scored in loop.score_stream(source()):
            assert scored.sample.key.prompt_id not in scores, "scored twice"
            scores[scored.sample.key.prompt_id] = scored.score
        assert time.monotonic() - started < 60
        await breaking
        assert set(scores) == {sample.key.prompt_id for sample in samples}
        for sample in samples:
            score = scores[sample.key.prompt_id]
            if sample.text == WRONG:
                assert (score.reward, score.correct) == (-1.0, False)
            else:
                assert score.correct
                assert score.reward in (None, 0.0), "a failure was taken for a verdict of soundness"
                assert (score.reward is None) == (score.unscored_reason is not None)
        judged = sum(score.reward == 0.0 for score in scores.values())
        assert judged > 50
        metrics = loop.metrics()
        assert metrics["genrm/answered"] == judged
        assert metrics["genrm/answered"] + metrics["genrm/unscored"] == metrics["genrm/called"] == 100

    run([chaos(1), chaos(2)], test, genrm=GENRM.model_copy(update={"max_concurrent_per_server": 8}))


def test_no_sample_is_scored_twice_and_complete_groups_are_counted() -> None:
    group = [make_sample(RIGHT), dataclasses.replace(make_sample(RIGHT), key=SampleKey("test/0", 0, 1))]

    async def source(samples: list[Sample]) -> AsyncIterator[Sample]:
        for sample in samples:
            yield sample

    async def test(loop: RewardLoop, servers: list[FakeServer]) -> None:
        scored = [each async for each in loop.score_stream(source(group), group_size=2)]
        assert [each.score.reward for each in scored] == [1.0, 1.0]
        metrics = loop.metrics()
        assert metrics["scoring/groups_complete"] == 1
        assert len(servers[0].bodies) == 1, "identical solutions are judged once"
        assert metrics["genrm/load_imbalance"] == 1.0
        with pytest.raises(ValueError, match="came twice"):
            async for _ in loop.score_stream(source([group[0], group[0]])):
                pass

    run([judge_says(-1)], test)


def test_scores_stream_while_others_still_wait() -> None:
    async def source() -> AsyncIterator[Sample]:
        yield make_sample(RIGHT, index=0)
        yield make_sample(WRONG, index=1)
        await asyncio.sleep(0.1)
        yield make_sample(WRONG, index=2)

    async def test(loop: RewardLoop, _servers: list[FakeServer]) -> None:
        order = [scored.sample.key.prompt_id async for scored in loop.score_stream(source())]
        assert order == ["test/1", "test/2", "test/0"]

    run([lambda _body, _number: says("\\boxed{-1}", after_s=1.0)], test, genrm=PATIENT)


def test_the_stream_takes_no_more_than_it_may_have_in_flight() -> None:
    taken = 0

    async def source() -> AsyncIterator[Sample]:
        nonlocal taken
        for index in range(20):
            taken += 1
            yield make_sample(WRONG, index=index)

    async def test(loop: RewardLoop, _servers: list[FakeServer]) -> None:
        handed_on = 0
        async for _scored in loop.score_stream(source()):
            handed_on += 1
            await asyncio.sleep(0.02)
            assert taken <= handed_on + 4
        assert handed_on == 20

    run([judge_says(-1)], test, max_in_flight=4)


def test_leaving_the_stream_early_cancels_everything() -> None:
    async def source() -> AsyncIterator[Sample]:
        for index in range(100):
            yield make_sample(RIGHT if index else WRONG, index=index)
        await asyncio.sleep(60)

    async def test(loop: RewardLoop, servers: list[FakeServer]) -> None:
        before = tasks()
        async with aclosing(loop.score_stream(source())) as stream:
            async for _scored in stream:
                while servers[0].open < 99:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
                break
        assert tasks() == before
        await asyncio.sleep(0.1)
        assert servers[0].open == 0
        assert loop.metrics()["scoring/in_flight"] == 0

    run([lambda _body, _number: hangs()], test, genrm=PATIENT)


def test_an_error_of_the_source_ends_the_stream() -> None:
    async def source() -> AsyncIterator[Sample]:
        yield make_sample(RIGHT)
        raise ConnectionError("the engine died")

    async def test(loop: RewardLoop, _servers: list[FakeServer]) -> None:
        before = tasks()
        with pytest.raises(ConnectionError, match="the engine died"):
            async for _scored in loop.score_stream(source()):
                pass
        assert tasks() == before

    run([lambda _body, _number: hangs()], test)


def test_a_users_function_takes_the_place_of_rule_and_genrm(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
        "    if 'x' in solution_str: raise RuntimeError('mine')\n"
        "    return {'score': 0.25, 'acc': 1, 'pred': 'p', 'flawed_positive': True}\n"
    )

    async def test(loop: RewardLoop, _servers: list[FakeServer]) -> None:
        score = await loop.score(make_sample("whatever", tokens=8))
        assert (score.reward, score.overlong, score.correct, score.prediction) == (-0.25, -0.5, True, "p")
        assert score.extra["flawed_positive"] is True
        failed = await loop.score(make_sample("x"))
        assert (failed.reward, failed.correct, failed.unscored_reason) == (None, None, "compute_score_error")

    run([], test, REWARD.model_copy(update={"compute_score": f"{path}:compute_score"}))


def test_long_waits_are_announced(caplog: pytest.LogCaptureFixture) -> None:
    async def test(loop: RewardLoop, _servers: list[FakeServer]) -> None:
        with caplog.at_level(logging.WARNING):
            await asyncio.gather(*(loop.score(make_sample(RIGHT, index=index)) for index in range(3)))
        lines = [record.getMessage() for record in caplog.records if "waiting on" in record.getMessage()]
        assert 1 <= len(lines) <= 4
        assert lines[0].startswith("waiting on genrm for 0 s: 3 samples, the oldest is SampleKey(prompt_id='test/0'")

    run([lambda _body, _number: says("\\boxed{-1}", after_s=1.0)], test, genrm=PATIENT, warn_after_s=0.3)


def test_a_pool_that_cannot_be_used_stops_the_start_and_leaves_no_worker() -> None:
    async def main() -> None:
        loop = RewardLoop(REWARD, GENRM, ["http://127.0.0.1:9/v1"], max_response_tokens=10)
        with pytest.raises(GenRMUnavailable, match=r"127\.0\.0\.1:9"):
            await loop.start()
        assert loop._verifier._workers == set()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_a_function_judges_in_place_of_servers_and_its_failures_are_unscored(tmp_path: Path) -> None:
    source = (
        "def judge(question, ground_truth, solution):\n    return {'0': 0, '-': -1, 'x': 'no index'}[solution[0]]\n"
    )
    (tmp_path / "judges.py").write_text(source)
    genrm = GENRM.model_copy(update={"judge_function": f"{tmp_path}/judges.py:judge"})

    async def test(loop: RewardLoop, _: list[FakeServer]) -> None:
        flawed, sound, bad, unknown = [await loop.score(make_sample(f"{c} {RIGHT}")) for c in "0-xy"]
        assert (flawed.reward, flawed.flawed, sound.reward, sound.flawed) == (0.0, True, 1.0, False)
        assert [score.reward for score in (bad, unknown)] == [None, None]
        assert {score.unscored_reason for score in (bad, unknown)} == {"judge_function_error"}
        assert "KeyError: 'y'" in unknown.extra["unscored_detail"]

    run([], test, genrm=genrm)


def test_step_ratio_and_a_moving_penalty() -> None:
    async def ratio(loop: RewardLoop, _: list[FakeServer]) -> None:
        assert (await loop.score(make_sample(RIGHT))).reward == 0.5  # the first error is in the second of two

    run([judge_says(1)], ratio, REWARD.model_copy(update={"shape": "step_ratio"}))

    async def moving(loop: RewardLoop, _: list[FakeServer]) -> None:
        rewards = []
        for step in (1, 2, 3):
            loop.begin_step(step)
            rewards.append((await loop.score(make_sample(RIGHT))).reward)
        assert rewards == [0.5, pytest.approx(1 - 2 / 2.75), 1 - 2 / 1.5]

    run([judge_says(1)], moving, REWARD.model_copy(update={"rho_shift_schedule": [(1, 3.0), (3, 0.5)]}))


def test_critiques_are_scored_by_their_label_alone() -> None:
    reward = REWARD.model_copy(update={"task": "critic"})

    async def test(loop: RewardLoop, servers: list[FakeServer]) -> None:
        def critique(text: str, label: str, **changes: object) -> Sample:
            sample = make_sample(text, label)
            prompt = dataclasses.replace(sample.prompt, extra_info={"total_steps": 4})
            return dataclasses.replace(sample, prompt=prompt, **changes)

        near = await loop.score(critique("so \\boxed{2}", "3"))
        assert (near.reward, near.correct, near.prediction) == (0.75, True, "2")
        sound = await loop.score(critique("fine \\boxed{-1}", "-1"))
        assert (sound.reward, sound.correct) == (1.0, True)
        out_of_range = await loop.score(critique("\\boxed{4}", "3"))
        assert (out_of_range.reward, out_of_range.correct, out_of_range.prediction) == (-1.0, False, None)
        cut = await loop.score(critique("\\boxed{3}", "3", finish_reason="length"))
        assert (cut.reward, cut.prediction) == (-1.0, None), "a cut critique is no verdict when it serves either"
        assert servers[0].bodies == []
        assert loop._verifier._workers == set(), "the critic needs no verifier"

    run([judge_says(0)], test, reward)
