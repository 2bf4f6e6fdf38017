"""What every rank of a layout would hold, without ranks and without memory.

One process takes the part of each rank in turn: torch's `fake` process groups answer for the others, and parameters are
built on the meta device. So it is mcore that says which parameters a rank has and where they belong in a checkpoint.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_fapo.config.policy import ParallelConfig, PolicyConfig
from megatron_fapo.policy.hf_config import ModelShape
from megatron_fapo.policy.hf_rules import Rule

WHOLE = ParallelConfig(data=2)
"""Each rank holds the whole model. There are two because alone in its world mcore cannot load one layer of several."""


class ParametersOnMeta(TorchDispatchMode):
    """Uninitialised tensors take no memory; computed ones (rotary frequencies) are real.

    `with torch.device("meta")` would not do: it knows torch's factories by identity, and the CPU backend replaces them.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten.empty.memory_format:
            kwargs |= {"device": torch.device("meta"), "pin_memory": False}
        return func(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class Parameter:
    """One parameter of one rank: the HF tensors that it is made of, and its place in a checkpoint."""

    rule: Rule
    entry: Any
    """mcore's ShardedTensor, or its ShardedTensorFactory where a parameter is stored in several pieces."""
    tensor_ranks: int
    tensor_rank: int
    """Of the group that this parameter is split over."""

    def pieces(self, data: torch.Tensor) -> list[Any]:
        """ShardedTensors whose data are views of `data`, which stands for this parameter."""
        from megatron.core.dist_checkpointing.mapping import ShardedTensor

        if isinstance(self.entry, ShardedTensor):
            return [replace(self.entry, data=data, dtype=data.dtype)]
        return list(replace(self.entry, data=data).build())


@dataclass(frozen=True)
class RankContents:
    parameters: list[Parameter]
    objects: list[Any]
    """mcore's ShardedObjects: the empty states of FP8 that its modules leave in every checkpoint."""


@contextmanager
def taking_the_part_of(rank: int, parallel: ParallelConfig) -> Iterator[None]:
    """This process as `rank` of the layout, in megatron's parallel state. Nothing may be communicated.

    GPUs are hidden from this process: the description of a 32B model must not land on one.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from megatron_fapo.policy import cpu_backend

    cpu_backend.install()
    from megatron.core import parallel_state, tensor_parallel
    from torch.testing._internal.distributed import fake_pg  # noqa: F401 -- importing it registers the backend

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("fake", store=store, rank=rank, world_size=parallel.world_size)
    try:
        parallel_state.initialize_model_parallel(
            parallel.tensor,
            parallel.pipeline,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_tensor,
            create_gloo_process_groups=False,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def conversion_layout(shape: ModelShape, tensor: int, pipeline: int, expert: int) -> ParallelConfig:
    """The smallest layout with these model-parallel sizes: experts are taken out of tensor x data ranks."""
    return ParallelConfig(
        tensor=tensor,
        pipeline=pipeline,
        expert=expert,
        data=expert // math.gcd(expert, tensor),
        sequence_parallel=tensor > 1 and shape.experts is not None,
    )


def describe_rank(shape: ModelShape, parallel: ParallelConfig, rank: int, dtype: torch.dtype) -> RankContents:
    """What a rank of the layout holds, as parameters of `dtype` on the meta device."""
    with taking_the_part_of(rank, parallel):
        return contents_of(chunks_on_meta(shape, parallel, dtype), shape)


def chunks_on_meta(shape: ModelShape, parallel: ParallelConfig, dtype: torch.dtype) -> list[Any]:
    """The model chunks of the rank whose part this process takes, without memory for parameters."""
    from megatron_fapo.policy.model import build_chunks

    with ParametersOnMeta():
        return build_chunks(shape, PolicyConfig(parallel=parallel), dtype)


def contents_of(chunks: Sequence[Any], shape: ModelShape) -> RankContents:
    """What these chunks of the rank whose part this process takes hold; entries have the parameters as their data."""
    from megatron.core import parallel_state as state
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from megatron_fapo.policy.hf_weights import model_rules, place_in_tensor_group

    about = {"dp_cp_group": state.get_data_parallel_group(with_context_parallel=True)}
    entries = [entry for chunk in chunks for entry in chunk.sharded_state_dict(metadata=about).values()]
    tensors = [entry for entry in entries if not isinstance(entry, ShardedObject)]
    objects = [entry for entry in entries if isinstance(entry, ShardedObject)]
    by_parameter = {id(entry.data): entry for entry in tensors}
    parameters = [
        Parameter(rule, by_parameter[id(parameter)], *place_in_tensor_group(rule))
        for chunk in chunks
        for parameter, rule in model_rules(chunk, shape)
    ]
    return RankContents(parameters, objects + _states_of_norms(tensors))


def _states_of_norms(tensors: Iterable[Any]) -> list[Any]:
    """Transformer Engine's norms ask for an FP8 state too when a checkpoint is loaded on GPUs."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    states = []
    for entry in tensors:
        if entry.key.endswith("layernorm.weight"):
            axes = entry.prepend_axis_num
            key = f"{entry.key.removesuffix('weight')}_extra_state"
            place = (entry.global_shape[:axes], entry.global_offset[:axes]) if axes else ((1,), (0,))
            states.append(ShardedObject(key, None, *place, entry.replica_id))
    return states
