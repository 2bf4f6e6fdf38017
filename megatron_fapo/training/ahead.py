"""Rollouts that run while the policy is updated, within `training.asynchrony.max_staleness`.

When step s is the next to be trained, engines serve the weights of s - 1 steps and the rollouts of steps s to
s + max_staleness may have begun, in order and each once: so no sample is trained on more than max_staleness versions
after the one that began it, and a step has the prompts that it would have had, whichever samples end first. With 0
there is one rollout at a time, begun when the step before is finished.

`begun_by` decides; `Ahead` runs, waits and gives up. Neither knows what a rollout is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from types import TracebackType
from typing import Any, Self


def begun_by(step: int, begun: int, max_staleness: int, last: int) -> range:
    """Steps whose rollouts begin when `step` is the next to be trained and those up to `begun` have begun."""
    return range(begun + 1, min(step + max_staleness, last) + 1)


class Ahead[T]:
    """`async with`: what runs is cancelled at the end, and has ended then."""

    def __init__(self, start: Callable[[int], Coroutine[Any, Any, T]], finished: int, last: int, max_staleness: int):
        """
        Args:
            start: the rollout of a step; called in order of steps. It says `generated` when engines are done with it.
            finished: the last step of before.
            last: the last step of all.
            max_staleness: `training.asynchrony.max_staleness`.
        """
        self._start, self._begun, self._last, self._max_staleness = start, finished, last, max_staleness
        self._tasks: dict[int, asyncio.Task[T]] = {}
        self._generating: set[int] = set()
        self._moved = asyncio.Event()
        self.awaited: int | None = None
        """The step whose groups are waited for."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def begin(self, step: int) -> None:
        """Begin what may begin now that `step` is the next to be trained."""
        for each in begun_by(step, self._begun, self._max_staleness, self._last):
            self._generating.add(each)
            self._begun = each
            task = self._tasks[each] = asyncio.create_task(self._start(each), name=f"rollout of step {each}")
            task.add_done_callback(partial(self._ended, each))

    def generated(self, step: int) -> None:
        """The engines have nothing more to do for the step."""
        self._generating.discard(step)
        self._moved.set()

    def _ended(self, step: int, _: asyncio.Task[T]) -> None:
        self.generated(step)  # of one that failed

    @property
    def generating(self) -> bool:
        """Whether engines have samples of any step in flight."""
        return bool(self._generating)

    async def groups(self, step: int) -> T:
        """What the rollout of `step` has come to. Raises what any rollout has failed of, as all below."""
        self.awaited = step
        await self._until(lambda: self._tasks[step].done())
        self.awaited = None
        return self._tasks.pop(step).result()

    async def idle(self) -> None:
        """Until engines have no samples in flight."""
        await self._until(lambda: not self._generating)

    def check(self) -> None:
        """Raise what a rollout has failed of: the step that needs it may be hours away."""
        for task in self._tasks.values():
            if task.done():
                task.result()

    async def _until(self, reached: Callable[[], bool]) -> None:
        while True:
            self._moved.clear()
            self.check()
            if reached():
                return
            await self._moved.wait()
