"""The driver's side of the policy: all ranks as one object.

In: samples of a step. Out: log-probabilities in the same order, or the metrics of an optimizer update.
The group deals samples over micro-batches of data-parallel replicas; ranks of one replica all get the same samples.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_fapo.algorithm.loss import finish_token_sums
from megatron_fapo.checksums import FileSum
from megatron_fapo.config.root import Config
from megatron_fapo.errors import UserError
from megatron_fapo.observe.stall import WAITS
from megatron_fapo.observe.trace import TRACER, Told
from megatron_fapo.policy.actor import copy_model_files
from megatron_fapo.policy.batch import Numbers, TrainSample
from megatron_fapo.policy.checkpoint import Part
from megatron_fapo.policy.hf_config import read_model_shape
from megatron_fapo.policy.hf_weights import write_index
from megatron_fapo.policy.packing import CostModel, Schedule, schedule_for
from megatron_fapo.policy.parallel import Rank
from megatron_fapo.policy.worker import SUPERVISED, ByMicroBatch
from megatron_fapo.processes import HERE, Node, Process, ProcessDiedError, how_lost, is_lost
from megatron_fapo.weight_sync.protocol import RefitError

_PROCESS_GRACE_S, _NODE_GRACE_S = 5.0, 40.0
"""How long Ray takes to tell of a dead process, and of a dead node (missed health checks)."""


class PolicyDiedError(ProcessDiedError):
    """A policy rank failed or its process is gone."""


@dataclass(frozen=True)
class Update:
    """What one optimizer update has found."""

    metrics: dict[str, float]
    """`policy/...`."""
    logprobs: list[Numbers]
    """Of every sample as the policy had them before the update, if none came with old ones; else []."""


class PolicyGroup:
    """Handles of `PolicyActor`, one per rank, in rank order."""

    def __init__(self, actors: Sequence[Any], config: Config, logs: Sequence[Path], nodes: Sequence[Node] = ()) -> None:
        """
        Args:
            logs: where each rank writes.
            nodes: where each rank is; none: all beside the driver.
        """
        self._actors, self._config = list(actors), config
        where = nodes or [HERE] * len(actors)
        self._several_nodes = len({node.id for node in where}) > 1
        self._ranks = [Process("policy", i, *place) for i, place in enumerate(zip(where, logs, strict=True))]
        self._facts: list[dict[str, Any]] = []

    async def start(self, *, device: str, dtype: str, timeout_s: float = 600.0) -> None:
        """Build the model on every rank and connect the ranks.

        Raises:
            PolicyDiedError: a rank failed, is gone, or they are not up within `timeout_s`.
        """
        try:
            await asyncio.wait_for(self._start(device, dtype), timeout_s)
        except TimeoutError as error:
            what = f"the policy's ranks were not up within {timeout_s:g} s"
            # A node that hangs or is slow: another attempt may get another.
            raise PolicyDiedError(self._ranks[0], what, lost=True) from error

    async def _start(self, device: str, dtype: str) -> None:
        ((address, port),) = await self._gather("start", [self._actors[0].address.remote()], [0])
        options = {
            "in_cluster": bool(os.environ.get("RAY_ADDRESS")),
            "device": device,
            "dtype": dtype,
            "seed": self._config.seed,
            "temperature": self._config.rollout.sampling.temperature,
        }
        ranks = [Rank(i, len(self._actors), address, port) for i in range(len(self._actors))]
        calls = [
            actor.join.remote(rank, self._config.policy, self._config.algorithm, options)
            for actor, rank in zip(self._actors, ranks, strict=True)
        ]
        self._facts = await self._gather("start", calls)
        self._ranks = [replace(rank, pid=facts["pid"]) for rank, facts in zip(self._ranks, self._facts, strict=True)]
        for rank, facts in zip(self._ranks, self._facts, strict=True):
            TRACER.register(rank, facts["cards"])

    @property
    def places(self) -> list[tuple[str, str]]:
        """Of every rank: Ray's id of its node, and the UUID of its GPU, empty on CPUs."""
        return [(rank.node.id, str(facts["gpu"])) for rank, facts in zip(self._ranks, self._facts, strict=True)]

    def cards(self, gpus: int) -> list[list[str]]:
        """Ray's ids of the GPUs of each `gpus` consecutive ranks; none on CPUs."""
        cards = [card for facts in self._facts for card in facts["cards"]]
        return [cards[i : i + gpus] for i in range(0, len(cards) - gpus + 1, gpus)]

    async def enter(self, phase: str) -> dict[str, float]:
        """Have on every rank's device what the phase of memory.PLAN needs; returns the ledger, the largest of all ranks
        in each entry."""
        ledgers = await self._gather("memory", [actor.enter.remote(phase) for actor in self._actors])
        return {name: max(ledger[name] for ledger in ledgers) for name in ledgers[0]}

    async def logprobs(self, samples: Sequence[TrainSample], *, reference: bool = False) -> list[Numbers]:
        """Log-probabilities of the response tokens, one array per sample, in order."""
        plan = self._schedule(samples, self._config.policy.logprob_micro_batch_tokens)
        calls = [
            actor.logprobs.remote(packs, reference)
            for actor, packs in zip(self._actors, self._put(samples, plan), strict=True)
        ]
        return self._in_order(plan, await self._gather("logprobs", calls))

    def _in_order(self, plan: Schedule, results: Sequence[ByMicroBatch | None]) -> list[Numbers]:
        """Of every sample what a rank that reports has found."""
        found: dict[int, Numbers] = {}
        for facts, result in zip(self._facts, results, strict=True):
            if result is not None:
                for part, values in zip(plan.micro_batches[facts["data_rank"]], result, strict=True):
                    found |= zip(part, values, strict=True)
        return [found[i] for i in range(len(found))]

    async def train(self, samples: Sequence[TrainSample], *, loss: str = "policy") -> Update:
        """One optimizer update on one global mini-batch. Samples without old log-probabilities are taken to have been
        sampled by the weights as they are: the first update of a step needs none."""
        plan = self._schedule(samples, self._config.policy.micro_batch_tokens)
        packs = self._put(samples, plan)
        calls = [actor.train.remote(mine, loss) for actor, mine in zip(self._actors, packs, strict=True)]
        results = await self._gather("train", calls)
        sums: dict[str, float] = {}
        for facts, result in zip(self._facts, results, strict=True):
            if facts["reports"]:
                for name, value in result.token_sums.items():
                    sums[name] = sums.get(name, 0.0) + value
        metrics = {"policy/grad_norm": results[0].grad_norm, "policy/lr": results[0].lr}
        if loss == SUPERVISED:
            return Update(metrics | {"policy/supervised_loss": sums["supervised_loss"] / max(sums["tokens"], 1.0)}, [])
        logprobs = self._in_order(plan, [result.logprobs for result in results])
        return Update(metrics | finish_token_sums(sums), logprobs)

    def _schedule(self, samples: Sequence[TrainSample], max_tokens: int) -> Schedule:
        return schedule_for(self._config.policy.parallel, self._cost, [s.tokens for s in samples], max_tokens)

    @cached_property
    def _cost(self) -> CostModel:
        cfg = self._config.policy
        return CostModel.from_shape(read_model_shape(cfg.model_path, cfg.max_position_embeddings))

    def _put(self, samples: Sequence[TrainSample], plan: Schedule) -> list[Any]:
        """The micro-batches of each data-parallel replica once into the object store; one reference per rank."""
        import ray

        # As one string: Ray would send each array of each sample as a buffer of its own, which takes longer.
        packs = [[[samples[i] for i in part] for part in rank] for rank in plan.micro_batches]
        refs = [ray.put(pickle.dumps(each, protocol=5)) for each in packs]
        return [refs[facts["data_rank"]] for facts in self._facts]

    async def profile(self, step: int | None) -> None:
        """Have every rank record its kernels from now on, or write what it has recorded (PolicyActor.profile)."""
        await self._gather("profile", [actor.profile.remote(step) for actor in self._actors])

    async def save(self, directory: Path) -> None:
        """Copy weights, optimizer, schedule and random state, and begin to write them; `saved` says when they are.

        What describes the model goes beside them.
        """
        await self._gather("save", [actor.save.remote(str(directory)) for actor in self._actors])
        self._copy_model_files(directory / "hf")

    async def saved(self) -> dict[str, FileSum]:
        """Wait until all ranks have written, then complete the directory; returns what they wrote, by name.

        Ranks are asked rather than awaited: one that trains answers when it is done, and is not kept from training.

        Raises:
            CheckpointError: a rank could not write.
        """
        parts: dict[int, Part] = {}
        pause_s = 0.05
        with WAITS.on("policy.saved", "the ranks that write a checkpoint"):
            while missing := [i for i in range(len(self._actors)) if i not in parts]:
                calls = [self._actors[i].saved.remote() for i in missing]
                # Each question would count as progress: while ranks answer, no stall of anything else would be seen.
                found = await self._gather("saved", calls, missing, watched=False)
                parts |= {i: part for i, part in zip(missing, found, strict=True) if part is not None}
                await asyncio.sleep(0 if len(parts) == len(self._actors) else pause_s)
                pause_s = min(2 * pause_s, 2.0)
        call = self._actors[0].complete_save.remote([parts[i] for i in range(len(parts))])
        files: dict[str, FileSum] = (await self._gather("saved", [call], [0]))[0]
        return files

    async def verify(self, directory: Path, files: dict[str, str]) -> list[str]:
        """What is wrong with files of a checkpoint, each read by one rank; [] when nothing is.

        Args:
            files: SHA-256 by name, relative to `directory`.
        """
        ranks = len(self._actors)
        calls = [actor.verify.remote(str(directory), files, ranks) for actor in self._actors]
        return [problem for found in await self._gather("verify", calls) for problem in found]

    async def load(self, directory: Path) -> None:
        """Restore what `save` wrote, whatever layout saved it."""
        await self._gather("load", [actor.load.remote(str(directory)) for actor in self._actors])

    async def export(self, directory: Path) -> None:
        """Write an HF checkpoint that vLLM and transformers load."""
        self._copy_model_files(directory)
        replica = [i for i, facts in enumerate(self._facts) if facts["exports"]]
        calls = [self._actors[i].export.remote(str(directory)) for i in replica]
        names = await self._gather("export", calls, replica)
        write_index(directory, [n for n in names if n])

    def _copy_model_files(self, directory: Path) -> None:
        cfg = self._config.policy
        copy_model_files(Path(cfg.model_path), directory, cfg.max_position_embeddings)

    async def source_indexes(self) -> list[str]:
        """What every rank holds of the HF checkpoint (PolicyActor.source_index)."""
        return await self._gather("source_index", [actor.source_index.remote() for actor in self._actors])

    async def take_shares(self, shares: Sequence[str]) -> list[int]:
        """Give every rank its share of the plan of refits; returns the number of rounds of each."""
        calls = [actor.take_share.remote(share) for actor, share in zip(self._actors, shares, strict=True)]
        return await self._gather("take_share", calls)

    async def open_group(self, rank: int) -> tuple[str, int]:
        """Where those that exchange weights meet, kept by this rank."""
        call = self._actors[rank].open_group.remote(self._ranks[rank].node.address)
        where: tuple[str, int] = (await self._gather("open_group", [call], [rank]))[0]
        return where

    async def weights(self, what: str, ranks: Sequence[int], *args: Any) -> list[Any]:
        """A step of a refit on some ranks: a method of WeightSource, with the same arguments for all.

        Raises:
            RefitError: what the method raises.
        """
        return await self._gather(what, [self._actors[i].weights.remote(what, *args) for i in ranks], ranks)

    async def join(
        self, ranks: Sequence[int], store: tuple[str, int], members: Sequence[int], timeout_s: float
    ) -> None:
        """Enter the group of those that exchange weights."""
        calls = [
            self._actors[i].weights.remote("join", store, members, self._ranks[i].node.address, timeout_s)
            for i in ranks
        ]
        await self._gather("join", calls, ranks)

    async def _gather(
        self, what: str, calls: Sequence[Any], ranks: Sequence[int] | None = None, *, watched: bool = True
    ) -> list[Any]:
        """All results in order; the first rank to fail ends the wait, since the others hang in its collectives.

        Args:
            ranks: whose calls they are; None: everybody's.
            watched: by the stall watch.
        """
        import ray.exceptions

        async def answer(rank: int, call: Any) -> Any:
            with WAITS.on(f"policy.{what}", self._ranks[rank]) if watched else contextlib.nullcontext():
                answer = await call
            if not isinstance(answer, Told):
                return answer
            TRACER.add(self._ranks[rank].name, answer.spans)
            return answer.answer

        tasks = [asyncio.ensure_future(answer(*each)) for each in zip(ranks or range(len(calls)), calls, strict=True)]
        try:
            return list(await asyncio.gather(*tasks))
        except ray.exceptions.RayError as error:
            if isinstance(getattr(error, "cause", None), UserError | RefitError):
                raise error.cause from None
            cause = await self._cause(tasks, error)
            failed = next(i for i, task in enumerate(tasks) if task.done() and task.exception() is cause)
            rank = self._ranks[failed if ranks is None else ranks[failed]]
            if is_lost(cause):
                raise PolicyDiedError(rank, await how_lost(rank.node, cause), lost=True, detail=str(cause)) from error
            raise PolicyDiedError(rank, "failed", lost=False, detail=str(cause)) from error

    async def _cause(self, tasks: Sequence[asyncio.Task[Any]], first: BaseException) -> BaseException:
        """Why the ranks failed: one that is gone, if any, because its peers fail in the collectives that it left, and
        they can be heard of before it is; else the first."""
        deadline = time.monotonic() + (_NODE_GRACE_S if self._several_nodes else _PROCESS_GRACE_S)
        while True:
            failed = [error for task in tasks if task.done() and (error := task.exception()) is not None]
            lost = next((error for error in failed if is_lost(error)), None)
            pending = [task for task in tasks if not task.done()]
            left = deadline - time.monotonic()
            if lost is not None or not pending or left <= 0:
                break
            await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        return lost or first

    async def shutdown(self) -> None:
        """End every rank's process."""
        import ray

        calls = [asyncio.ensure_future(actor.close.remote()) for actor in self._actors]
        await asyncio.wait(calls, timeout=20)  # a rank that hangs in a collective is killed below all the same
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)  # of ranks that are gone
        for actor in self._actors:
            ray.kill(actor)
