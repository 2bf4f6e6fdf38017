"""Deadlines that stand still while no server answers anybody: an outage of the pool is nobody's slowness."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Deadline:
    """Of one verdict; it runs from its first `start`."""

    def __init__(self, timeout: asyncio.Timeout, seconds: float, *, paused: bool) -> None:
        self._timeout, self._left, self._paused, self._started = timeout, seconds, paused, False

    def start(self) -> None:
        if not self._started:
            self._started = True
            if not self._paused:
                self._timeout.reschedule(asyncio.get_running_loop().time() + self._left)

    def pause(self) -> None:
        self._paused = True
        if (when := self._timeout.when()) is not None and not self._timeout.expired():
            self._left = max(0.0, when - asyncio.get_running_loop().time())
            self._timeout.reschedule(None)

    def resume(self) -> None:
        self._paused = False
        if self._started and not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time() + self._left)


class Deadlines:
    """All that run."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._running, self._paused = seconds, set[Deadline](), False

    @asynccontextmanager
    async def one(self) -> AsyncIterator[Deadline]:
        """
        Raises:
            TimeoutError: the deadline has passed within.
        """
        async with asyncio.timeout(None) as timeout:
            deadline = Deadline(timeout, self._seconds, paused=self._paused)
            self._running.add(deadline)
            try:
                yield deadline
            finally:
                self._running.discard(deadline)

    def pause(self, paused: bool) -> None:
        """Stop all, or let them go on with what each had left."""
        if paused != self._paused:
            self._paused = paused
            for deadline in self._running:
                (deadline.pause if paused else deadline.resume)()
