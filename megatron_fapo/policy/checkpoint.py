"""Policy state on disk: weights, optimizer, schedule and random state, through mcore's distributed checkpointing.

Any layout loads what any other saved: weights by their sharding, the optimizer as pieces of whole tensors
(`optimizer_shards.py`). Random state belongs to a rank, so it is restored only when the layout is the one that saved;
the policy draws no random numbers while training (no dropout), so a new layout continues all the same.

A save has three parts. `Saver.begin` (collective) copies what this rank is to write into host memory; training goes on.
A thread of the rank writes and hashes the copy; it takes part in no collective, and torch, the hash and the disk let go
of Python's lock while they work. `Saver.complete` on rank 0 writes the index once the parts of all ranks are there.
mcore's own asynchronous writer is not used: it forks a process that has CUDA and Ray's threads, copies nothing that is
on the CPU already, and ends in collectives.

The directory is complete when `training/checkpoint.py` has renamed the whole run's unit into place; this module only
fills it.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_fapo.checksums import FileSum, SummedFile, damaged, sum_file
from megatron_fapo.errors import CheckpointError, UserError
from megatron_fapo.policy.optimizer_shards import (
    create_state,
    get_step,
    optimizer_parts,
    put_state,
    set_step,
    sharded_state,
)

_WEIGHTS = "model."


@dataclass(frozen=True)
class Part:
    """What one rank has written."""

    results: list[Any]
    """torch's WriteResult of each tensor and object: where it is."""
    files: dict[str, FileSum]
    seconds: float
    hash_s: float
    """The share of `seconds` that went into hashes."""


class Saver:
    """The saves of one rank, one at a time."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._plan: Any = None
        self._thread: threading.Thread | None = None
        self._part: Part | None = None
        self._error: BaseException | None = None
        self._directory = Path()

    def begin(self, directory: Path) -> None:
        """Copy this rank's part of the state and begin to write it into `directory`. Collective over all ranks."""
        from megatron.core import dist_checkpointing

        assert self._thread is None, "the save before this one is still under way"
        worker, self._directory = self._worker, directory
        first = self._plan is None
        if first:
            self._plan = _make_plan(worker)
        directory.mkdir(parents=True, exist_ok=True)
        worker.memory.require("checkpoint")
        weights = _sharded_weights(worker)
        parts = optimizer_parts(worker.optimizer)
        for part in parts:
            create_state(part)
        state = {
            "weights": weights,
            "moments": [sharded_state(part, weights, copy=True)[0] for part in parts],
            "step": get_step(parts),
            "scheduler": worker.scheduler.state_dict(),
            "layout": worker.cfg.parallel.model_dump(),
            "random": _random_object(_random_state()),
        }
        # The structure is the same at every save, and its validation is a gather over all ranks.
        dist_checkpointing.save(
            state, str(directory), self._plan, async_sharded_save=True, validate_access_integrity=first
        )
        self._part = self._error = None
        self._thread = threading.Thread(target=self._write, args=(self._plan.items,), name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self, items: deque[tuple[Any, Any]]) -> None:
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.storage import WriteResult

        began, name = time.perf_counter(), f"__{torch.distributed.get_rank()}_0.distcp"
        results = []
        try:
            with SummedFile(self._directory / name) as file:
                while items:  # what is written is let go of
                    item, data = items.popleft()
                    offset = file.tell()
                    if isinstance(data, torch.Tensor):
                        torch.save(data, file)
                    else:
                        file.write(data.getbuffer())
                    length = file.tell() - offset
                    results.append(WriteResult(item.index, length, _StorageInfo(name, offset, length)))
            self._part = Part(results, {name: file.sum()}, time.perf_counter() - began, file.hash_s)
        except BaseException as error:  # told to whoever asks for the part
            self._error = error

    def part(self, *, wait: bool = False) -> Part | None:
        """What this rank has written; None while it writes. Not collective.

        Raises:
            CheckpointError: it could not be written.
        """
        assert self._thread is not None, "begin() comes first"
        self._thread.join(None if wait else 0)
        if self._thread.is_alive():
            return None
        self._thread = None
        if self._error is not None:
            raise CheckpointError(
                f"{self._directory}: rank {torch.distributed.get_rank()} could not write its part: {self._error}; mend "
                "it, then go on with --resume from the last complete checkpoint"
            ) from self._error
        return self._part

    def complete(self, parts: list[Part]) -> dict[str, FileSum]:
        """Write the index of all ranks' parts, on rank 0; returns the files of the directory. Not collective."""
        from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
        from torch.distributed.checkpoint import FileSystemWriter

        FileSystemWriter(self._directory).finish(self._plan.metadata, [part.results for part in parts])
        with SummedFile(self._directory / CONFIG_FNAME) as file:
            file.write(json.dumps(asdict(CheckpointingConfig(self._plan.backend, self._plan.version))).encode())
        index = {".metadata": sum_file(self._directory / ".metadata"), CONFIG_FNAME: file.sum()}
        return index | {name: each for part in parts for name, each in part.files.items()}


