"""The engine's side of refits: its version, and what it asks of vLLM's workers, step by step.

The driver asks for the steps in their order (`training/refit.py`); a step that fails leaves the engine stale.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from megatron_fapo.config.rollout import RolloutConfig
from megatron_fapo.weight_sync.protocol import EngineState, EngineVersion, RefitError


class VLLMDiedError(RuntimeError):
    """vLLM's own processes have ended, and with them the engine, though its actor lives."""


class Refitted(ABC):
    """The part of a RolloutEngine that takes new weights."""

    config: RolloutConfig
    _llm: Any
    _version: EngineVersion
    _checkpoint: dict[str, tuple[int, ...]]
    """HF name -> shape, of all that refits bring."""
    _admission: asyncio.Lock
    _active: dict[str, tuple[tuple[int, int], ...]]
    """Request -> (first token, version) of each version that it comes from."""
    _store: tuple[str, int] | None = None
    """Where the group meets that exchanges weights."""

    @abstractmethod
    async def pause(self) -> None:
        """Freeze generation."""

    @abstractmethod
    async def resume(self) -> None:
        """Let it go on."""

    @abstractmethod
    async def _ask(self, call: Coroutine[Any, Any, Any]) -> Any:
        """Await a call to vLLM's core."""

    async def target_indexes(self) -> list[str]:
        """What every worker of this engine wants of the HF checkpoint: an `Index` as JSON each.

        Raises:
            RefitError: vLLM's loader of this model cannot be traced; names the parameter.
        """
        shapes = {name: list(shape) for name, shape in self._checkpoint.items()}
        return await self._workers("refit_index", shapes)

    async def take_shares(self, shares: Sequence[str]) -> None:
        """Give every worker its share of the plan of refits, as JSON."""
        await self._workers("refit_take", list(shares))

    async def join(self, store: tuple[str, int], members: Sequence[int], address: str, timeout_s: float) -> None:
        """Enter the group of those that exchange weights; collective over all of it."""
        self._store = store
        await self._workers("refit_join", list(store), list(members), address, timeout_s)

    async def begin_refit(self, version: int, share: float, in_flight: bool = False) -> float:
        """Stop serving and make ready for new weights. Returns seconds.

        Args:
            share: of what arrives, whose checksums `finish_refit` returns.
            in_flight: samples in flight wait for the new weights and go on with them.

        Raises:
            RefitError: samples are in flight and may not be, or a refit is under way.
        """
        async with self._admission:
            if self._active and not in_flight:
                raise RefitError(f"{len(self._active)} samples are in flight: they would come from two versions")
            self._version.begin()

        async def pause_and_begin() -> None:
            await self.pause()
            await self._workers("refit_begin", version, share)

        return await self._refit_step(pause_and_begin)

    async def pull(self, exposures: Sequence[tuple[int, dict[str, Any]]]) -> None:
        """Copy what the plan takes from the tensors that policy ranks of this node expose, by number of the rank. When
        it returns, they may expose others.

        Raises:
            RefitError: no refit is under way, or the memory cannot be mapped; the engine is then stale.
        """
        self._version.require_updating()
        await self._refit_step(lambda: self._workers("refit_pull", [list(each) for each in exposures]))

    async def exchange(self, exposures: Sequence[tuple[int, dict[str, Any]]] = ()) -> None:
        """Receive what the plan sends here, and pass on what it takes from here. Collective over the group.

        Args:
            exposures: of policy ranks that workers of this engine send for, as of `pull`.

        Raises:
            RefitError: no refit is under way, or a member of the group failed; the engine is then stale.
        """
        self._version.require_updating()
        await self._refit_step(lambda: self._workers("refit_exchange", [list(each) for each in exposures]))

    async def finish_refit(self) -> list[tuple[float, list[tuple[int, int, int, int]]]]:
        """Let vLLM do what its kernels need, once all weights are there. Returns of every worker the seconds of that in
        the whole refit, and checksums of what arrived (checks.Sums.read).

        Raises:
            RefitError: no refit is under way, or weights are missing; the engine is then stale.
        """
        self._version.require_updating()
        found: list[Any] = []

        async def finish() -> None:
            found.extend(await self._workers("refit_finish"))

        await self._refit_step(finish)
        return [(seconds, [tuple(sum_) for sum_ in sums]) for seconds, sums in found]

    async def reset_refit(self, version: int) -> float:
        """The weights are proven: forget what was computed with others. Returns seconds.

        Raises:
            RefitError: no refit is under way, or the prefix cache keeps keys and values of the old weights.
        """
        self._version.require_updating()

        async def reset() -> None:
            # Samples in flight lose their keys and values too: the new weights read what they said so far.
            if not await self._ask(self._llm.reset_prefix_cache(reset_running_requests=True)):
                raise RefitError("the prefix cache could not be reset: it would serve the old weights' keys and values")
            await self._turn_in_flight(version)

        return await self._refit_step(reset)

    async def commit_refit(self, version: int) -> None:
        """Every engine is ready: serve `version` from here on."""
        self._version.complete(version)
        await self.resume()

    async def _turn_in_flight(self, version: int) -> None:
        """Note of every sample in flight the token from which on it comes from `version`. Generation is paused."""
        # All tokens came before the answer to the pause, but vLLM takes those of one step in parts and lets others run
        # in between: 128 of 360 samples were seen to be a token behind.
        for _ in range((self._llm.engine_core.outputs_queue.qsize() + 1) * self.config.max_num_seqs):
            await asyncio.sleep(0)
        states = self._llm.output_processor.request_states
        for request, starts in self._active.items():
            if request in states:  # else it has ended, and its sample is about to be taken
                tokens = states[request].detokenizer.num_output_tokens()
                self._active[request] = (*(start for start in starts if start[0] < tokens), (tokens, version))

    async def abort_refit(self) -> None:
        """Give an unfinished refit up, if one has begun. The engine stays stale until a whole refit succeeds.

        Raises:
            VLLMDiedError: it cannot.
        """
        if self._version.state is EngineState.FRESH:
            return
        self._version.fail()
        if self._store is not None:
            from megatron_fapo.weight_sync.exchange import abort

            await asyncio.to_thread(abort, self._store)  # a worker that waits for a member that failed
            self._store = None
        if self._llm.errored:
            raise VLLMDiedError("vLLM ended during a refit")
        await self._workers("refit_abort")

    async def _workers(self, method: str, *args: Any) -> list[Any]:
        """Call a method of RefitReceiver in every worker; results in order of their ranks.

        Raises:
            RefitError: what went wrong in any of them.
        """
        answers = await self._ask(self._llm.collective_rpc(method, args=args))
        if wrong := dict.fromkeys(text for text, _ in answers if text):
            raise RefitError("; ".join(wrong))
        return [found for _, found in answers]

    async def _refit_step(self, step: Callable[[], Awaitable[Any]]) -> float:
        began = time.monotonic()
        try:
            await step()
        except BaseException as error:
            self._version.fail()
            if not isinstance(error, Exception):
                raise
            if self._llm.errored:
                raise VLLMDiedError(f"vLLM ended during a refit: {error}") from error
            raise RefitError(f"{error}; the engine is stale and serves nothing until a refit succeeds") from error
        return time.monotonic() - began
