"""The client against servers that are slow, silent, of two minds or too small: who is asked what, and what counts."""

from __future__ import annotations

import asyncio
import re
import time

import pytest

from megatron_fapo.data.records import Verdict
from megatron_fapo.genrm import asking
from megatron_fapo.genrm.client import GenRMClient
from megatron_fapo.genrm.hedging import ENOUGH
from megatron_fapo.genrm.membership import PoolEmptyError
from megatron_fapo.genrm.verdict import Reason, Unscored
from tests.faults.fake_server import Behaviour, FakeServer, completion, hangs, says, until, with_context
from tests.faults.test_client import SOUND, always, in_turn, judge, reason, run


def seconds_are_known(client: GenRMClient, seconds: float) -> None:
    for _ in range(ENOUGH):
        client._latencies.add(seconds)


def test_a_slow_request_gets_a_second_one_and_the_first_answer_counts() -> None:
    async def test(client: GenRMClient, servers: list[FakeServer]) -> None:
        seconds_are_known(client, 0.05)
        for _ in range(20):
            client._asker._budget.earn()
        began = time.monotonic()
        slow = await judge(client)
        assert time.monotonic() - began < 30, "nobody waited for the hour"
        assert isinstance(slow, Verdict)
        assert slow.attempts == 2
        assert slow.server == servers[1].url
        assert [(each.server, each.outcome, each.hedge) for each in slow.history] == [
            (servers[1].url, "-1", True),
            (servers[0].url, "cancelled", False),
        ]
        await until(lambda: (servers[0].open, servers[0].cancelled) == (0, 1))
        assert servers[0].bodies[0] == servers[1].bodies[0], "the same request"
        metrics = client.metrics()
        assert (metrics["genrm/hedged"], metrics["genrm/hedges_won"], metrics["genrm/retries"]) == (1, 1, 0)

    run([always(hangs()), always(SOUND)], test, request_timeout_s=60.0, deadline_s=60.0, hedge_share=0.05)


def test_the_first_answer_cancels_the_second_request() -> None:
    async def test(client: GenRMClient, servers: list[FakeServer]) -> None:
        seconds_are_known(client, 0.05)
        outcome = await judge(client)
        assert isinstance(outcome, Verdict)
        assert (outcome.server, outcome.index) == (servers[0].url, -1)
        await until(lambda: (servers[1].open, servers[1].cancelled) == (0, 1))
        assert [each.outcome for each in outcome.history] == ["-1", "cancelled"]

    run([always(says("\\boxed{-1}", after_s=0.5)), always(hangs())], test, hedge_share=1.0)


@pytest.mark.parametrize("share", [0.0, 0.05])
def test_no_second_request_without_a_budget(share: float) -> None:
    async def test(client: GenRMClient, _servers: list[FakeServer]) -> None:
        seconds_are_known(client, 0.02)
        outcomes = await asyncio.gather(*(judge(client, number) for number in range(40)))
        assert all(isinstance(outcome, Verdict) for outcome in outcomes)
        assert client.metrics().get("genrm/hedged", 0) <= 40 * share

    slow = always(says("\\boxed{-1}", after_s=0.2))
    run([slow, slow], test, hedge_share=share, request_timeout_s=60.0, deadline_s=60.0)


def test_a_silent_server_loses_its_requests_to_those_that_answer() -> None:
    """It takes connections and lists its model, as an engine that hangs does: only its silence tells."""

    async def test(client: GenRMClient, servers: list[FakeServer]) -> None:
        seconds_are_known(client, 0.05)
        asked = asyncio.gather(*(judge(client, number) for number in range(8)))
        await until(lambda: servers[0].open == 4)

        async def others() -> None:  # the pool is in use while it hangs
            for number in range(100, 200):
                await judge(client, number)
                await asyncio.sleep(0.1)

        more = asyncio.create_task(others())
        outcomes = await asyncio.wait_for(asked, 30)
        more.cancel()
        await asyncio.gather(more, return_exceptions=True)
        assert all(isinstance(outcome, Verdict) and outcome.server == servers[1].url for outcome in outcomes)
        metrics = client.metrics()
        assert metrics["genrm/failed/silent"] >= 4
        assert "genrm/failed/timeout" not in metrics

    run(
        [always(hangs()), always(SOUND)],
        test,
        request_timeout_s=600.0,
        deadline_s=600.0,
        hedge_share=0.0,
        max_concurrent_per_server=4,
    )


def votes(*indices: int) -> Behaviour:
    """Answers by the order of arrival."""
    said = iter(indices)

    async def behave(_server: FakeServer, _request: object, _body: dict) -> object:
        return completion(f"\\boxed{{{next(said)}}}")

    return behave  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("said", "asked", "index", "agreement"),
    [((-1, -1), 2, -1, 1.0), ((-1, 1, 1), 3, 1, 2 / 3), ((0, -1, -1), 3, -1, 2 / 3), ((0, 1), 2, 0, 1.0)],
)
def test_the_majority_decides_and_asking_ends_with_it(said, asked: int, index: int, agreement: float) -> None:
    async def test(client: GenRMClient, servers: list[FakeServer]) -> None:
        outcome = await judge(client)
        assert isinstance(outcome, Verdict)
        assert (outcome.index, outcome.attempts, outcome.agreement) == (index, asked, pytest.approx(agreement))
        assert len({body["seed"] for body in servers[0].bodies}) == asked, "copies of one another would always agree"
        assert sorted(each.outcome for each in outcome.history) == sorted(map(str, said))
        assert {each.vote for each in outcome.history} == set(range(asked))

    behaviour = votes(*said)
    run([always(behaviour)], test, votes=3)


