"""The driver's side of the rollout engines: one stream of samples out of several engines.

In: prompts. Out: samples of all engines, each as soon as it is finished. Which engine takes which prompt depends on
positions alone (`sampling.assign`), so a run can be repeated.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_fapo.config.rollout import SamplingConfig
from megatron_fapo.data.records import Prompt, Sample
from megatron_fapo.errors import UserError
from megatron_fapo.rollout.engine import EngineDiedError
from megatron_fapo.rollout.sampling import assign
from megatron_fapo.weight_sync.protocol import Bucket, RefitError, StaleEngineError

BucketSource = Callable[[], Awaitable[Bucket | None]]

_LOG_LINES = 30


def _first(error: BaseException) -> BaseException:
    """The cause in a task group's bundle: its siblings were only cancelled."""
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


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
    ) -> AsyncGenerator[Sample]:
        """Samples of all engines as they finish; arguments and errors as of `RolloutEngine.generate`.

        Closing the iterator early aborts what is still being generated.

        Raises:
            EngineDiedError: an engine is gone; with the end of its log.
        """
        finished: asyncio.Queue[Sample | Exception | None] = asyncio.Queue()

        async def pump(index: int, stream: Any) -> None:
            try:
                async for reference in stream:
                    finished.put_nowait(await self._translate(index, reference))
                finished.put_nowait(None)
            except Exception as error:
                finished.put_nowait(error)

        streams = []
        for index, positions in enumerate(assign(len(prompts), len(self._engines))):
            if positions:
                method = self._engines[index].generate.options(num_returns="streaming")
                chosen = ([prompts[i] for i in positions], [epochs[i] for i in positions])
                streams.append((index, method.remote(*chosen, n=n, sampling=sampling, max_tokens=max_tokens)))
        pumps = [asyncio.ensure_future(pump(index, stream)) for index, stream in streams]
        try:
            for _ in pumps:
                while (item := await finished.get()) is not None:
                    if isinstance(item, Exception):
                        raise item
                    yield item
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

    async def refit(self, sources: Sequence[BucketSource], version: int, *, timeout_s: float) -> dict[str, float]:
        """Put new weights into every engine: all of them complete and serve `version`, or the call fails.

        Args:
            sources: one per policy rank that takes part: gives its next bucket, then None. Called again while the
                engines load the bucket before (`WeightSender.next` allows that).

        Returns:
            Metrics `weight_sync/...`: bytes, buckets, and seconds by phase (the slowest engine's).

        Raises:
            RefitError: with the reason; engines that did not complete are stale, and a new refit may be tried.
        """
        began = time.monotonic()
        totals: list[dict[str, float]] = [{} for _ in self._engines]
        sent = {"bytes": 0.0, "buckets": 0.0, "pack_s": 0.0}

        async def on_all(method: str, *args: Any) -> None:
            for total, seconds in zip(totals, await self._all(method, *args), strict=True):
                for name, value in seconds.items():
                    total[name] = total.get(name, 0.0) + value

        async def drain(source: BucketSource) -> None:
            bucket = await source()
            while bucket is not None:
                upcoming = asyncio.ensure_future(source())
                try:
                    await on_all("load_bucket", bucket)
                except BaseException:
                    upcoming.cancel()
                    raise
                sent["bytes"] += sum(entry.nbytes for entry in bucket.entries)
                sent["buckets"] += 1
                sent["pack_s"] += bucket.pack_s
                bucket = await upcoming

        async def whole() -> None:
            await on_all("begin_refit")
            async with asyncio.TaskGroup() as group:
                for source in sources:
                    group.create_task(drain(source))
            await on_all("finish_refit", version)

        try:
            await asyncio.wait_for(whole(), timeout_s)
        except BaseException as error:
            await self._abandon_refit()
            if isinstance(error, TimeoutError):
                raise RefitError(f"the refit to version {version} took more than {timeout_s} s") from error
            raise _first(error) from None
        slowest = {name: max(total[name] for total in totals) for name in totals[0]}
        metrics = slowest | sent | {"total_s": time.monotonic() - began}
        return {f"weight_sync/{name}": value for name, value in metrics.items()}

    async def _abandon_refit(self) -> None:
        calls = [self._call(i, "abort_refit") for i in range(len(self._engines))]
        await asyncio.gather(*calls, return_exceptions=True)  # the refit's own error is the one to report

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
