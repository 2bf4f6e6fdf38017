"""Servers killed and frozen at random: nothing is lost, nothing is left behind; and what the soak once found."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.genrm_soak import soak
from megatron_fapo.config.genrm import GenRMConfig
from megatron_fapo.genrm.asking import Critique
from megatron_fapo.genrm.client import GenRMClient
from megatron_fapo.genrm.pool import Effect


@pytest.mark.timeout(280)
def test_all_verdicts_of_a_soak_are_accounted_for() -> None:
    result = asyncio.run(soak(2000, seed=1, step=500))
    assert result.problems() == []
    assert result.outcomes.total() == 2000
    assert result.outcomes["sound"] > 2 * 500
    assert result.faults.total() >= 5
    assert result.counted["retries"] > 0


def test_a_second_request_that_never_begins_holds_no_place() -> None:
    """The first answer comes just as the second request is about to be sent. Its place was lost for the whole run, and
    with it the server: it never got another request after its next recovery."""

    async def main() -> None:
        client = GenRMClient(["http://one/v1", "http://two/v1"], GenRMConfig())
        asker, pool = client._asker, client._pool
        asker.latencies = SimpleNamespace(quantile=lambda _: 0.0)  # type: ignore[assignment]
        for turns in range(6):

            async def first(place: Any, *_: Any, turns: int = turns, hedge: bool = False) -> Any:
                try:
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    await asyncio.sleep(3600 if hedge else 0)
                    return "answered"
                finally:
                    asker._dispatcher.leave(place, Effect.NOTHING)

            asker._request = first  # type: ignore[method-assign]
            asker._budget = SimpleNamespace(earn=lambda: None, spend=lambda: True)  # type: ignore[assignment]
            critique = Critique([{"role": "user", "content": "?"}], seed=0)
            place = await asker._dispatcher.enter(set(), 10)
            case: Any = SimpleNamespace(began=time.monotonic())
            assert await asker._hedged(place, case, critique, 10) == "answered"
            assert [(server.requests, server.tokens) for server in pool.servers.values()] == [(0, 0)] * 2, turns
        await client.close()

    asyncio.run(main())
