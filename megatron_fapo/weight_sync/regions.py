"""What a process holds or wants of an HF checkpoint, in boxes. Pure: numbers and names, no torch, no I/O.

An `Index` lists the local tensors of one process (a policy rank, a worker of an engine) and says, region by region,
which box of which HF tensor each part of them is. Sources say what they hold (`policy/source_index.py`), targets what
they want (`landing.py`); `plan.py` intersects the two. Offsets are relative to a tensor, never addresses: whoever
executes a plan resolves the tensors anew at every refit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Ints = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """A tensor of one process, contiguous in row-major order."""

    shape: Ints
    dtype: str
    """As torch names it, without `torch.`."""


@dataclass(frozen=True, slots=True)
class View:
    """A strided view of a local tensor. Its shape is that of the region or copy that it belongs to."""

    tensor: str
    offset: int
    """Of the first element, in elements from the tensor's start."""
    stride: Ints
    """Elements, of each dimension."""

    def moved(self, by: Ints) -> View:
        """The view that begins `by` further along each dimension."""
        return View(self.tensor, self.offset + sum(b * s for b, s in zip(by, self.stride, strict=True)), self.stride)


@dataclass(frozen=True, slots=True)
class Region:
    """A box of an HF tensor, and the view of a local tensor that holds it (source) or wants it (target)."""

    name: str
    """Of the HF tensor."""
    start: Ints
    """The box's first corner, in elements."""
    shape: Ints
    view: View


@dataclass(frozen=True, slots=True)
class Fill:
    """A part of a target's tensor that no checkpoint holds and that its loader sets: padding rows of a vocabulary."""

    shape: Ints
    view: View
    value: float


@dataclass(frozen=True)
class Index:
    """One process. Equal indexes mean interchangeable contents: data-parallel replicas, replicas of an engine."""

    tensors: Mapping[str, LocalTensor]
    regions: tuple[Region, ...]
    """In the order in which tensors are computed with: the plan keeps it, so that layers complete one after another."""
    fills: tuple[Fill, ...] = field(default=())

    def to_json(self) -> str:
        """Compact, and the same for equal indexes: it serves as their key."""
        return json.dumps(
            {
                "tensors": {name: [t.shape, t.dtype] for name, t in self.tensors.items()},
                "regions": [[r.name, r.start, r.shape, *_pack(r.view)] for r in self.regions],
                "fills": [[f.shape, *_pack(f.view), f.value] for f in self.fills],
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> Index:
        found = json.loads(text)
        return cls(
            {name: LocalTensor(tuple(shape), dtype) for name, (shape, dtype) in found["tensors"].items()},
            tuple(Region(name, tuple(start), tuple(shape), _unpack(v)) for name, start, shape, *v in found["regions"]),
            tuple(Fill(tuple(shape), _unpack(view), value) for shape, *view, value in found["fills"]),
        )


def _pack(view: View) -> tuple[str, int, Ints]:
    return view.tensor, view.offset, view.stride


def _unpack(packed: list[Any]) -> View:
    tensor, offset, stride = packed
    return View(tensor, offset, tuple(stride))


def volume(shape: Ints) -> int:
    """Elements of a box."""
    return math.prod(shape)


def contiguous_stride(shape: Ints) -> Ints:
    """Of a row-major tensor of this shape."""
    stride = [1]
    for size in reversed(shape[1:]):
        stride.append(stride[-1] * size)
    return tuple(reversed(stride[: len(shape)]))
