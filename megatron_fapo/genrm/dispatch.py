"""Places at servers, given out in order of arrival: who waits, who gets the next place, whose cache is warm.

`pool.py` decides which server; here requests wait for one. A queue never grows by itself: whoever judges waits for its
place before it sends anything, and callers bound how many judgements they begin (`client.MOST_JUDGEMENTS`).
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from dataclasses import dataclass

from megatron_fapo.genrm.pool import Effect, ServerPool
from megatron_fapo.observe.trace import TRACER

_HOMES = 8192
"""Prompts whose server is remembered; older ones have left its cache anyway."""


@dataclass
class Place:
    """A request's right to be at a server; given back by `Dispatcher.leave`."""

    server: str
    tokens: int


@dataclass
class _Waiter:
    tried: set[str]
    tokens: int
    prompt: str | None
    prompt_tokens: int
    place: asyncio.Future[Place]


class Dispatcher:
    """Belongs to one event loop."""

    def __init__(self, pool: ServerPool) -> None:
        self._pool = pool
        self._waiters: deque[_Waiter] = deque()
        self._homes: OrderedDict[str, str] = OrderedDict()

    @property
    def waiting(self) -> int:
        return len(self._waiters)

    async def enter(
        self, tried: set[str], tokens: int, *, first: bool = False, prompt: str | None = None, prompt_tokens: int = 0
    ) -> Place:
        """Waits for a place.

        Args:
            tried: servers to ask only when there is no other; see ServerPool.choose.
            first: ahead of all who wait, for what has waited before.
            prompt: names a prompt that will be asked several times; the server that read its `prompt_tokens` once is
                preferred.

        Raises:
            Exception: what `give_up` was called with.
        """
        future: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        (self._waiters.appendleft if first else self._waiters.append)(
            _Waiter(tried, tokens, prompt, prompt_tokens, future)
        )
        self.dispatch()
        try:
            return await future
        except asyncio.CancelledError:
            # Cancelled between being given a place and taking it: an unreturned place would be lost for the whole run.
            if future.done() and not future.cancelled() and future.exception() is None:
                self.leave(future.result(), Effect.NOTHING)
            raise

    def spare(self, than: set[str], tokens: int) -> Place | None:
        """A place at another server at once, or none; never while others wait for one."""
        now = time.monotonic()
        server = None if self._waiters else self._pool.spare(than, now)
        if server is None:
            return None
        self._pool.begin(server, tokens, now)
        TRACER.count(server, 1)
        return Place(server, tokens)

    def leave(self, place: Place, effect: Effect, busy_for_s: float = 0.0) -> None:
        TRACER.count(place.server, -1)
        self._pool.end(place.server, place.tokens, effect, time.monotonic(), busy_for_s)
        self.dispatch()

    def give_up(self, error: Exception) -> None:
        """Tells everybody who waits."""
        while self._waiters:
            if not (future := self._waiters.popleft().place).done():
                future.set_exception(error)

    def dispatch(self) -> None:
        """Gives free places to those who wait; whoever waits for another server than the free one lets others pass."""
        passed: list[_Waiter] = []
        now = time.monotonic()
        while self._waiters and self._pool.has_room(now):
            waiter = self._waiters.popleft()
            if waiter.place.done():
                continue
            home = None if waiter.prompt is None else self._homes.get(waiter.prompt)
            server = self._pool.choose(waiter.tried, now, home, waiter.prompt_tokens)
            if server is None:
                passed.append(waiter)
                continue
            if waiter.prompt is not None:
                self._remember(waiter.prompt, server)
            self._pool.begin(server, waiter.tokens, now)
            TRACER.count(server, 1)
            waiter.place.set_result(Place(server, waiter.tokens))
        self._waiters.extendleft(reversed(passed))

    def _remember(self, prompt: str, server: str) -> None:
        self._homes[prompt] = server
        self._homes.move_to_end(prompt)
        if len(self._homes) > _HOMES:
            self._homes.popitem(last=False)