def save(worker: Any, directory: str | Path) -> dict[str, FileSum]:
    """Write the whole of `directory` and wait for it; collective over all ranks. Returns its files, on rank 0.

    Raises:
        CheckpointError: this rank could not write its part.
    """
    saver = Saver(worker)
    saver.begin(Path(directory))
    part, world = saver.part(wait=True), torch.distributed.get_world_size()
    gathered: list[Any] | None = [None] * world if torch.distributed.get_rank() == 0 else None
    torch.distributed.gather_object(part, gathered)
    files = saver.complete(gathered) if gathered else {}
    torch.distributed.barrier()
    return files


def verify(directory: Path, files: Mapping[str, str], rank: int, ranks: int) -> list[str]:
    """What is wrong with this rank's share of the files of `directory`; see checksums.damaged."""
    return damaged(directory, files, sorted(files)[rank::ranks])


def load(worker: Any, directory: str | Path) -> None:
    """Restore what `save` wrote, under any layout; collective over all ranks. Hashes are verified before, not here.

    Raises:
        UserError: the directory is not a checkpoint of the policy.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.serialization import load_common_state_dict

    directory = Path(directory)
    if not (directory / "metadata.json").is_file():
        raise UserError(f"{directory} is not a policy checkpoint: it has no metadata.json")
    worker.memory.require("checkpoint")
    common = load_common_state_dict(directory)
    weights, parts = _sharded_weights(worker), optimizer_parts(worker.optimizer)
    for part in parts:
        create_state(part)
    moments = [sharded_state(part, weights, copy=False) for part in parts]
    state = {"weights": weights, "moments": [shards for shards, _ in moments]}
    same_layout = common["layout"] == worker.cfg.parallel.model_dump()
    if same_layout:
        state["random"] = _random_object(None)
    loaded = dist_checkpointing.load(state, str(directory))
    for chunk, tensors in zip(worker.chunks, loaded["weights"], strict=True):
        chunk.load_state_dict({name.removeprefix(_WEIGHTS): t for name, t in tensors.items()})
    for part, (_, flats) in zip(parts, moments, strict=True):
        put_state(part, flats)
    set_step(parts, common["step"])
    worker.scheduler.load_state_dict(common["scheduler"])
    if same_layout:
        _restore_random_state(loaded["random"])


def _sharded_weights(worker: Any) -> list[dict[str, Any]]:
    metadata = {"dp_cp_group": worker.state.get_data_parallel_group(with_context_parallel=True)}
    return [chunk.sharded_state_dict(prefix=_WEIGHTS, metadata=metadata) for chunk in worker.chunks]


def _make_plan(worker: Any) -> Any:
    """mcore's save strategy with the writing left out: it decides who writes what, and copies that.

    A class within a function, since importing megatron before the CPU backend is installed is not allowed.
    """
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
    from megatron.core.dist_checkpointing.mapping import is_main_replica
    from megatron.core.dist_checkpointing.strategies import torch as strategies
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        distribute_main_replicas_with_precomputed_distribution,
    )

    data_ranks = worker.state.get_data_parallel_group(with_context_parallel=True)

    class Plan(strategies.TorchDistSaveShardedStrategy):
        distribution: Any = None
        planned = False
        metadata: Any = None
        items: deque[tuple[Any, Any]]

        def async_save(self, sharded_state_dict: Any, checkpoint_dir: Path, async_strategy: str = "") -> AsyncRequest:
            del checkpoint_dir, async_strategy
            if not self.planned:  # data ranks hold the same weights; each writes a share
                self.distribution = determine_main_replica_uniform_distribution(sharded_state_dict, data_ranks)
            distribute_main_replicas_with_precomputed_distribution(sharded_state_dict, data_ranks, self.distribution)
            for each in nested_values(sharded_state_dict):
                mine = isinstance(each, ShardedTensor) and is_main_replica(each.replica_id)
                if mine and each.key.startswith(_WEIGHTS):
                    each.data = each.data.detach().to("cpu", copy=True)
            by_key = strategies._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)[0]
            first = torch.distributed.get_rank() == 0
            planner = strategies.MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            planner.set_up_planner(strategies.mcore_to_pyt_state_dict(by_key), is_coordinator=first)
            plan = planner.create_local_plan()
            if not self.planned:
                plans: list[Any] | None = [None] * torch.distributed.get_world_size() if first else None
                torch.distributed.gather_object(plan, plans)
                if plans:
                    self.metadata = planner.create_global_plan(plans)[1]
            self.planned = True
            self.items = deque((item, planner.resolve_data(item)) for item in planner.finish_plan(plan).items)
            return AsyncRequest(None, (), [])

    return Plan()


def _random_object(data: Any) -> Any:
    """One entry per rank of the checkpoint's `random`."""
    from megatron.core.dist_checkpointing import ShardedObject

    return ShardedObject("random", data, (torch.distributed.get_world_size(),), (torch.distributed.get_rank(),))


def _random_state() -> dict[str, Any]:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
