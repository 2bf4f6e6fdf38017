"""The driver's side of the policy: all ranks as one object.

In: samples of a step. Out: log-probabilities in the same order, or the metrics of an optimizer update.
The group deals samples over data-parallel ranks; ranks of one data-parallel replica all get the same samples.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_fapo.algorithm.loss import finish_token_sums
from megatron_fapo.config.root import Config
from megatron_fapo.errors import UserError
from megatron_fapo.policy.actor import copy_model_files
from megatron_fapo.policy.batch import TrainSample, split_over_data_ranks
from megatron_fapo.policy.hf_weights import write_index
from megatron_fapo.policy.worker import SUPERVISED, Rank

_LOG_LINES = 30


class PolicyDiedError(RuntimeError):
    """A policy rank failed or its process is gone; the message ends with its log."""


class PolicyGroup:
    """Handles of `PolicyActor`, one per rank, in rank order."""

    def __init__(self, actors: Sequence[Any], config: Config, logs: Sequence[Path]) -> None:
        self._actors, self._config, self._logs = list(actors), config, list(logs)
        self._facts: list[dict[str, Any]] = []

    async def start(self, *, device: str, dtype: str, timeout_s: float = 600.0) -> None:
        """Build the model on every rank and connect the ranks."""
        address, port = await self._actors[0].address.remote()
        options = {
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
        self._facts = await asyncio.wait_for(self._gather(calls), timeout_s)

    @property
    def gpus(self) -> list[str]:
        """UUIDs of the ranks' GPUs; empty strings on CPU."""
        return [str(facts["gpu"]) for facts in self._facts]

    async def logprobs(self, samples: Sequence[TrainSample], *, reference: bool = False) -> list[list[float]]:
        """Log-probabilities of the response tokens, one list per sample, in order."""
        parts = self._deal(samples)
        results = await self._gather(
            [
                actor.logprobs.remote(refs, reference)
                for actor, refs in zip(self._actors, self._put(samples, parts), strict=True)
            ]
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
        results = await self._gather([a.train.remote(r, loss) for a, r in zip(self._actors, refs, strict=True)])
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
        await self._gather([actor.save.remote(str(directory)) for actor in self._actors])
        self._copy_model_files(directory / "hf")

    async def load(self, directory: Path) -> None:
        """Restore what `save` wrote, whatever layout saved it."""
        await self._gather([actor.load.remote(str(directory)) for actor in self._actors])

    async def export(self, directory: Path) -> None:
        """Write an HF checkpoint that vLLM and transformers load."""
        self._copy_model_files(directory)
        replica = [a for a, facts in zip(self._actors, self._facts, strict=True) if facts["data_rank"] == 0]
        names = await self._gather([actor.export.remote(str(directory)) for actor in replica])
        write_index(directory, [n for n in names if n])

    def _copy_model_files(self, directory: Path) -> None:
        cfg = self._config.policy
        copy_model_files(Path(cfg.model_path), directory, cfg.max_position_embeddings)

    async def open_refit(self, transport: str, verify: bool) -> list[Callable[[], Awaitable[Any]]]:
        """Make the first data-parallel replica send its weights; one source of buckets per rank."""
        replica = [i for i, facts in enumerate(self._facts) if facts["data_rank"] == 0]
        bucket_mb = self._config.weight_sync.bucket_mb
        await self._gather([self._actors[i].open_refit.remote(bucket_mb, transport, verify) for i in replica])
        return [partial(self._next_bucket, i) for i in replica]

    async def _next_bucket(self, index: int) -> Any:
        return (await self._gather([self._actors[index].next_bucket.remote()]))[0]

    async def _gather(self, calls: Sequence[Any]) -> list[Any]:
        """All results in order; the first rank to fail ends the wait, since the others hang in its collectives."""
        import ray.exceptions

        tasks = [asyncio.ensure_future(call) for call in calls]
        try:
            return list(await asyncio.gather(*tasks))
        except (ray.exceptions.RayTaskError, ray.exceptions.RayActorError) as error:
            if isinstance(getattr(error, "cause", None), UserError):
                raise error.cause from None
            failed = next(i for i, task in enumerate(tasks) if task.done() and task.exception() is error)
            log = self._logs[failed] if len(tasks) == len(self._logs) else self._logs[0]
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:]) if log.exists() else "(empty)"
            raise PolicyDiedError(f"a policy rank failed: {error}\nthe end of {log}:\n{tail}") from error

    async def shutdown(self) -> None:
        """End every rank's process."""
        import ray

        calls = [asyncio.ensure_future(actor.close.remote()) for actor in self._actors]
        await asyncio.wait(calls, timeout=20)  # a rank that hangs in a collective is killed below all the same
        for call in calls:
            call.cancel()
        for actor in self._actors:
            ray.kill(actor)
