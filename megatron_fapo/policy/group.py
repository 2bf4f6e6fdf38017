"""The driver's side of the policy: all ranks as one object.

In: samples of a step. Out: log-probabilities in the same order, or the metrics of an optimizer update.
The group deals samples over data-parallel ranks; ranks of one data-parallel replica all get the same samples.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_fapo.algorithm.loss import finish_token_sums
from megatron_fapo.config.root import Config
from megatron_fapo.errors import UserError
from megatron_fapo.observe.stall import WAITS
from megatron_fapo.policy.actor import copy_model_files
from megatron_fapo.policy.batch import TrainSample, split_over_data_ranks
from megatron_fapo.policy.hf_weights import write_index
from megatron_fapo.policy.worker import SUPERVISED, Rank
from megatron_fapo.processes import HERE, Node, Process, ProcessDiedError, how_lost, is_lost
from megatron_fapo.weight_sync.protocol import Place

_PROCESS_GRACE_S, _NODE_GRACE_S = 5.0, 40.0
"""How long Ray takes to tell of a dead process, and of a dead node (missed health checks)."""


class PolicyDiedError(ProcessDiedError):
    """A policy rank failed or its process is gone."""


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
            "several_nodes": self._several_nodes,
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

    @property
    def senders(self) -> list[int]:
        """The ranks that take part in a refit: those of the first data-parallel replica."""
        return [i for i, facts in enumerate(self._facts) if facts["data_rank"] == 0]

    @property
    def places(self) -> list[Place]:
        """Where the senders are."""
        return [Place(self._ranks[i].node.id, (str(self._facts[i]["gpu"]),)) for i in self.senders]

    async def logprobs(self, samples: Sequence[TrainSample], *, reference: bool = False) -> list[list[float]]:
        """Log-probabilities of the response tokens, one list per sample, in order."""
        parts = self._deal(samples)
        results = await self._gather(
            "logprobs",
            [
                actor.logprobs.remote(refs, reference)
                for actor, refs in zip(self._actors, self._put(samples, parts), strict=True)
            ],
        )
        merged: list[list[float]] = [[] for _ in samples]
        for facts, result in zip(self._facts, results, strict=True):
            if facts["reports"]:
                for index, values in zip(parts[facts["data_rank"]], result, strict=True):
                    merged[index] = values
        return merged

    async def train(self, samples: Sequence[TrainSample], *, loss: str = "policy") -> dict[str, float]:
        """One optimizer update on one global mini-batch; returns its metrics, `policy/...`."""
        parts = self._deal(samples)
        refs = self._put(samples, parts)
        calls = [a.train.remote(r, loss) for a, r in zip(self._actors, refs, strict=True)]
        results = await self._gather("train", calls)
        sums: dict[str, float] = {}
        for facts, result in zip(self._facts, results, strict=True):
            if facts["reports"]:
                for name, value in result.token_sums.items():
                    sums[name] = sums.get(name, 0.0) + value
        metrics = {"policy/grad_norm": results[0].grad_norm, "policy/lr": results[0].lr}
        if loss == SUPERVISED:
            return metrics | {"policy/supervised_loss": sums["supervised_loss"] / max(sums["tokens"], 1.0)}
        return metrics | finish_token_sums(sums)

    def _deal(self, samples: Sequence[TrainSample]) -> list[list[int]]:
        return split_over_data_ranks([s.tokens for s in samples], self._config.policy.parallel.data)

    def _put(self, samples: Sequence[TrainSample], parts: list[list[int]]) -> list[Any]:
        """Each data-parallel part once into the object store; one reference per rank."""
        import ray

        refs = [ray.put([samples[i] for i in part]) for part in parts]
        return [refs[facts["data_rank"]] for facts in self._facts]

    async def save(self, directory: Path) -> None:
        """Write weights, optimizer, schedule and random state; and what describes the model, beside them."""
        await self._gather("save", [actor.save.remote(str(directory)) for actor in self._actors])
        self._copy_model_files(directory / "hf")

    async def load(self, directory: Path) -> None:
        """Restore what `save` wrote, whatever layout saved it."""
        await self._gather("load", [actor.load.remote(str(directory)) for actor in self._actors])

    async def export(self, directory: Path) -> None:
        """Write an HF checkpoint that vLLM and transformers load."""
        self._copy_model_files(directory)
        replica = self.senders
        calls = [self._actors[i].export.remote(str(directory)) for i in replica]
        names = await self._gather("export", calls, replica)
        write_index(directory, [n for n in names if n])

    def _copy_model_files(self, directory: Path) -> None:
        cfg = self._config.policy
        copy_model_files(Path(cfg.model_path), directory, cfg.max_position_embeddings)

    async def open_refit(self, transports: Sequence[Sequence[str]], verify: bool) -> list[Callable[[], Awaitable[Any]]]:
        """Make the senders send their weights; one source of buckets for each.

        Args:
            transports: of each sender, how its buckets reach each engine (protocol.choose_transports).
        """
        bucket_mb, senders = self._config.weight_sync.bucket_mb, self.senders
        calls = [
            self._actors[i].open_refit.remote(bucket_mb, row, verify)
            for i, row in zip(senders, transports, strict=True)
        ]
        await self._gather("open_refit", calls, senders)
        return [partial(self._next_bucket, i) for i in senders]

    async def _next_bucket(self, index: int) -> Any:
        return (await self._gather("next_bucket", [self._actors[index].next_bucket.remote()], [index]))[0]

    async def _gather(self, what: str, calls: Sequence[Any], ranks: Sequence[int] | None = None) -> list[Any]:
        """All results in order; the first rank to fail ends the wait, since the others hang in its collectives.

        Args:
            ranks: whose calls they are; None: everybody's.
        """
        import ray.exceptions

        async def answer(rank: int, call: Any) -> Any:
            with WAITS.on(f"policy.{what}", self._ranks[rank]):
                return await call

        tasks = [asyncio.ensure_future(answer(*each)) for each in zip(ranks or range(len(calls)), calls, strict=True)]
        try:
            return list(await asyncio.gather(*tasks))
        except ray.exceptions.RayError as error:
            if isinstance(getattr(error, "cause", None), UserError):
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
