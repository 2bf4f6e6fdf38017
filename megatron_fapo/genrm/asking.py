"""One critique: asked of a server with room, of another one when that fails, of two at once when it is slow.

    enter -> request --answer--> done
                     --failure-> back off, enter at another server, ... `max_attempts` times
                     --slow----> a second request elsewhere; the first answer counts, the loser is cancelled

What an answer means is not known here (`client.py`), nor which servers there are (`membership.py`).
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_fapo.config.genrm import GenRMConfig
from megatron_fapo.data.records import JudgeRequest
from megatron_fapo.genrm.counters import Counters
from megatron_fapo.genrm.deadlines import Deadline
from megatron_fapo.genrm.dispatch import Dispatcher, Place
from megatron_fapo.genrm.hedging import HedgeBudget, Latencies
from megatron_fapo.genrm.membership import Membership
from megatron_fapo.genrm.pool import Effect
from megatron_fapo.genrm.prompts import CHARS_PER_TOKEN
from megatron_fapo.genrm.transport import Answer, Cut, Failure, FailureKind, ask
from megatron_fapo.observe.stall import Wait

FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.1, 5.0
EXPECTED_CRITIQUE_TOKENS = 1024
"""Until the first critiques show their length."""
HEDGE_QUANTILE = 0.97
"""Lower, and requests that are long anywhere use up a budget of a few percent before those that a server holds up."""
TEXT_KEPT = 200
"""Of what a failure says."""

EFFECTS = {
    FailureKind.TIMEOUT: Effect.FAILED,
    FailureKind.NO_CONNECTION: Effect.FAILED,
    FailureKind.CONNECTION: Effect.FAILED,
    FailureKind.HTTP_5XX: Effect.FAILED,
    FailureKind.BAD_BODY: Effect.FAILED,
    FailureKind.NOT_SERVED: Effect.FAILED,
    FailureKind.GONE: Effect.GONE,
    FailureKind.BUSY: Effect.BUSY,
    FailureKind.HTTP_4XX: Effect.NOTHING,
    FailureKind.CONTEXT: Effect.NOTHING,
    FailureKind.WITHDRAWN: Effect.NOTHING,
    FailureKind.SILENT: Effect.NOTHING,  # whoever cut it has buried the server
    FailureKind.CANCELLED: Effect.NOTHING,
}
COSTS_NO_ATTEMPT = {
    FailureKind.BUSY,
    FailureKind.GONE,
    FailureKind.NO_CONNECTION,
    FailureKind.WITHDRAWN,
    FailureKind.SILENT,
}
"""No server has judged it: one such failure must not use up a critique's attempts while a service moves or servers are
replaced. The pool keeps away from the server for a while, and the deadline ends it."""


@dataclass
class Case:
    """One verdict being made."""

    deadline: Deadline
    wait: Wait
    name: str
    began: float
    counters: Counters
    requests: int = 0
    history: list[JudgeRequest] = field(default_factory=list)

    def says(self, booked: int, what: str) -> None:
        """Enters what an answer was read as."""
        self.history[booked] = replace(self.history[booked], outcome=what)


@dataclass
class Critique:
    """One critique being asked for."""

    messages: list[dict[str, str]]
    seed: int
    vote: int = 0
    window: int = 0
    prompt: str | None = None
    """Names the prompt when it will be asked several times."""
    requests: int = 0
    attempts: int = 0
    """Those of the requests that a server may have judged."""
    tried: set[str] = field(default_factory=set)
    failures: list[Failure] = field(default_factory=list)
    prompt_tokens: int = 0
    """Estimated."""

    def __post_init__(self) -> None:
        self.prompt_tokens = int(len(self.messages[0]["content"]) / CHARS_PER_TOKEN) + 64


@dataclass
class Answered:
    answer: Answer
    server: str
    booked: int
    """Of `Case.history`: whoever reads the answer writes there what it said."""


class Asker:
    """Sends the requests of all verdicts. Belongs to one event loop."""

    def __init__(
        self,
        config: GenRMConfig,
        servers: Membership,
        dispatcher: Dispatcher,
        latencies: Latencies,
    ) -> None:
        self._config, self._servers, self._dispatcher = config, servers, dispatcher
        self._latencies = latencies
        self._critique_tokens = float(EXPECTED_CRITIQUE_TOKENS)
        self._budget = HedgeBudget(config.hedge_share)

    async def ask(self, case: Case, critique: Critique, max_tokens: int) -> Answered | Failure:
        """An answer of at most `max_tokens` and of what the server's context leaves; or, at the end of the attempts, or
        when no server's context is enough, the failure."""
        while True:
            began = time.monotonic()
            place = await self._dispatcher.enter(
                critique.tried,
                critique.prompt_tokens + int(self._critique_tokens),
                first=bool(case.history),
                prompt=critique.prompt,
                prompt_tokens=critique.prompt_tokens,
            )
            case.counters.observe("queue", time.monotonic() - began)
            case.deadline.start()
            outcome = await self._hedged(place, case, critique, max_tokens)
            if isinstance(outcome, Answered):
                critique.attempts += 1
                return outcome
            critique.attempts += outcome.kind not in COSTS_NO_ATTEMPT
            critique.failures.append(outcome)
            if outcome.kind is FailureKind.CONTEXT or critique.attempts >= self._config.max_attempts:
                return outcome
            await back_off(len(critique.failures))

    async def _hedged(self, place: Place, case: Case, critique: Critique, max_tokens: int) -> Answered | Failure:
        cut = Cut(self._config.request_timeout_s)
        hedge: asyncio.Task[Answered | Failure | None] | None = None

        async def second() -> Answered | Failure | None:
            # The place is taken in here: a task that is cancelled before it has begun could not give it back.
            other = self._dispatcher.spare({place.server, *critique.tried}, place.tokens)
            if other is None:
                return None
            if not self._budget.spend():
                self._dispatcher.leave(other, Effect.NOTHING)
                return None
            case.counters.add("hedged")
            return await self._request(
                other, case, critique, max_tokens, Cut(self._config.request_timeout_s), hedge=True
            )

        def begin() -> None:
            nonlocal hedge
            hedge = asyncio.create_task(second(), name="genrm hedge")
            hedge.add_done_callback(won)

        def won(task: asyncio.Task[Answered | Failure | None]) -> None:
            if not task.cancelled() and task.exception() is None and isinstance(task.result(), Answered):
                cut.now(FailureKind.CANCELLED, "another server was quicker")

        self._budget.earn()
        slow_s = self._latencies.quantile(HEDGE_QUANTILE) if self._config.hedge_share else None
        timer = None if slow_s is None else asyncio.get_running_loop().call_later(slow_s, begin)
        try:
            outcome = await self._request(place, case, critique, max_tokens, cut)
            if isinstance(outcome, Failure) and hedge is not None:
                outcome = await hedge or outcome
                case.counters.add("hedges_won", isinstance(outcome, Answered))
            return outcome
        finally:
            if timer is not None:
                timer.cancel()
            if hedge is not None and not hedge.done():
                hedge.cancel()
                await asyncio.wait([hedge])

    async def _request(
        self, place: Place, case: Case, critique: Critique, max_tokens: int, cut: Cut, *, hedge: bool = False
    ) -> Answered | Failure:
        """One critique from one server, in the room that its context leaves. Gives the place back."""
        context, effect, busy_for_s = self._servers.context(place.server), Effect.NOTHING, 0.0
        body: dict[str, Any] = {
            "model": self._config.served_model,
            "messages": critique.messages,
            "temperature": self._config.temperature,
            "top_p": self._config.top_p,
            "seed": critique.seed,
        }
        try:
            outcome: Answered | Failure | None = None
            if context is None or critique.prompt_tokens + max_tokens <= context:
                outcome = await self._send(place.server, case, critique, body | {"max_tokens": max_tokens}, cut, hedge)
            if outcome is None or (isinstance(outcome, Failure) and outcome.kind is FailureKind.CONTEXT):
                # Without max_tokens a server grants all the room that its own token count leaves.
                again = cut if outcome is None else Cut(self._config.request_timeout_s)
                outcome = await self._send(place.server, case, critique, body, again, hedge)
                if isinstance(outcome, Answered) and outcome.answer.finish_reason == "length":
                    effect = Effect.ANSWERED
                    case.says(outcome.booked, FailureKind.CONTEXT)
                    return Failure(FailureKind.CONTEXT, f"the context left {outcome.answer.completion_tokens} tokens")
            if isinstance(outcome, Failure):
                effect, busy_for_s = EFFECTS[outcome.kind], outcome.busy_for_s
                critique.tried.add(place.server)
            else:
                effect = Effect.ANSWERED
                self._critique_tokens += 0.05 * (outcome.answer.completion_tokens - self._critique_tokens)
            return outcome
        finally:
            self._dispatcher.leave(place, effect, busy_for_s)

    async def _send(
        self, server: str, case: Case, critique: Critique, body: dict[str, Any], cut: Cut, hedge: bool
    ) -> Answered | Failure:
        case.requests += 1
        critique.requests += 1
        case.wait.whom, case.wait.detail = server, f"{case.name}, request {case.requests}"
        case.counters.add("requests")
        case.counters.add("retries", critique.requests > 1 and not hedge)
        began = time.monotonic()
        outcome: Answer | Failure = Failure(FailureKind.CANCELLED, "nobody waits for it any more")
        try:
            with self._servers.open(server, cut) as session:
                outcome = await ask(session, server, body, cut)
        finally:
            took_s = time.monotonic() - began
            what, tokens, text = "answered", 0, ""
            if isinstance(outcome, Failure):
                what, text = outcome.kind, outcome.detail[:TEXT_KEPT]
                case.counters.add(f"failed/{what}")
            else:
                tokens, text = outcome.completion_tokens, outcome.critique
            case.history.append(
                JudgeRequest(
                    server,
                    what,
                    began - case.began,
                    took_s,
                    tokens,
                    critique.seed,
                    critique.vote,
                    critique.window,
                    hedge,
                    text,
                )
            )
        if isinstance(outcome, Failure):
            return outcome
        self._latencies.add(took_s)
        case.counters.observe("request", took_s)
        case.counters.add("completion_tokens", tokens)
        case.counters.add("prompt_tokens", outcome.prompt_tokens)
        return Answered(outcome, server, len(case.history) - 1)


async def back_off(failures: int) -> None:
    """Waits before the next of several requests: longer each time, and not all at the same moment."""
    await asyncio.sleep(random.uniform(0.5, 1.0) * min(FIRST_BACKOFF_S * 2**failures, LAST_BACKOFF_S))
