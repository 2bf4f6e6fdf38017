"""Ends of a refit without megatron and vLLM: dictionaries of tensors, cut and fused as theirs are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from megatron_fapo.weight_sync.mapped import viewed
from megatron_fapo.weight_sync.protocol import RefitError
from megatron_fapo.weight_sync.regions import Fill, Index, Ints, LocalTensor, Region, View, contiguous_stride, volume


def whole(tensors: Mapping[str, torch.Tensor]) -> Index:
    """Of a process that holds HF tensors as they are."""
    local = {name: LocalTensor(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()}
    regions = [
        Region(name, (0,) * len(t.shape), t.shape, View(name, 0, contiguous_stride(t.shape)))
        for name, t in local.items()
    ]
    return Index(local, tuple(regions))


def rows_of(shapes: Mapping[str, Ints], ranks: int, rank: int, dtype: str = "float32") -> Index:
    """Of a process that holds its share of every tensor's rows, named as if it were another's."""
    local, regions = {}, []
    for name, shape in shapes.items():
        low, high = shape[0] * rank // ranks, shape[0] * (rank + 1) // ranks
        mine = (high - low, *shape[1:])
        local[f"rows of {name}"] = LocalTensor(mine, dtype)
        view = View(f"rows of {name}", 0, contiguous_stride(mine))
        regions.append(Region(name, (low, *[0] * (len(shape) - 1)), mine, view))
    return Index(local, tuple(regions))


def columns_of(shapes: Mapping[str, Ints], ranks: int, rank: int, padding: int = 0, dtype: str = "float32") -> Index:
    """Of a process that wants its share of every tensor's columns, and rows that no checkpoint has."""
    local, regions, fills = {}, [], []
    for name, (rows, columns) in shapes.items():
        low, high = columns * rank // ranks, columns * (rank + 1) // ranks
        local[name] = LocalTensor((rows + padding, high - low), dtype)
        stride = contiguous_stride((rows, high - low))
        regions.append(Region(name, (0, low), (rows, high - low), View(name, 0, stride)))
        if padding:
            fills.append(Fill((padding, high - low), View(name, rows * (high - low), stride), 0.0))
    return Index(local, tuple(regions), tuple(fills))


def contents(index: Index, whole_tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The local tensors of an index, filled from HF tensors."""
    found = {name: torch.full(t.shape, torch.nan, dtype=getattr(torch, t.dtype)) for name, t in index.tensors.items()}
    for region in index.regions:
        box = tuple(slice(s, s + n) for s, n in zip(region.start, region.shape, strict=True))
        viewed(found[region.view.tensor], region.view, region.shape).copy_(whole_tensors[region.name][box])
    for fill in index.fills:
        viewed(found[fill.view.tensor], fill.view, fill.shape).fill_(fill.value)
    return found


class PlainMemory:
    """target.Memory without an engine: tensors are written where they are."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self.tensors = {
            n: torch.full(t.shape, torch.nan, dtype=getattr(torch, t.dtype)) for n, t in index.tensors.items()
        }
        self.failing = False

    def index(self) -> Index:
        return self._index

    def begin(self) -> None:
        self._left: Counter[str] = Counter()
        for region in self._index.regions:
            self._left[region.view.tensor] += volume(region.shape)

    def view(self, tensor: str, offset: int, shape: Ints, stride: Ints) -> torch.Tensor:
        if self.failing:
            raise RefitError(f"{tensor} has nowhere to go")
        return viewed(self.tensors[tensor], View(tensor, offset, stride), shape)

    def wrote(self, tensor: str, elements: int) -> float:
        self._left[tensor] -= elements
        return 0.0

    def finish(self) -> float:
        if wrong := {name: left for name, left in self._left.items() if left}:
            raise RefitError(f"elements missing, or written twice (below 0): {wrong}")
        for fill in self._index.fills:
            viewed(self.tensors[fill.view.tensor], fill.view, fill.shape).fill_(fill.value)
        return 0.0

    def abort(self) -> None:
        pass
