"""The GenRM client against servers that fail in every way we know: no failure may become a verdict."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from megatron_fapo.config.genrm import GenRMConfig
from megatron_fapo.data.records import Verdict
from megatron_fapo.genrm.client import GenRMClient
from megatron_fapo.genrm.membership import TICK_S, GenRMUnavailable, PoolEmptyError
from megatron_fapo.genrm.pool import Effect
from megatron_fapo.genrm.verdict import Reason, Unscored
from megatron_fapo.observe.stall import WAITS
from tests.faults.fake_server import FakeServer, Script, body, breaks_off, hangs, says, status, until, with_context

SOUND = says("Fine. \\boxed{-1}")
SOLUTION = "First 1+1=2.\n\nSo \\boxed{2}."


def config(**changes: object) -> GenRMConfig:
    quick = {"deadline_s": 3.0, "request_timeout_s": 1.0, "max_tokens": 512}
    return GenRMConfig(**(quick | changes))


def run(
    scripts: list[Script],
    test: Callable[[GenRMClient, list[FakeServer]], Awaitable[None]],
    max_model_len: int | None = 32768,
    **changes: object,
) -> None:
    """Runs `test` with a checked client on one server per script, and asserts that nothing is left over."""

    async def main() -> None:
        servers = [await FakeServer(script, max_model_len).start() for script in scripts]
        client = GenRMClient([server.url for server in servers], config(**changes))
        await client.check()
        try:
            await test(client, servers)
        finally:
            await client.close()
            await asyncio.sleep(0.05)
            still_open = [server.open for server in servers]
            for server in servers:
                await server.stop()
        assert still_open == [0] * len(servers)
        assert all(server.requests == 0 and server.tokens == 0 for server in client._pool.servers.values())
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def always(behaviour: object) -> Script:
    return lambda _body, _number: behaviour  # type: ignore[return-value]


def in_turn(*behaviours: object) -> Script:
    """The last one repeats."""
    return lambda _body, number: behaviours[min(number, len(behaviours)) - 1]  # type: ignore[return-value]


async def judge(client: GenRMClient, number: int = 0) -> Verdict | Unscored:
    return await client.judge(f"What is 1+1? ({number})", "2", SOLUTION)


def reason(outcome: Verdict | Unscored) -> Reason:
    assert isinstance(outcome, Unscored), outcome
    return outcome.reason


REQUEST_FAILURES = {
    "hangs": hangs(),
    "breaks off": breaks_off(),
    "500": status(500),
    "404": status(404),
    "429": status(429),
    "400": status(400, "bad request"),
    "not json": body("<html>Bad gateway</html>"),
    "no choices": body('{"choices": []}'),
    "a list": body("[1, 2]"),
    "null choice": body('{"choices": [null]}'),
    "numeric content": body('{"choices": [{"message": {"content": -1}, "finish_reason": "stop"}]}'),
    "empty body": body(""),
    "boxed in a foreign body": body("\\boxed{-1}"),
}
FAILURES = REQUEST_FAILURES | {
    "no box": says("I find it fine."),
    "null text": says(None),
    "code in the box": says("\\boxed{0-1}"),
    "out of range": says("\\boxed{2}"),
    "cut": says("\\boxed{-1}", finish_reason="length"),
    "aborted": says("\\boxed{-1}", finish_reason="abort"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_no_failure_is_a_verdict(failure: str) -> None:
    async def test(client: GenRMClient, _servers: list[FakeServer]) -> None:
        assert isinstance(await judge(client), Unscored)
        metrics = client.metrics()
        assert (metrics["genrm/called"], metrics["genrm/answered"], metrics["genrm/unscored"]) == (1, 0, 1)

    run([always(FAILURES[failure])], test, deadline_s=1.0, max_attempts=2)


@pytest.mark.parametrize("failure", REQUEST_FAILURES)
def test_the_retry_goes_to_the_other_server(failure: str) -> None:
    async def test(client: GenRMClient, servers: list[FakeServer]) -> None:
        outcomes = await asyncio.gather(*(judge(client, number) for number in range(20)))
        assert [outcome.index for outcome in outcomes if isinstance(outcome, Verdict)] == [-1] * 20
        assert {outcome.server for outcome in outcomes if isinstance(outcome, Verdict)} == {servers[1].url}
        assert len(servers[0].bodies) >= 1
        assert max(outcome.attempts for outcome in outcomes if isinstance(outcome, Verdict)) >= 2

    run([always(FAILURES[failure]), always(SOUND)], test)


def test_each_failure_has_its_reason_and_its_count() -> None:
    expected = {
        "500": (Reason.GENRM_UNREACHABLE, "genrm/failed/http_5xx"),
        "400": (Reason.GENRM_REFUSED, "genrm/failed/http_4xx"),
        "no choices": (Reason.GENRM_UNREACHABLE, "genrm/failed/bad_body"),
        "no box": (Reason.GENRM_UNPARSABLE, "genrm/unparsable"),
        "cut": (Reason.GENRM_TRUNCATED, "genrm/truncated"),
        "429": (Reason.GENRM_DEADLINE, "genrm/failed/busy"),
        "hangs": (Reason.GENRM_UNREACHABLE, "genrm/failed/timeout"),
        "breaks off": (Reason.GENRM_UNREACHABLE, "genrm/failed/connection"),
    }
    for failure, (why, count) in expected.items():

        async def test(client: GenRMClient, _servers: list[FakeServer], why: Reason = why, count: str = count) -> None:
            assert reason(await judge(client)) is why
            assert client.metrics()[count] >= 2

        run([always(FAILURES[failure])], test, max_attempts=2, deadline_s=2.5)


def test_an_unreadable_critique_is_asked_for_again_with_another_seed() -> None:
    async def test(client: GenRMClient, servers: list[FakeServer]) -> None:
        outcome = await judge(client)
        assert isinstance(outcome, Verdict)
        assert (outcome.index, outcome.attempts) == (1, 2)
        first, second = servers[0].bodies
        assert first["seed"] != second["seed"]
        assert first["messages"] == second["messages"]

    run([in_turn(says("hm"), says("Paragraph 1 is wrong: \\boxed{1}"))], test)


def test_the_seed_is_a_function_of_the_content() -> None:
    seeds = []

    async def test(client: GenRMClient, servers: list[FakeServer]) -> None:
        await judge(client, 1)
        await judge(client, 2)
        seeds.append([asked["seed"] for asked in servers[0].bodies])

    run([always(SOUND)], test)
    run([always(SOUND)], test)
    assert seeds[0] == seeds[1]
    assert seeds[0][0] != seeds[0][1]


def test_the_deadline_ends_a_verdict_whatever_the_servers_do() -> None:
    async def test(client: GenRMClient, _servers: list[FakeServer]) -> None:
        started = time.monotonic()
        outcomes = await asyncio.gather(*(judge(client, number) for number in range(50)))
        assert {reason(outcome) for outcome in outcomes} == {Reason.GENRM_DEADLINE}
        assert 1.0 <= time.monotonic() - started < 3.0

    run([always(hangs())], test, deadline_s=1.0, request_timeout_s=60.0)


def test_concurrency_per_server_is_bounded_and_waiting_is_fair() -> None:
    order: list[int] = []

    async def ask(client: GenRMClient, number: int) -> None:
        assert isinstance(await judge(client, number), Verdict)
        order.append(number)

    async def test(client: GenRMClient, servers: list[FakeServer]) -> None:
        await asyncio.gather(*(ask(client, number) for number in range(20)))
        assert servers[0].most_open == 2
        assert all(abs(place - number) <= 1 for place, number in enumerate(order))

    # 20 requests of 0.1 s, two at a time, take longer than the deadline of each: queueing is not on its clock.
    run([always(says("\\boxed{-1}", after_s=0.1))], test, max_concurrent_per_server=2, deadline_s=0.8)


def test_a_process_killed_mid_request_costs_no_verdict() -> None:
    def start() -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.fake_server", "0.3"], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        return process, f"http://127.0.0.1:{json.loads(process.stdout.readline())['port']}/v1"

    async def main(processes: list[subprocess.Popen[str]], urls: list[str]) -> None:
        client = GenRMClient(urls, config(deadline_s=10.0, request_timeout_s=5.0, max_concurrent_per_server=8))
        await client.check()
        try:
            asking = [asyncio.create_task(judge(client, number)) for number in range(40)]
            await asyncio.sleep(0.15)
            processes[0].kill()
            outcomes = await asyncio.gather(*asking)
            assert all(isinstance(outcome, Verdict) for outcome in outcomes)
            metrics = client.metrics()
            assert metrics["genrm/answered"] == 40
            assert metrics["genrm/servers_down"] == 1
            assert metrics.get("genrm/failed/connection", 0) + metrics.get("genrm/failed/gone", 0) >= 1
        finally:
            await client.close()

    started = [start(), start()]
    try:
        asyncio.run(main([process for process, _ in started], [url for _, url in started]))
    finally:
        for process, _ in started:
            process.kill()
            process.communicate()


def test_servers_that_nobody_listens_at_use_up_no_attempt() -> None:
    async def test(client: GenRMClient, servers: list[FakeServer]) -> None:
        for server in servers[:4]:
            await server.stop()
        outcome = await judge(client)
        assert isinstance(outcome, Verdict)
        assert outcome.server == servers[4].url
        assert client.metrics()["genrm/failed/gone"] == 4
        for server in servers[:4]:
            await server.start()

    run([always(SOUND)] * 5, test, max_attempts=2)


def test_a_dead_server_rejoins() -> None:
    async def test(client: GenRMClient, servers: list[FakeServer]) -> None:
        await servers[0].stop()
        waiting = asyncio.create_task(judge(client))
        await asyncio.sleep(0.3)
        assert client.metrics()["genrm/servers_alive"] == 0
        assert not waiting.done()
        await servers[0].start()
        assert isinstance(await waiting, Verdict)
        assert client.metrics()["genrm/servers_alive"] == 1
        assert isinstance(await judge(client, 2), Verdict)

    run([always(SOUND)], test)


def test_when_every_server_stays_dead_scoring_pauses_with_a_countdown_and_then_ends_as_a_loss(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test(client: GenRMClient, servers: list[FakeServer]) -> None:
        await servers[0].stop()
        started = time.monotonic()
        outcomes = await asyncio.gather(*(judge(client, number) for number in range(30)), return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {PoolEmptyError}, "longer than the deadline of a verdict"
        assert 1.5 <= time.monotonic() - started < 4.0
        assert all(error.lost for error in outcomes if isinstance(error, PoolEmptyError)), "a job is worth another try"
        late = time.monotonic()
        with pytest.raises(PoolEmptyError, match=r"no server of the pool \(http://.*\) has answered anybody"):
            await judge(client, 99)
        assert time.monotonic() - late < 0.5
        await servers[0].start()

    run([always(SOUND)], test, deadline_s=0.5, pool_empty_timeout_s=1.5, max_concurrent_per_server=4)
    assert re.search(r"NO GENRM SERVER ANSWERS: scoring is paused; in \d s the run ends", caplog.text)


def test_an_outage_of_the_pool_is_not_on_the_clock_of_a_verdict() -> None:
    async def test(client: GenRMClient, servers: list[FakeServer]) -> None:
        waiting = [asyncio.create_task(judge(client, number)) for number in range(6)]
        await until(lambda: servers[0].open == 6)
        await servers[0].stop()
        await asyncio.sleep(2.5)
        assert not any(task.done() for task in waiting), "the deadline has passed, but nobody could answer"
        await servers[0].start()
        assert all(isinstance(outcome, Verdict) for outcome in await asyncio.gather(*waiting))

    run([always(says("\\boxed{-1}", after_s=0.6))], test, deadline_s=2.0)


def test_cancelling_closes_the_request() -> None:
    async def test(client: GenRMClient, servers: list[FakeServer]) -> None:
        asking = [asyncio.create_task(judge(client, number)) for number in range(5)]
        await asyncio.sleep(0.1)
        assert servers[0].open == 3
        started = time.monotonic()
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        assert time.monotonic() - started < 1.0
        await asyncio.sleep(0.05)
        assert (servers[0].open, servers[0].cancelled) == (0, 3)
        assert isinstance(await judge(client, 9), Verdict)

    run(
        [in_turn(hangs(), hangs(), hangs(), SOUND)],
        test,
        request_timeout_s=60.0,
        max_concurrent_per_server=3,
    )


def test_a_place_given_to_someone_just_cancelled_is_given_back() -> None:
    async def test(client: GenRMClient, servers: list[FakeServer]) -> None:
        url, dispatcher = servers[0].url, client._dispatcher
        held = await dispatcher.enter(set(), 1)
        waiting = asyncio.create_task(dispatcher.enter(set(), 1))
        await asyncio.sleep(0.01)
        dispatcher.leave(held, Effect.NOTHING)
        assert client._pool.servers[url].requests == 1, "given to the one who waits"
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert isinstance(await judge(client), Verdict)

    run([always(SOUND)], test, max_concurrent_per_server=1)


def test_identical_judgements_share_one_request_until_the_step_ends() -> None:
    async def test(client: GenRMClient, servers: list[FakeServer]) -> None:
        outcomes = await asyncio.gather(*(judge(client) for _ in range(10)), judge(client, 1))
        assert all(isinstance(outcome, Verdict) for outcome in outcomes)
        assert len(servers[0].bodies) == 2
        assert client.metrics()["genrm/shared"] == 9
        client.begin_step()
        assert client.metrics()["genrm/called"] == 0
        await judge(client)
        assert len(servers[0].bodies) == 3

    run([always(says("\\boxed{-1}", after_s=0.1))], test)


def test_cancelling_one_of_two_sharers_leaves_the_other_its_verdict() -> None:
    async def test(client: GenRMClient, servers: list[FakeServer]) -> None:
        first, second = asyncio.create_task(judge(client)), asyncio.create_task(judge(client))
        await asyncio.sleep(0.05)
        first.cancel()
        assert isinstance(await second, Verdict)
        assert first.cancelled()
        assert len(servers[0].bodies) == 1

    run([always(says("\\boxed{-1}", after_s=0.15))], test)


def test_a_failed_judgement_is_not_kept_for_the_next_identical_one() -> None:
    async def test(client: GenRMClient, _servers: list[FakeServer]) -> None:
        assert reason(await judge(client)) is Reason.GENRM_UNPARSABLE
        assert isinstance(await judge(client), Verdict)

    run([in_turn(says("?"), says("?"), says("?"), SOUND)], test)


@pytest.mark.parametrize("listed", [True, False])
def test_max_tokens_gives_way_to_the_context(listed: bool) -> None:
    async def test(client: GenRMClient, servers: list[FakeServer]) -> None:
        outcome = await client.judge("q", "2", "x" * 1200 + "\n\n\\boxed{2}")
        assert isinstance(outcome, Verdict)
        assert ["max_tokens" in asked for asked in servers[0].bodies] == ([False] if listed else [True, False])
        outcome = await client.judge("q", "2", "x" * 9000 + "\n\n\\boxed{2}")
        assert reason(outcome) is Reason.GENRM_CONTEXT
        assert client.metrics()["genrm/servers_alive"] == 1

    run([always(with_context(800, lambda text: len(text) // 4))], test, max_model_len=800 if listed else None)


def test_a_critique_cut_by_the_context_is_no_verdict() -> None:
    async def test(client: GenRMClient, servers: list[FakeServer]) -> None:
        assert reason(await judge(client)) is Reason.GENRM_CONTEXT
        assert len(servers[0].bodies) == 1

    cut = always(says("\\boxed{-1}", finish_reason="length"))
    run([cut], test, max_model_len=600, long_solutions="unscored")


def test_check_reports_every_server_that_cannot_be_used() -> None:
    async def main() -> None:
        async with FakeServer(always(SOUND)) as good, FakeServer(always(SOUND), model="other") as other:
            urls = [good.url, other.url, "http://127.0.0.1:9/v1", good.url + "/nowhere"]
            with pytest.raises(GenRMUnavailable) as caught:
                await GenRMClient(urls, config()).check()
        text = str(caught.value)
        assert "serves other and not 'genrm'" in text
        assert "--served-model-name" in text
        assert "127.0.0.1:9/v1" in text
        assert "HTTP 404" in text
        assert len(text.splitlines()) == 4
        with pytest.raises(GenRMUnavailable, match=r"no server: set genrm\.servers"):
            await GenRMClient([], config()).check()
        with pytest.raises(GenRMUnavailable, match="NOT_SET_ANYWHERE"):
            await GenRMClient([good.url], config(api_key_env="NOT_SET_ANYWHERE")).check()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_the_tick_is_short_against_the_deadlines_used_here() -> None:
    assert TICK_S <= 0.1


def test_a_judge_service_that_is_waited_for_is_named_to_the_stall_alarm(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "judge.json"
        client = GenRMClient([], config(rendezvous=str(path), start_timeout_s=60.0))
        task = asyncio.create_task(client.check())
        await asyncio.sleep(0.3)
        line = next(line for line in WAITS.lines() if f"the judge service of {path}" in line)
        assert f"there is no {path}" in line
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await client.close()

    asyncio.run(main())
