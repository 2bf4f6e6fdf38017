"""The driver's side of the rollout engines: one stream of samples out of several engines.

In: prompts. Out: samples of all engines, each as soon as it is finished. Which engine takes which prompt depends on
positions alone (`sampling.assign`), so a run can be repeated.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_fapo.config.rollout import SamplingConfig
from megatron_fapo.data.records import Prompt, Sample
from megatron_fapo.errors import UserError
from megatron_fapo.rollout.engine import EngineDiedError
from megatron_fapo.rollout.sampling import assign
from megatron_fapo.weight_sync.protocol import RefitError, StaleEngineError

_LOG_LINES = 30


class RolloutPool:
    """Handles of `RolloutEngine` actors, and the log file of each."""

    def __init__(self, engines: Sequence[Any], log_paths: Sequence[str | None]) -> None:
        """
        Args:
            engines: Ray actor handles of RolloutEngine.
            log_paths: where each engine writes, for the messages of errors.
        """
        self._engines, self._logs = list(engines), list(log_paths)

    async def start(self, version: int = 0, *, timeout_s: float = 600.0) -> list[dict[str, Any]]:
        """Start all engines at once; returns the facts of each (`RolloutEngine.start`).

        Raises:
            EngineDiedError: an engine did not start in time, or died; with the end of its log.
        """
        return await self._all("start", version, timeout_s=timeout_s)

    async def _all(self, method: str, *args: Any, timeout_s: float | None = None) -> list[Any]:
        calls = [self._call(i, method, *args, timeout_s=timeout_s) for i in range(len(self._engines))]
        return await asyncio.gather(*calls)

    async def _call(self, index: int, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        return await self._translate(index, getattr(self._engines[index], method).remote(*args), timeout_s)

    async def _translate(self, index: int, reference: Awaitable[Any], timeout_s: float | None = None) -> Any:
        """Await what an engine answers; Ray's errors become ours."""
        import ray.exceptions

        try:
            return await asyncio.wait_for(reference, timeout_s)
        except TimeoutError as error:
            self._died(index, f"did not answer within {timeout_s} s", error)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError | RefitError | StaleEngineError):
                raise error.cause from None
            self._died(index, f"failed: {error.cause!r}", error)
        except ray.exceptions.RayActorError as error:
            self._died(index, "died", error)

    def _died(self, index: int, what: str, error: BaseException) -> NoReturn:
        path = self._logs[index]
        if path is None or not Path(path).exists():
            raise EngineDiedError(f"rollout engine {index} {what}; it writes to its actor's log") from error
        tail = "\n".join(Path(path).read_text(errors="replace").splitlines()[-_LOG_LINES:])
        raise EngineDiedError(f"rollout engine {index} {what}; the end of its log {path}:\n{tail}") from error

    async def generate(
        self,
        prompts: Sequence[Prompt],
        epochs: Sequence[int],
        *,
        n: int,
        sampling: SamplingConfig,
        max_tokens: int,
    ) -> AsyncIterator[Sample]:
        """Samples of all engines as they finish; arguments and errors as of `RolloutEngine.generate`.

        Closing the iterator early aborts what is still being generated.

        Raises:
            EngineDiedError: an engine is gone; with the end of its log.
        """
        finished: asyncio.Queue[Sample | None] = asyncio.Queue()

        async def pump(index: int, stream: Any) -> None:
            try:
                async for reference in stream:
                    finished.put_nowait(await self._translate(index, reference))
            finally:
                finished.put_nowait(None)

        streams = []
        for index, positions in enumerate(assign(len(prompts), len(self._engines))):
            if positions:
                method = self._engines[index].generate.options(num_returns="streaming")
                chosen = ([prompts[i] for i in positions], [epochs[i] for i in positions])
                streams.append((index, method.remote(*chosen, n=n, sampling=sampling, max_tokens=max_tokens)))
        pumps = [asyncio.ensure_future(pump(index, stream)) for index, stream in streams]
        try:
            for _ in pumps:
                while (sample := await finished.get()) is not None:
                    yield sample
                for task in pumps:
                    if task.done():
                        task.result()
        finally:
            await self._stop(streams, pumps)

    @staticmethod
    async def _stop(streams: list[tuple[int, Any]], pumps: Sequence[asyncio.Future[None]]) -> None:
        import ray

        for (_, stream), task in zip(streams, pumps, strict=True):
            if not task.done():
                ray.cancel(stream)  # the engine aborts the requests of a cancelled stream
                task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)

    async def pause(self) -> None:
        await self._all("pause")

    async def resume(self) -> None:
        await self._all("resume")

    async def versions(self) -> list[int]:
        """The version that each engine serves."""
        return await self._all("version")

    async def shutdown(self, timeout_s: float = 60.0) -> None:
        """Stop all engines, politely where they answer; then no actor and no process of theirs is left."""
        import ray

        calls = [self._call(i, "shutdown", timeout_s=timeout_s) for i in range(len(self._engines))]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        for engine in self._engines:
            ray.kill(engine)
        # An engine that died before has nothing left to stop: its guard saw to its processes.
        unexpected = [o for o in outcomes if isinstance(o, BaseException) and not isinstance(o, EngineDiedError)]
        if unexpected:
            raise unexpected[0]