def test_a_vote_that_fails_is_not_cast() -> None:
    async def one(client: GenRMClient, _servers: list[FakeServer]) -> None:
        outcome = await judge(client)
        assert isinstance(outcome, Verdict)
        assert outcome.index == 0

    async def two(client: GenRMClient, _servers: list[FakeServer]) -> None:
        assert reason(await judge(client)) is Reason.GENRM_UNPARSABLE

    flawed, unread = says("\\boxed{0}"), says("?")
    run([in_turn(unread, flawed, unread, flawed)], one, votes=3, temperature=1.0, max_attempts=2)
    run([in_turn(unread, unread, unread, unread, flawed)], two, votes=3, temperature=1.0, max_attempts=2)


def test_a_later_vote_goes_where_the_prompt_has_been_read() -> None:
    async def test(client: GenRMClient, servers: list[FakeServer]) -> None:
        for number in range(6):
            assert isinstance(await judge(client, number), Verdict)
        asked = [len({body["messages"][0]["content"] for body in server.bodies}) for server in servers]
        assert sum(len(server.bodies) for server in servers) == 3 * 6
        assert sum(asked) == 2 * 6, "the third vote of each finds its prompt in a cache"

    run([always(votes(*[-1, 1, 1] * 6))] * 3, test, votes=3)


TOKENS = 4
"""Characters of a token at the server below."""


def reader(wrong: str) -> Behaviour:
    """A judge with a context of 1,000 tokens, which boxes the first paragraph that says `wrong`."""

    async def behave(server: FakeServer, request: object, body: dict) -> object:
        prompt = body["messages"][0]["content"]
        if len(prompt) // TOKENS + body.get("max_tokens", 1) > 1000:
            return await with_context(1000, lambda text: len(text) // TOKENS)(server, request, body)  # type: ignore
        found = re.search(rf"<paragraph_(\d+)>\n[^<]*{wrong}", prompt)
        return completion(f"\\boxed{{{found.group(1) if found else -1}}}")

    return behave  # type: ignore[return-value]


def long_solution(*wrong: int) -> str:
    paragraphs = [f"Step {n}: we add {n} and carry on, as the problem asks us to. " * 3 for n in range(60)]
    for index in wrong:
        paragraphs[index] = "this step is WRONG"
    return "\n\n".join([*paragraphs, "\\boxed{2}"])


@pytest.mark.parametrize("wrong", [(), (3,), (17, 40), (59,)])
def test_a_solution_beyond_the_context_is_judged_in_windows(wrong: tuple[int, ...]) -> None:
    async def test(client: GenRMClient, _servers: list[FakeServer]) -> None:
        outcome = await client.judge("q", "2", long_solution(*wrong))
        assert isinstance(outcome, Verdict), outcome
        assert outcome.index == (wrong[0] if wrong else -1)
        whole = client.metrics()
        assert whole["genrm/windows"] >= 3
        if not wrong:
            answered = [each for each in outcome.history if each.outcome == "-1"]
            assert len({each.window for each in answered}) == len(answered) >= 3

    run([always(reader("WRONG"))], test, max_model_len=1000, max_tokens=200)


def test_windows_may_be_declined() -> None:
    async def test(client: GenRMClient, servers: list[FakeServer]) -> None:
        outcome = await client.judge("q", "2", long_solution())
        assert isinstance(outcome, Unscored)
        assert outcome.reason is Reason.GENRM_CONTEXT
        assert [each.outcome for each in outcome.history] == ["context"]
        assert len(servers[0].bodies) == 1

    run([always(reader("WRONG"))], test, max_model_len=1000, max_tokens=200, long_solutions="unscored")


def test_a_cut_critique_is_asked_for_with_twice_the_room() -> None:
    async def test(client: GenRMClient, servers: list[FakeServer]) -> None:
        assert isinstance(await judge(client), Verdict)
        assert [body["max_tokens"] for body in servers[0].bodies] == [512, 1024]

    run([in_turn(says("\\boxed{-1}", finish_reason="length"), SOUND)], test, temperature=0.0)


def test_the_history_has_every_request_and_no_text_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "FIRST_BACKOFF_S", 0.01)

    async def test(client: GenRMClient, _servers: list[FakeServer]) -> None:
        outcome = await judge(client)
        assert isinstance(outcome, Verdict)
        assert [each.outcome for each in outcome.history] == ["unparsable", "1"]
        assert [each.text for each in outcome.history] == ["hm", ""]
        assert outcome.critique == "\\boxed{1}"
        first, second = outcome.history
        assert 0 <= first.began_s <= first.began_s + first.took_s <= second.began_s

    run([in_turn(says("hm"), says("\\boxed{1}"))], test)


def test_an_empty_pool_ends_the_votes_and_windows_of_a_verdict_too() -> None:
    async def test(client: GenRMClient, servers: list[FakeServer]) -> None:
        asked = asyncio.create_task(judge(client))
        await until(lambda: servers[0].open == 2)
        await servers[0].stop()
        with pytest.raises(PoolEmptyError):
            await asked
        await servers[0].start()

    run([always(hangs())], test, votes=3, pool_empty_timeout_s=0.5, request_timeout_s=60.0)
