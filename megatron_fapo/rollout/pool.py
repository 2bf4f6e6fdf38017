"""The driver's side of the rollout engines: one stream of samples out of several engines.

In: prompts. Out: samples of all engines, each as soon as it is finished. Which engine takes which prompt depends on
positions alone (`sampling.assign`), so a run can be repeated.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from megatron_fapo.config.rollout import SamplingConfig
from megatron_fapo.data.records import Prompt, Sample, SampleKey
from megatron_fapo.errors import UserError
from megatron_fapo.observe.stall import WAITS
from megatron_fapo.observe.trace import TRACER
from megatron_fapo.processes import HERE, Node, Process, how_lost, is_lost
from megatron_fapo.rollout.engine import EngineDiedError, VLLMDiedError
from megatron_fapo.rollout.sampling import assign
from megatron_fapo.weight_sync.protocol import RefitError, StaleEngineError

log = logging.getLogger(__name__)

ABANDON_S = 30.0
"""For an engine to give up a refit; one that hangs must not keep its error from being raised."""


class RolloutPool:
    """Handles of `RolloutEngine` actors, and the log file of each."""

    def __init__(self, engines: Sequence[Any], log_paths: Sequence[str | None], nodes: Sequence[Node] = ()) -> None:
        """
        Args:
            engines: Ray actor handles of RolloutEngine.
            log_paths: where each engine writes, for the messages of errors.
            nodes: where each engine is; none: all beside the driver.
        """
        self._engines = list(engines)
        paths = [None if path is None else Path(path) for path in log_paths]
        where = nodes or [HERE] * len(paths)
        self._processes = [Process("rollout", i, *place) for i, place in enumerate(zip(where, paths, strict=True))]
        self._facts: list[dict[str, Any]] = []

    async def start(self, version: int = 0, *, timeout_s: float = 600.0) -> list[dict[str, Any]]:
        """Start all engines at once; returns the facts of each (`RolloutEngine.start`).

        Raises:
            EngineDiedError: an engine did not start in time, or died; with the end of its log.
        """
        self._facts = await self._all("start", version, timeout_s=timeout_s)
        pids = [facts.get("pid") for facts in self._facts]
        self._processes = [replace(process, pid=pid) for process, pid in zip(self._processes, pids, strict=True)]
        for process, facts in zip(self._processes, self._facts, strict=True):
            TRACER.register(process, facts.get("cards", ()))
        return self._facts

    @property
    def places(self) -> list[list[tuple[str, str]]]:
        """Of every worker of every engine, once they are up: Ray's id of its node, and the UUID of its GPU, empty on
        CPUs."""
        pairs = zip(self._processes, self._facts, strict=True)
        return [[(process.node.id, gpu) for gpu in facts["gpus"]] for process, facts in pairs]

    @property
    def cards(self) -> list[str]:
        """Ray's ids of the engines' GPUs, engine after engine, once they are up; none on CPUs."""
        return [card for facts in self._facts for card in facts["cards"]]

    async def _all(self, method: str, *args: Any, timeout_s: float | None = None) -> list[Any]:
        calls = [self._call(i, method, *args, timeout_s=timeout_s) for i in range(len(self._engines))]
        return await asyncio.gather(*calls)

    async def _call(self, index: int, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        with WAITS.on(f"rollout.{method}", self._processes[index]):
            return await self._translate(index, getattr(self._engines[index], method).remote(*args), timeout_s)

    async def _translate(self, index: int, reference: Awaitable[Any], timeout_s: float | None = None) -> Any:
        """Await what an engine answers; Ray's errors become ours."""
        import ray.exceptions

        try:
            return await asyncio.wait_for(reference, timeout_s)
        except TimeoutError as error:
            # A node that hangs or is slow: another attempt may get another.
            self._died(index, f"did not answer within {timeout_s} s", error, lost=True)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, UserError | RefitError | StaleEngineError):
                raise cause from None
            gone = isinstance(cause, VLLMDiedError)
            self._died(index, "its vLLM processes are gone" if gone else f"failed: {cause!r}", error, lost=gone)
        except ray.exceptions.RayError as error:
            lost = is_lost(error)
            if not lost and not isinstance(error, ray.exceptions.RayActorError):
                raise
            what = await how_lost(self._processes[index].node, error) if lost else "could not be made"
            self._died(index, what, error, lost=lost)

    def _died(self, index: int, what: str, error: BaseException, *, lost: bool) -> NoReturn:
        raise EngineDiedError(self._processes[index], what, lost=lost, detail=str(error)) from error

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

        async def pump(index: int, stream: Any, keys: list[SampleKey]) -> None:
            try:
                with WAITS.on("rollout", self._processes[index], left=keys) as wait:
                    async for reference in stream:
                        sample = await self._translate(index, reference)
                        WAITS.came(wait, sample.key, len(sample.token_ids))
                        finished.put_nowait(sample)
                finished.put_nowait(None)
            except Exception as error:
                finished.put_nowait(error)

        streams, keys = [], []
        for index, positions in enumerate(assign(len(prompts), len(self._engines))):
            if positions:
                method = self._engines[index].generate.options(num_returns="streaming")
                chosen = ([prompts[i] for i in positions], [epochs[i] for i in positions])
                streams.append((index, method.remote(*chosen, n=n, sampling=sampling, max_tokens=max_tokens)))
                keys.append([SampleKey(prompts[i].prompt_id, epochs[i], k) for i in positions for k in range(n)])
        pumps = [asyncio.ensure_future(pump(*each, of_one)) for each, of_one in zip(streams, keys, strict=True)]
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

    async def target_indexes(self) -> list[list[str]]:
        """What the workers of every engine want of the HF checkpoint (RolloutEngine.target_indexes)."""
        return await self._all("target_indexes")

    async def take_shares(self, shares: Sequence[Sequence[str]]) -> None:
        """Give the workers of every engine their shares of the plan of refits."""
        await asyncio.gather(*(self._call(i, "take_shares", list(mine)) for i, mine in enumerate(shares)))

    async def join(
        self, engines: Sequence[int], store: tuple[str, int], members: Sequence[int], timeout_s: float
    ) -> None:
        """Have engines enter the group of those that exchange weights."""
        addresses = {i: self._processes[i].node.address for i in engines}
        await self.refit_each("join", {i: (store, members, addresses[i], timeout_s) for i in engines})

    async def refit_step(self, method: str, *args: Any) -> list[Any]:
        """A step of a refit on all engines: a method of RolloutEngine.

        Raises:
            RefitError: what it raises.
        """
        return await self.refit_each(method, dict.fromkeys(range(len(self._engines)), args))

    async def refit_each(self, method: str, arguments: Mapping[int, Sequence[Any]]) -> list[Any]:
        """The same on some engines, each with its own arguments."""
        return await asyncio.gather(*(self._call(engine, method, *args) for engine, args in arguments.items()))

    async def abandon_refit(self) -> EngineDiedError | None:
        """Have every engine give an unfinished refit up, as far as they answer; returns the end of one that is gone,
        which others may have been heard to fail of before."""
        calls = [self._call(i, "abort_refit", timeout_s=ABANDON_S) for i in range(len(self._engines))]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        return next((error for error in outcomes if isinstance(error, EngineDiedError) and error.lost), None)

    async def sleep(self, *, keep_weights: bool = False) -> None:
        """Every engine gives its memory back and serves nothing until `wake`, and a refit unless its weights are kept
        in host memory. One that is gone has none: whatever needs it next reports it."""
        calls = [self._call(i, "sleep", keep_weights) for i in range(len(self._engines))]
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(outcome, EngineDiedError):
                log.warning("%s", outcome)
            elif isinstance(outcome, BaseException):
                raise outcome

    async def wake(self, tags: Sequence[str]) -> None:
        """Every engine takes the memory of `tags` again (engine.MEMORY), those too that come after one that cannot."""
        calls = [self._call(i, "wake", tags) for i in range(len(self._engines))]
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

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
