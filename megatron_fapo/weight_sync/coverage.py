"""Which boxes of which sources fill which targets, and the proof that they do, each element once. Pure.

`match` refuses, all at once: boxes of an HF tensor that overlap partly, elements that a target wants and no source
holds, tensors that no target wants, elements of a target's tensors that nothing or more than one thing fills, views
that leave their tensor, and sources and targets that differ in the shape or type of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise, product

from megatron_fapo.weight_sync.protocol import RefitError
from megatron_fapo.weight_sync.regions import Index, Ints, View, volume

Box = tuple[Ints, Ints]
"""(first corner, shape), in elements of an HF tensor."""

_SHOWN = 8
_ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int64": 8, "int32": 4}
_ITEM_BYTES |= {"float8_e5m2": 1, "int16": 2, "int8": 1, "uint8": 1, "bool": 1}


class PlanError(RefitError):
    """Sources and targets do not fit together."""

    def __init__(self, problems: Sequence[str]) -> None:
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        super().__init__(
            f"no refit can be planned, {len(problems)} problems (do policy and engine have the same model?):\n  "
            + "\n  ".join(problems[:_SHOWN])
            + more
        )
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class Atom:
    """A box of an HF tensor that a region of a target wants, or the part of it that one box of the sources holds."""

    name: str
    start: Ints
    shape: Ints
    target: View
    nbytes: int
    origin: Ints
    """First corner of the box that the sources hold."""
    holders: Mapping[int, View]
    """Kind of source -> its view of the whole of that box."""

    def source(self, kind: int) -> View:
        """Where a source of this kind has the atom."""
        return self.holders[kind].moved(tuple(s - o for s, o in zip(self.start, self.origin, strict=True)))

    def cut(self, pieces: int) -> Iterator[Atom]:
        """About equal slices of the first dimension that has so many elements; the atom itself if none has."""
        dim = next((d for d, size in enumerate(self.shape) if size >= pieces), None)
        if dim is None or pieces == 1:
            yield self
            return
        size = self.shape[dim]
        for low, high in pairwise(size * i // pieces for i in range(pieces + 1)):
            by = tuple(low if d == dim else 0 for d in range(len(self.shape)))
            shape = (*self.shape[:dim], high - low, *self.shape[dim + 1 :])
            start = tuple(s + b for s, b in zip(self.start, by, strict=True))
            nbytes = self.nbytes // size * (high - low)
            yield replace(self, start=start, shape=shape, target=self.target.moved(by), nbytes=nbytes)


def match(sources: Sequence[Index], targets: Sequence[Index]) -> list[list[Atom]]:
    """Of every target, in the order of its regions, the atoms that fill it.

    Args:
        sources, targets: one index of each kind.

    Raises:
        PlanError: they do not fit together; names everything that does not.
    """
    problems = [p for kind, index in enumerate(sources) for p in _wrong_views(index, f"source kind {kind}")]
    problems += [p for kind, index in enumerate(targets) for p in _wrong_views(index, f"target kind {kind}")]
    if problems:
        raise PlanError(problems)
    held = _holders(sources)
    for name, boxes in held.items():
        problems += [
            f"sources hold {show(name, a)} and {show(name, b)}, which overlap partly"
            for a, b in combinations(boxes, 2)
            if intersection(a, b)
        ]
    differ = _shape_problems(held, targets)
    problems += differ.values()
    atoms = []
    for kind, index in enumerate(targets):
        found, wrong = _fill(index, held, sources, set(differ))
        atoms.append(found)
        problems += [f"{p} (target kind {kind})" for p in wrong + _tiling_problems(index)]
    if problems:
        raise PlanError(problems)
    return atoms


def _holders(sources: Sequence[Index]) -> dict[str, dict[Box, dict[int, View]]]:
    """HF tensor -> box -> kind -> its view. A kind that holds a box twice (tied weights) gives its first."""
    held: dict[str, dict[Box, dict[int, View]]] = {}
    for kind, index in enumerate(sources):
        for region in index.regions:
            held.setdefault(region.name, {}).setdefault((region.start, region.shape), {}).setdefault(kind, region.view)
    return held


def _wrong_views(index: Index, where: str) -> Iterator[str]:
    named = [(show(r.name, (r.start, r.shape)), r.shape, r.view) for r in index.regions]
    for name, shape, view in [*named, *(("fill", f.shape, f.view) for f in index.fills)]:
        tensor = index.tensors.get(view.tensor)
        if tensor is None:
            yield f"{where}: {name} lies in {view.tensor}, which is no tensor of it"
        elif tensor.dtype not in _ITEM_BYTES:
            yield f"{where}: {view.tensor} is of the unknown type {tensor.dtype}"
        elif len(shape) != len(view.stride) or min(shape, default=1) < 1 or min((view.offset, *view.stride)) < 0:
            yield f"{where}: the view of {name} in {view.tensor} has shape {shape}, stride {view.stride}"
        elif view.offset + sum((n - 1) * s for n, s in zip(shape, view.stride, strict=True)) >= volume(tensor.shape):
            yield f"{where}: {name} leaves {view.tensor}, which has shape {tensor.shape}"


def _shape_problems(held: Mapping[str, Mapping[Box, object]], targets: Sequence[Index]) -> dict[str, str]:
    """HF tensor -> how its shapes differ: an engine that wants fewer rows than the policy has is another model."""
    wanted: dict[str, set[Box]] = {}
    for index in targets:
        for region in index.regions:
            wanted.setdefault(region.name, set()).add((region.start, region.shape))
    problems = {name: f"no target wants {name}, which sources hold" for name in held if name not in wanted}
    for name, boxes in wanted.items():
        if name not in held:
            problems[name] = f"no source holds {name}, which targets want"
        elif (here := _extent(held[name])) != (there := _extent(boxes)):
            problems[name] = f"{name} has shape {here} in sources, {there} in targets"
    return problems


def _extent(boxes: Mapping[Box, object] | set[Box]) -> Ints:
    ends = [tuple(s + n for s, n in zip(start, shape, strict=True)) for start, shape in boxes]
    if len({len(end) for end in ends}) > 1:
        return ()
    return tuple(max(sizes) for sizes in zip(*ends, strict=True))


def _fill(
    index: Index, held: Mapping[str, Mapping[Box, Mapping[int, View]]], sources: Sequence[Index], skip: set[str]
) -> tuple[list[Atom], list[str]]:
    """The atoms of one target, and what it wants that nobody holds, or in another type."""
    atoms: list[Atom] = []
    problems = []
    for region in index.regions:
        if region.name in skip:
            continue
        whole, dtype = (region.start, region.shape), index.tensors[region.view.tensor].dtype
        missing = volume(region.shape)
        for box, holders in held[region.name].items():
            both = intersection(whole, box)
            if both is None:
                continue
            start, shape = both
            count = volume(shape)
            missing -= count
            view = region.view.moved(tuple(a - b for a, b in zip(start, region.start, strict=True)))
            atoms.append(Atom(region.name, start, shape, view, count * _ITEM_BYTES[dtype], box[0], holders))
            types = {sources[kind].tensors[v.tensor].dtype for kind, v in holders.items()} - {dtype}
            problems += [f"{show(region.name, both)} is {t} in sources, {dtype} in {view.tensor}" for t in types]
        if missing > 0:
            holes = [whole]
            for box in held[region.name]:
                holes = [rest for hole in holes for rest in subtract(hole, box)]
            problems += [f"no source holds {show(region.name, hole)}, wanted by {region.view.tensor}" for hole in holes]
    return atoms, problems


def _tiling_problems(index: Index) -> list[str]:
    """Elements of the target's own tensors that nothing fills, or more than one region or fill."""
    runs: dict[str, list[tuple[int, int]]] = {name: [] for name in index.tensors}
    for shape, view in [*((r.shape, r.view) for r in index.regions), *((f.shape, f.view) for f in index.fills)]:
        runs[view.tensor] += _runs(shape, view)
    problems = []
    for name, found in runs.items():
        size, end = volume(index.tensors[name].shape), 0
        for low, high in [*sorted(found), (size, size)]:
            if low > end:
                problems.append(f"nothing fills {_span(name, index, end, low)}")
            elif low < end:
                problems.append(f"more than one region fills {_span(name, index, low, min(end, high))}")
            end = max(end, high)
    return problems


