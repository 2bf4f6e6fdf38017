"""A policy rank joins the others: device, process groups, megatron's parallel state, seeds.

In: where this process stands, and the layout. Out: megatron's `parallel_state`, with every group used once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from megatron_fapo.config.policy import ParallelConfig


@dataclass(frozen=True)
class Rank:
    """Where this process stands in the policy."""

    rank: int
    world_size: int
    master_address: str
    master_port: int


def join(rank: Rank, parallel: ParallelConfig, device: str, seed: int) -> Any:
    """Join the process groups of the layout; returns megatron's parallel state.

    Args:
        device: `cuda` (the first card that this process sees) or `cpu`.
        seed: of weights and dropout; tensor ranks derive their own.
    """
    os.environ.update(RANK=str(rank.rank), WORLD_SIZE=str(rank.world_size), LOCAL_RANK="0")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # mcore orders TP communication by launch order
    if device == "cpu":
        from megatron_fapo.policy import cpu_backend

        cpu_backend.install()
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    else:
        torch.cuda.set_device(0)  # Ray shows each rank its own card only
    torch.distributed.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        init_method=f"tcp://{rank.master_address}:{rank.master_port}",
        rank=rank.rank,
        world_size=rank.world_size,
    )
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        parallel.tensor,
        parallel.pipeline,
        parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    _use_every_group(parallel_state, device)
    return parallel_state


def _use_every_group(state: Any, device: str) -> None:
    """Use every process group once, now: NCCL takes memory for a group at its first use, and in the middle of a step
    PyTorch's cache may have left it none."""
    groups = (
        None,
        state.get_tensor_model_parallel_group(),
        state.get_pipeline_model_parallel_group(),
        state.get_model_parallel_group(),
        state.get_context_parallel_group(),
        state.get_data_parallel_group(),
        state.get_data_parallel_group(with_context_parallel=True),
        state.get_expert_model_parallel_group(),
        state.get_expert_tensor_and_model_parallel_group(),
        state.get_expert_data_parallel_group(),
    )
    for group in groups:
        torch.distributed.all_reduce(torch.zeros(1, device=device), group=group)
