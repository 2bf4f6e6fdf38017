"""The distributed optimizer's state as pieces of whole tensors, so that any layout can load them.

A data-parallel rank owns a range of each flattened parameter. Such a range of a row-major tensor is a few boxes (a
part of a row, whole rows, a part of a row), and torch's distributed checkpoint stores and loads boxes of any cut.
So every rank writes what it owns and reads what it owns: no gather, no copy larger than one parameter's range.
mcore's own resharding format gathers the state of all data ranks on each of them (or on the first) before it saves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

PREFIX = "optimizer.state."
"""Of every key here; what follows is the tensor's name (fp32_param, exp_avg, exp_avg_sq) and the parameter's key."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and size in each dimension."""


def boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """The elements [start, stop) of a flattened tensor of `shape`, as boxes in their order; at most 2 x dims - 1."""
    if start >= stop:
        return []
    if len(shape) == 1:
        return [((start,), (stop - start,))]
    inner = shape[1:]
    row = math.prod(inner)
    first, skipped = divmod(start, row)
    last, rest = divmod(stop, row)

    def within(index: int, begin: int, end: int) -> list[Box]:
        return [((index, *offset), (1, *size)) for offset, size in boxes(inner, begin, end)]

    if first == last:
        return within(first, skipped, rest)
    whole = first + (skipped > 0)
    middle = [((whole, *(0 for _ in inner)), (last - whole, *inner))] if whole < last else []
    return (within(first, skipped, row) if skipped else []) + middle + within(last, 0, rest)


def optimizer_parts(optimizer: Any) -> list[Any]:
    """mcore chains one distributed optimizer for dense and one for expert parameters."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def owned(part: Any) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """Parameters of which this data rank owns elements, with the range [start, stop) of the flattened parameter."""
    for ranges in part.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter, where in bucket["param_map"].items():
                    yield parameter, where["param"].start, where["param"].end


def state_of(part: Any, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """The optimizer's flat tensors of this rank's range of `parameter`, by mcore's names."""
    tensors = part._get_main_param_and_optimizer_states(parameter)
    return {name: t for name, t in tensors.items() if isinstance(t, torch.Tensor) and t.dim() == 1}


def sharded_state(part: Any, weights: Any, *, copy: bool) -> tuple[list[Any], list[tuple[Any, dict[str, Any]]]]:
    """(mcore ShardedTensors, the flat tensors that they view).

    Args:
        weights: the model's sharded state dict: where each parameter is in its whole tensor.
        copy: to save: copies in host memory, and only of what this rank is to write. Else views to load into.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    places = {place.data: place for place in nested_values(weights) if isinstance(place.data, torch.nn.Parameter)}
    shards: list[Any] = []
    flats: list[tuple[Any, dict[str, Any]]] = []
    for parameter, start, stop in owned(part):
        # The data ranks share the parameter's optimizer state, so none of them is a replica of another.
        tensors = [
            t for t in _whole_tensors(places[parameter]) if not copy or is_main_replica((*t[0].replica_id[:2], 0))
        ]
        if copy and not tensors:
            continue
        state = state_of(part, parameter)
        if len(state) < 3:
            raise RuntimeError(
                f"{places[parameter].key}: the optimizer has only {sorted(state)} of it; has it made a step?"
            )
        if not copy:
            flats.append((parameter, state))
        for place, begin in tensors:
            low = max(start, begin)
            for offset, size in boxes(place.local_shape, low - begin, min(stop - begin, math.prod(place.local_shape))):
                piece = slice(low - start, low - start + math.prod(size))
                low += math.prod(size)
                shards += [_shard(place, name, flat[piece], offset, size, copy) for name, flat in state.items()]
    return shards, flats


@torch.no_grad()
def put_state(part: Any, flats: list[tuple[Any, dict[str, Any]]]) -> None:
    """Give the optimizer what was loaded into `flats`, which for some of its kinds are copies."""
    for parameter, state in flats:
        # torch's AdamW keeps its step count beside the moments, and mcore asks for all of them.
        part._set_main_param_and_optimizer_states(parameter, state | {"step": None})
    if hasattr(part.optimizer, "_sync_hdo_state_to_sub_optimizers"):
        part.optimizer._sync_hdo_state_to_sub_optimizers()


def create_state(part: Any) -> None:
    """Fused optimizers have no moments before their first step; a save before it would lack what a load asks for."""
    if part.init_state_fn is not None:
        part.init_state_fn(part.optimizer, part.config)


def get_step(parts: list[Any]) -> int:
    """Updates that the optimizer has made. torch's AdamW counts for each parameter, fused ones for each group."""
    found = set()
    for inner in itertools.chain.from_iterable(map(_torch_optimizers, parts)):
        for group in inner.param_groups:
            own = [inner.state[p]["step"] for p in group["params"] if "step" in inner.state[p]]
            found |= set(map(int, own or ([group["step"]] if group["params"] and "step" in group else [])))
    if len(found) > 1:
        raise RuntimeError(f"the optimizer's parameters have made different numbers of updates: {sorted(found)}")
    return found.pop() if found else 0


def set_step(parts: list[Any], step: int) -> None:
    """What `get_step` gave. All else in mcore's state of groups is the configuration's or the schedule's."""
    for part in parts:
        for inner in {id(each): each for each in (part.optimizer, *_torch_optimizers(part))}.values():
            for group in inner.param_groups:
                own = [inner.state[p] for p in group["params"] if "step" in inner.state[p]]
                for state in own:
                    state["step"].fill_(step)
                if not own:
                    group["step"] = step


def _torch_optimizers(part: Any) -> list[Any]:
    """mcore's hybrid optimizer has some for the host and one for the device."""
    return list(getattr(part.optimizer, "sub_optimizers", [part.optimizer]))


def _whole_tensors(place: Any) -> list[tuple[Any, int]]:
    """The tensors of the checkpoint that a parameter is stored as, each with the parameter's element it begins at.

    Gate and up projections are one parameter and two tensors.
    """
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    if isinstance(place, ShardedTensor):
        return [(place, 0)]
    probe = torch.empty(place.data.shape, dtype=place.data.dtype, device="meta")
    parts = list(nested_values(replace(place, data=probe).build()))
    if not all(p.data.is_contiguous() and p.data._base is probe for p in parts):
        raise RuntimeError(
            f"{place.key}: megatron-core stores it as other than slices of rows; its moments have no place"
        )
    return [(p, p.data.storage_offset()) for p in parts]


def _shard(place: Any, name: str, flat: torch.Tensor, offset: Any, size: Any, copy: bool) -> Any:
    layers = place.prepend_axis_num  # axes, such as the layer's number, that the checkpoint's tensor has in front
    shape = (1,) * layers + size
    at = place.global_offset
    if name == "param":
        # Transformer Engine may keep only the bits that the bfloat16 weights lack: not to be taken for whole weights.
        name = "param_remainder" if flat.dtype == torch.int16 else "fp32_param"
    return replace(
        place,
        key=f"{PREFIX}{name}.{place.key}",
        # A piece of a larger storage would be saved with all of it.
        data=(flat.to("cpu", copy=True) if copy else flat).view(shape),
        dtype=flat.dtype,
        local_shape=shape,
        global_offset=(*at[:layers], *(a + b for a, b in zip(at[layers:], offset, strict=True))),
        axis_fragmentations=None,
        prepend_axis_num=0,
        replica_id=0 if copy else place.replica_id,
    )