def _runs(shape: Ints, view: View) -> Iterator[tuple[int, int]]:
    """(first element, end) of every contiguous run of a view."""
    dims: list[range] = []
    run = 1
    for stride, size in sorted((s, n) for n, s in zip(shape, view.stride, strict=True) if n > 1):
        if stride == run and not dims:
            run *= size
        else:
            dims.append(range(0, stride * size, stride))
    for offsets in product(*dims):
        low = view.offset + sum(offsets)
        yield low, low + run


def _span(name: str, index: Index, low: int, high: int) -> str:
    shape = index.tensors[name].shape
    first, last = ([at // math.prod(shape[d + 1 :]) % n for d, n in enumerate(shape)] for at in (low, high - 1))
    return f"{name} of shape {shape} from {first} to {last}"


def intersection(a: Box, b: Box) -> Box | None:
    """The box that both have."""
    if len(a[0]) != len(b[0]):
        return None
    start = tuple(map(max, a[0], b[0]))
    shape = tuple(min(s + n, t + m) - low for s, n, t, m, low in zip(*a, *b, start, strict=True))
    return (start, shape) if min(shape, default=1) > 0 else None


def subtract(box: Box, by: Box) -> list[Box]:
    """What is left of a box without another, in boxes."""
    both = intersection(box, by)
    if both is None:
        return [box]
    rest, (start, shape) = [], (list(box[0]), list(box[1]))
    for dim, (low, size) in enumerate(zip(*both, strict=True)):
        before, after = low - start[dim], start[dim] + shape[dim] - low - size
        for first, count in ((start[dim], before), (low + size, after)):
            if count:
                rest.append(((*start[:dim], first, *start[dim + 1 :]), (*shape[:dim], count, *shape[dim + 1 :])))
        start[dim], shape[dim] = low, size
    return rest


def show(name: str, box: Box) -> str:
    """As one would index it: `lm_head.weight[0:128, 0:64]`."""
    return f"{name}[{', '.join(f'{s}:{s + n}' for s, n in zip(*box, strict=True))}]"
