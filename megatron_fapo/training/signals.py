"""Stop requests: the scheduler's signals and Ctrl-C, turned into one answer at safe places.

SIGTERM and SIGUSR1 (a scheduler that wants the node back) and SIGINT (a person) ask the loop to stop. Waiting for
samples is given up at once; an optimizer step is finished first. A second SIGINT ends the process without saving.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

EXIT_SAVED = 75
"""EX_TEMPFAIL: stopped on request with everything saved; run again with --resume."""
EXIT_LOST = 76
"""A process or a node was lost; run again with --resume."""
EXIT_INTERRUPTED = 130


class StopRequestedError(Exception):
    """Raised at a safe place after a stop was asked for."""


class StopRequest:
    """Install with `with`; ask with `check` or `race`."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.signal: signal.Signals | None = None

    def __enter__(self) -> StopRequest:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            loop.add_signal_handler(number, self._ask, number)
        return self

    def __exit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            loop.remove_signal_handler(number)

    def _ask(self, number: signal.Signals) -> None:
        if self.signal is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        self._event.set()

    @property
    def exit_code(self) -> int:
        return EXIT_INTERRUPTED if self.signal is signal.SIGINT else EXIT_SAVED

    def check(self) -> None:
        """
        Raises:
            StopRequestedError: a stop was asked for.
        """
        if self._event.is_set():
            raise StopRequestedError

    async def race(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`, or cancel it when a stop is asked for.

        Raises:
            StopRequestedError: a stop was asked for; `work` was cancelled and has ended.
        """
        task, stop = asyncio.ensure_future(work), asyncio.ensure_future(self._event.wait())
        try:
            await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise StopRequestedError
        finally:
            for each in (task, stop):
                each.cancel()
            await asyncio.gather(task, stop, return_exceptions=True)
