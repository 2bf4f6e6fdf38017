"""Policy state on disk: weights, optimizer, schedule and random state, through mcore's distributed checkpointing.

Any TP x PP x DP loads what any other saved: weights by their sharding, the optimizer in mcore's fully reshardable
form. Random state belongs to a rank, so it is restored only when the layout is the one that saved; the policy draws no
random numbers while training (no dropout), so a new layout continues all the same.

The directory is complete when `training/checkpoint.py` has renamed the whole run's unit into place; this module only
fills it.
"""

from __future__ import annotations

import queue
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_fapo.errors import UserError

_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}


def metadata() -> dict[str, Any]:
    from megatron.core import parallel_state

    return _OPTIMIZER_FORMAT | {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_fully_reshardable_mem_efficient": False,
    }


def _layout(worker: Any) -> tuple[int, int, int]:
    p = worker.cfg.parallel
    return (p.tensor, p.pipeline, p.data)


def _sharded_state(worker: Any, *, loading: bool) -> dict[str, Any]:
    about = metadata()
    weights = worker.chunks[0].sharded_state_dict(prefix="model.", metadata=about)
    return {
        "model": weights,
        "optimizer": worker.optimizer.sharded_state_dict(weights, is_loading=loading, metadata=about),
    }


def _random_file(directory: Path) -> Path:
    return directory / f"random-{torch.distributed.get_rank():05d}.pt"


def write_in_this_process() -> None:
    """mcore starts a manager process for its asynchronous writer even when it writes synchronously; that process
    would outlive the run. A plain queue is all that a synchronous save needs."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()


def _load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Load the optimizer, minding two slips of mcore 0.19 with torch's AdamW (without Transformer Engine or apex):
    it asks the loaded tensors for `step`, which is not among them, and gives all parameters one shared step tensor,
    which AdamW would then advance once per parameter."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    plain = [p for p in parts if isinstance(p.optimizer, torch.optim.AdamW)]
    for part in plain:
        fill = part._set_main_param_and_optimizer_states
        part._set_main_param_and_optimizer_states = lambda p, tensors, fill=fill: fill(p, tensors | {"step": None})
    optimizer.load_state_dict(state)
    for part in plain:
        del part._set_main_param_and_optimizer_states
        for values in part.optimizer.state.values():
            values["step"] = values["step"].clone()


def save(worker: Any, directory: str | Path) -> None:
    """Write this rank's part of `directory`; collective over all ranks."""
    from megatron.core import dist_checkpointing
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    directory = Path(directory)
    if torch.distributed.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    write_in_this_process()
    state = _sharded_state(worker, loading=False)
    state["scheduler"] = worker.scheduler.state_dict()
    dist_checkpointing.save(state, str(directory), content_metadata=_OPTIMIZER_FORMAT)
    torch.save(
        {
            "layout": _layout(worker),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(),
            "tracker": get_cuda_rng_tracker().get_states(),
            "numpy": np.random.get_state(),
            "python": random.getstate(),
        },
        _random_file(directory),
    )
    torch.distributed.barrier()


def load(worker: Any, directory: str | Path) -> None:
    """Restore what `save` wrote, under any layout; collective over all ranks.

    Raises:
        UserError: the directory is not a checkpoint of the policy.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    directory = Path(directory)
    if not (directory / "metadata.json").is_file():
        raise UserError(f"{directory} is not a policy checkpoint: it has no metadata.json")
    loaded = dist_checkpointing.load(_sharded_state(worker, loading=True), str(directory))
    worker.chunks[0].load_state_dict({name.removeprefix("model."): t for name, t in loaded["model"].items()})
    _load_optimizer(worker.optimizer, loaded["optimizer"])
    worker.scheduler.load_state_dict(loaded["scheduler"])
    if not _random_file(directory).is_file():
        return
    states = torch.load(_random_file(directory), weights_only=False)
    if states["layout"] == _layout(worker):
        torch.set_rng_state(states["torch"])
        torch.cuda.set_rng_state(states["cuda"])
        get_cuda_rng_tracker().set_states(states["tracker"])
        np.random.set_state(states["numpy"])
        random.setstate(states["python"])
