"""The driver's side of refits: one plan for all of them, and the order of the steps of each.

In: the policy's ranks and the engines, up. Out: engines that all serve one version of the policy's weights, or an error
and engines that serve nothing. The driver moves no weights: it tells ranks and workers what the plan has them do.

    pause -> [expose, pull] for each round, and exchange -> finish -> compare checksums -> reset -> commit
      any step fails: every engine gives the refit up and is stale; the group of those that exchange is made anew
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any

from megatron_fapo.config.weight_sync import WeightSyncConfig
from megatron_fapo.policy.group import PolicyGroup
from megatron_fapo.processes import ProcessDiedError
from megatron_fapo.rollout.pool import ABANDON_S, RolloutPool
from megatron_fapo.weight_sync.plan import Endpoint, Plan, make_plan
from megatron_fapo.weight_sync.protocol import RefitError, require_equal_sums, share_to_verify
from megatron_fapo.weight_sync.regions import Index
from megatron_fapo.weight_sync.share import Share, Terms, shares_of

log = logging.getLogger(__name__)
Exposures = list[tuple[int, dict[str, Any]]]
"""Numbers of policy ranks, and what each exposes (mapped.Exposure.to_wire)."""


class Refits:
    """All refits of a run. The plan is made at the first."""

    def __init__(
        self, policy: PolicyGroup, rollout: RolloutPool, config: WeightSyncConfig, *, offload: bool = False
    ) -> None:
        """
        Args:
            offload: the policy's tensors move between refits (`policy.offload`).
        """
        self._policy, self._rollout, self._config, self._offload = policy, rollout, config, offload
        self._plan: Plan | None = None
        self._members: list[int] = []
        self._joined = False
        self._done = 0

    async def refit(self, version: int) -> dict[str, float]:
        """Make every engine serve the policy's weights as `version`.

        Returns:
            Metrics `weight_sync/...`: bytes by link, and seconds by phase (the slowest process's).

        Raises:
            RefitError: with the reason; engines are stale, and a new refit may be tried.
        """
        seconds: dict[str, float] = {}
        if self._plan is None:
            async with _timed(seconds, "plan_s"):
                self._plan = await self._make_plan()
            log.info("refits were planned in %.2f s", seconds["plan_s"])
        began = time.monotonic()
        try:
            await asyncio.wait_for(self._whole(version, seconds), self._config.timeout_s)
        except BaseException as error:
            lost = await self._abandon()
            if lost is not None and isinstance(error, RefitError):
                raise lost from error  # its peers were heard of first
            if isinstance(error, TimeoutError):
                raise RefitError(
                    f"the refit to version {version} took more than {self._config.timeout_s:g} s"
                ) from error
            raise
        self._done += 1
        moved = self._plan.bytes_by_link()
        by_link = {f"{link}_bytes": float(size) for link, size in moved.items()}
        metrics = {"bytes": float(sum(moved.values()))} | by_link | seconds | {"total_s": time.monotonic() - began}
        return {f"weight_sync/{name}": value for name, value in metrics.items()}

    async def _make_plan(self) -> Plan:
        """Ask everybody what they hold and want, and give each its share of the plan.

        Raises:
            RefitError: a model that cannot be traced, or weights that policy and engines do not have in common.
        """
        held, wanted = await asyncio.gather(self._policy.source_indexes(), self._rollout.target_indexes())
        places = self._rollout.places
        known: dict[str, Index] = {}  # replicas have equal ones: hundreds of ranks, a handful of indexes

        def endpoint(place: tuple[str, str], text: str) -> Endpoint:
            if text not in known:
                known[text] = Index.from_json(text)
            return Endpoint(*place, known[text])

        sources = [endpoint(place, text) for place, text in zip(self._policy.places, held, strict=True)]
        workers = [
            [endpoint(place, text) for place, text in zip(*engine, strict=True)]
            for engine in zip(places, wanted, strict=True)
        ]
        plan = await asyncio.to_thread(make_plan, sources, [worker for engine in workers for worker in engine])
        everywhere = [*self._policy.places, *(place for engine in places for place in engine)]
        on_gpus = any(gpu for _, gpu in everywhere)
        node_messages = self._config.node_link == "message" or (self._config.node_link == "auto" and on_gpus)
        keep = on_gpus and not self._offload
        shares, self._members = shares_of(plan, Terms(node_messages, self._config.bucket_mb * 2**20, keep), everywhere)
        texts = [share.to_json() for share in shares]
        self._engine_of = [i for i, engine in enumerate(workers) for _ in engine]
        of_engines: list[list[str]] = [[] for _ in workers]
        for number, engine in enumerate(self._engine_of):
            of_engines[engine].append(texts[plan.sources + number])
        rounds, _ = await asyncio.gather(
            self._policy.take_shares(texts[: plan.sources]), self._rollout.take_shares(of_engines)
        )
        self._givers = sorted({hop.giver for hop in plan.hops if hop.depth == 0})
        self._maps: dict[int, set[int]] = {}
        """Of each engine that copies out of mapped memory, the policy ranks whose it is."""
        self._sends: dict[int, set[int]] = {}
        """Of each engine whose workers send for policy ranks, these."""
        for engine, share in zip(self._engine_of, shares[plan.sources :], strict=True):
            self._maps.setdefault(engine, set()).update(hop.giver for hop in share.mapped)
            if share.stands_for is not None:
                self._sends.setdefault(engine, set()).add(share.stands_for)
        mapping = Counter(giver for share in shares[plan.sources :] for giver in _maps(share))
        self._one_taker = all(count == 1 for count in mapping.values())
        """Of each policy rank's memory."""
        self._rounds = [[i for i in self._givers if number < rounds[i]] for number in range(max(rounds))]
        moved = ", ".join(f"{link} {size / 1e6:,.1f} MB" for link, size in plan.bytes_by_link().items() if size)
        log.info("refits move %s, %.3f of the minimum, in %d hops", moved, plan.bytes_over_minimum, len(plan.hops))
        self._taken = [sum(len(plan.parts[i].copies) for i in parts) for parts in _parts_taken(plan)]
        return plan

    async def _whole(self, version: int, seconds: dict[str, float]) -> None:
        share = share_to_verify(self._done, self._config.verify_every, self._config.verify_share)
        seconds["pause_s"] = max(await self._rollout.refit_step("begin_refit", version, share, self._config.in_flight))
        async with _timed(seconds, "open_s"):
            await self._join()
            await self._policy.weights("open", self._givers, version, share)
        async with _timed(seconds, "transfer_s"):
            # Told at the first failure: else those that wait for who failed would wait until the time-out.
            seconds["expose_s"] = 0.0
            first = await self._expose(0, seconds) if self._rounds else []
            await _together(self._map(first, seconds), *self._exchange(first), on_failure=self._abandon)
        async with _timed(seconds, "finish_s"):
            found = [worker for engine in await self._rollout.refit_step("finish_refit") for worker in engine]
        seconds["load_s"] = max(load_s for load_s, _ in found)
        async with _timed(seconds, "verify_s"):
            given = await self._policy.weights("sums", self._givers)
            require_equal_sums(given, [sums for _, sums in found], self._taken if share == 1 else None)
            await self._policy.weights("conceal", self._givers, self._one_taker)
        seconds["reset_s"] = max(await self._rollout.refit_step("reset_refit", version))
        async with _timed(seconds, "resume_s"):
            await self._rollout.refit_step("commit_refit", version)

    async def _expose(self, number: int, seconds: dict[str, float]) -> Exposures:
        began = time.monotonic()
        exposures = await self._policy.weights("expose", self._rounds[number], number)
        seconds["expose_s"] += time.monotonic() - began
        return list(zip(self._rounds[number], exposures, strict=True))

    async def _map(self, exposures: Exposures, seconds: dict[str, float]) -> None:
        """Rounds of tensors that are exposed; on CPUs the next are mirrored while engines copy these."""
        for number in range(len(self._rounds)):
            last = number + 1 == len(self._rounds)
            upcoming = None if last else asyncio.ensure_future(self._expose(number + 1, seconds))
            try:
                mine = {engine: _of(exposures, givers) for engine, givers in self._maps.items()}
                await self._rollout.refit_each("pull", {engine: (found,) for engine, found in mine.items() if found})
            except BaseException:
                if upcoming is not None:
                    upcoming.cancel()
                raise
            exposures = [] if upcoming is None else await upcoming

    def _exchange(self, exposures: Exposures) -> list[Awaitable[Any]]:
        if not self._members:
            return []
        sends = {engine: (_of(exposures, self._sends.get(engine, ())),) for engine in self._of_engines}
        return [self._policy.weights("exchange", self._of_policy), self._rollout.refit_each("exchange", sends)]

    @property
    def _of_policy(self) -> list[int]:
        assert self._plan is not None
        return [process for process in self._members if process < self._plan.sources]

    @property
    def _of_engines(self) -> list[int]:
        """Engines with workers that exchange."""
        assert self._plan is not None
        sources = self._plan.sources
        return sorted({self._engine_of[process - sources] for process in self._members if process >= sources})

    async def _join(self) -> None:
        """Make the group of those that exchange, unless it is there."""
        if self._joined or not self._members:
            return
        store = await self._policy.open_group(0)
        where = (store, self._members, self._config.timeout_s)
        work = self._policy.join(self._of_policy, *where), self._rollout.join(self._of_engines, *where)
        await _together(*work, on_failure=self._abandon)
        self._joined = True

    async def _abandon(self) -> ProcessDiedError | None:
        """Have everybody give the refit up; returns the end of a process that is gone."""
        self._joined = False
        lost: ProcessDiedError | None = await self._rollout.abandon_refit()
        try:
            await asyncio.wait_for(self._policy.weights("conceal", self._givers, False), ABANDON_S)
        except ProcessDiedError as error:
            return lost or (error if error.lost else None)
        except TimeoutError:
            log.warning("the policy's ranks do not answer: what engines mapped of their memory may be lost to them")
        return lost


def _maps(share: Share) -> set[int]:
    """The policy ranks whose memory a worker maps."""
    own = {hop.giver for hop in share.mapped}
    return own if share.stands_for is None else own | {share.stands_for}


def _parts_taken(plan: Plan) -> list[list[int]]:
    """Of every worker, the parts that it is given."""
    taken: list[list[int]] = [[] for _ in range(plan.targets)]
    for hop in plan.hops:
        taken[hop.taker - plan.sources].append(hop.part)
    return taken


def _of(exposures: Exposures, givers: Collection[int]) -> Exposures:
    return [each for each in exposures if each[0] in givers]


async def _together(*work: Awaitable[Any], on_failure: Callable[[], Awaitable[Any]] | None = None) -> None:
    """Everything at once. The first error is raised when all have ended: another refit must find them idle.

    Args:
        on_failure: called at the first error.
    """
    errors: list[Exception] = []

    async def watched(each: Awaitable[Any]) -> None:
        try:
            await each
        except Exception as error:
            errors.append(error)
            if on_failure is not None and len(errors) == 1:
                await on_failure()

    try:
        await asyncio.gather(*map(watched, work))
    finally:  # a time-out must not hide why some waited
        if errors:
            raise errors[0]


@asynccontextmanager
async def _timed(seconds: dict[str, float], name: str) -> AsyncIterator[None]:
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began
