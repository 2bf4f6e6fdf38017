"""Who gives which bytes to whom at every refit. Pure: indexes in, parts and hops out.

Processes with equal indexes form a kind (replicas of policy or engine); what one kind gives another is worked out once.
Copies with the same holders and the same takers form a group, and groups are routed:

- Sources on the taker's own node give directly: on the taker's GPU before others, then whoever has given least. Copies
  too small to matter come with a hop that is there anyway.
- What no source on the node holds crosses the network to it once. The workers that want it are a cohort: they take a
  share each, through their own NICs, and pass it on to the others of the cohort.
- To node after node a share goes from whoever has it: from a source, or else from as near to a source as can be, among
  those whose NIC would not send more than the busiest NIC has to take in anyhow. So while the sources can feed all
  nodes they do; where they cannot, nodes pass on to others in chains, which costs no NIC more (full duplex) and one
  chunk's time a hop, and the busiest NIC carries about one node's share, however many replicas there are. If all are
  at their limit, the least busy gives.

Everything is balanced greedily by bytes, largest first, ties by number: the same input gives the same plan.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_fapo.weight_sync.coverage import Atom, Box, intersection, match, subtract
from megatron_fapo.weight_sync.regions import Index, Ints, View, volume

LINKS = ("local", "node", "network")
"""Same GPU, same node, another node."""
_SMALL = 1 / 256
"""Of what a target wants: a smaller group is neither split nor worth a hop of its own."""
_GRAIN = 64
"""Copies of more than this part of a share are cut, so that shares are equal and all of them pass through the layers
together."""
_SLACK = 1.1
"""What a NIC may send beyond the busiest one's intake: shares do not add up to it exactly, and without room to spare
one that does not fit pushes out others."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Elements of one HF tensor on their way: the same shape seen in the giver's tensor and in the taker's."""

    name: str
    """HF tensor."""
    shape: Ints
    source: View
    target: View
    nbytes: int


@dataclass(frozen=True)
class Part:
    """Copies from one kind of source, in the order of the target's index. Their packed form is one after the other."""

    copies: tuple[Copy, ...]

    @cached_property
    def nbytes(self) -> int:
        return sum(copy.nbytes for copy in self.copies)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A process of a refit."""

    node: str
    """Ray's id of the node."""
    gpu: str
    """UUID; empty on CPUs."""
    index: Index


@dataclass(frozen=True, slots=True)
class Hop:
    """One process gives a part to another. Numbers of processes: sources first, from 0; then targets."""

    part: int
    giver: int
    taker: int
    link: str
    """One of LINKS."""
    depth: int
    """0: the giver is a source. Else a target that took this part at depth - 1 and passes it on."""


@dataclass(frozen=True)
class Plan:
    """What every process gives and takes. Hops are in order of (part, depth): in that order, none waits for a later."""

    sources: int
    targets: int
    parts: tuple[Part, ...]
    hops: tuple[Hop, ...]
    minimum: Mapping[str, int]
    """Bytes by link that no plan can go below. local: what a source on the target's GPU holds. network: of every node,
    the elements of the HF checkpoint that its targets want and none of its sources holds, once. node: the rest of what
    targets want."""

    def of(self, process: int) -> Plan:
        """What one process needs: its own hops, and of the parts of others none of the copies."""
        hops = tuple(self._by_process.get(process, ()))
        mine = {hop.part for hop in hops}
        parts = tuple(part if i in mine else Part(()) for i, part in enumerate(self.parts))
        return replace(self, parts=parts, hops=hops)

    @cached_property
    def _by_process(self) -> dict[int, list[Hop]]:
        return _lists((process, hop) for hop in self.hops for process in (hop.giver, hop.taker))

    def bytes_by_link(self) -> dict[str, int]:
        """What all hops together move."""
        moved = dict.fromkeys(LINKS, 0)
        for hop in self.hops:
            moved[hop.link] += self.parts[hop.part].nbytes
        return moved

    @property
    def bytes_over_minimum(self) -> float:
        """Bytes moved by link over the minimum, of the link where that is most; 1.0 is perfect."""
        moved = self.bytes_by_link()
        return max((moved[link] / least for link, least in self.minimum.items() if least), default=1.0)

    def to_json(self) -> str:
        """Compact, and the same for equal plans."""
        parts = [
            [[c.name, c.shape, *_pack(c.source), *_pack(c.target), c.nbytes] for c in p.copies] for p in self.parts
        ]
        hops = [[h.part, h.giver, h.taker, LINKS.index(h.link), h.depth] for h in self.hops]
        found = [self.sources, self.targets, parts, hops, [self.minimum[link] for link in LINKS]]
        return json.dumps(found, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        sources, targets, parts, hops, minimum = json.loads(text)
        return cls(
            sources,
            targets,
            tuple(
                Part(
                    tuple(
                        Copy(name, tuple(shape), View(a, i, tuple(s)), View(b, j, tuple(t)), nbytes)
                        for name, shape, a, i, s, b, j, t, nbytes in copies
                    )
                )
                for copies in parts
            ),
            tuple(Hop(part, giver, taker, LINKS[link], depth) for part, giver, taker, link, depth in hops),
            dict(zip(LINKS, minimum, strict=True)),
        )


def _pack(view: View) -> tuple[str, int, Ints]:
    return view.tensor, view.offset, view.stride


def make_plan(sources: Sequence[Endpoint], targets: Sequence[Endpoint]) -> Plan:
    """The plan of all refits between these processes.

    Raises:
        PlanError: sources do not hold exactly what targets want; names every hole, overlap and mismatch.
    """
    return _Planner(sources, targets).plan()


def _kinds(endpoints: Sequence[Endpoint]) -> tuple[list[Index], list[int]]:
    """(one index of each kind, the kind of each process)."""
    by_object: dict[int, str] = {}
    numbers: dict[str, int] = {}
    indexes: list[Index] = []
    kinds = []
    for endpoint in endpoints:
        key = by_object.setdefault(id(endpoint.index), "") or endpoint.index.to_json()
        by_object[id(endpoint.index)] = key
        if key not in numbers:
            numbers[key] = len(indexes)
            indexes.append(endpoint.index)
        kinds.append(numbers[key])
    return indexes, kinds


@dataclass(frozen=True)
class _Group:
    """Atoms that the same kinds of sources hold and the same kinds of targets want in the same place."""

    number: int
    holders: tuple[int, ...]
    atoms: tuple[Atom, ...]
    nbytes: int
    small: bool


@dataclass
class _Share:
    """One of the pieces of a group that cross the network, and where it has been brought so far."""

    group: _Group
    number: int
    of: int
    atoms: tuple[Atom, ...]
    cohorts: list[list[int]]
    """Of every node that wants it, the targets; the first takes it over the network and passes it on."""
    taken: dict[int, tuple[int, int]]
    """Taker over the network -> (part, depth) as it got there."""

    @cached_property
    def nbytes(self) -> int:
        return sum(atom.nbytes for atom in self.atoms)


class _Planner:
    def __init__(self, sources: Sequence[Endpoint], targets: Sequence[Endpoint]) -> None:
        self.sources, self.targets = sources, targets
        self.source_indexes, self.source_kinds = _kinds(sources)
        self.target_indexes, self.target_kinds = _kinds(targets)
        self.wanted = match(self.source_indexes, self.target_indexes)
        self.by_kind: dict[int, list[int]] = _lists((kind, s) for s, kind in enumerate(self.source_kinds))
        self.on_node: dict[tuple[str, int], list[int]] = _lists(
            ((source.node, kind), s) for s, (source, kind) in enumerate(zip(sources, self.source_kinds, strict=True))
        )
        self.groups = self._make_groups()
        self.parts: dict[Hashable, int] = {}
        """What a part is made of -> its number."""
        self.copies: list[tuple[Copy, ...]] = []
        self.hops: list[Hop] = []

    def plan(self) -> Plan:
        far = self._near()
        self._network(self._shares(far))
        order = sorted(range(len(self.copies)), key=lambda part: (self._position(self.copies[part][0]), part))
        renumbered = {part: i for i, part in enumerate(order)}
        hops = [replace(hop, part=renumbered[hop.part]) for hop in self.hops]
        return Plan(
            len(self.sources),
            len(self.targets),
            tuple(Part(self.copies[part]) for part in order),
            tuple(sorted(hops, key=lambda hop: (hop.part, hop.depth, hop.giver, hop.taker))),
            self._minimum(),
        )

    def _make_groups(self) -> list[list[_Group]]:
        """Of every kind of target, the groups that it wants, largest first; a group of several kinds is one object."""
        takers: dict[tuple[str, Ints, Ints, View], list[int]] = _lists(
            ((a.name, a.start, a.shape, a.target), kind) for kind, atoms in enumerate(self.wanted) for a in atoms
        )
        alike: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Atom]] = {}
        for kind, atoms in enumerate(self.wanted):
            for a in atoms:
                wanting = takers[a.name, a.start, a.shape, a.target]
                if kind == wanting[0]:
                    alike.setdefault((tuple(sorted(a.holders)), tuple(wanting)), []).append(a)
        most = max((sum(a.nbytes for a in atoms) for atoms in self.wanted), default=0)
        groups: list[list[_Group]] = [[] for _ in self.wanted]
        for number, ((holders, kinds), atoms) in enumerate(alike.items()):
            nbytes = sum(a.nbytes for a in atoms)
            group = _Group(number, holders, tuple(atoms), nbytes, nbytes < most * _SMALL)
            for kind in kinds:
                groups[kind].append(group)
        self.place = {r.name: i for index in reversed(self.target_indexes) for i, r in enumerate(index.regions)}
        return [sorted(each, key=lambda g: (-g.nbytes, g.number)) for each in groups]

    def _position(self, copy: Copy) -> int:
        """Of an HF tensor in the order of the targets."""
        return self.place[copy.name]

    def _near(self) -> dict[tuple[int, str], list[int]]:
        """Hops from sources to targets of their own node; returns what has to come from others: (group, node) ->
        takers."""
        far: dict[tuple[int, str], list[int]] = defaultdict(list)
        sent = [0] * len(self.sources)
        for t, (target, kind) in enumerate(zip(self.targets, self.target_kinds, strict=True)):
            given: dict[int, list[_Group]] = defaultdict(list)
            for group in self.groups[kind]:
                near = [s for k in group.holders for s in self.on_node.get((target.node, k), ())]
                if not near:
                    far[group.number, target.node].append(t)
                    continue

                def cost(s: int, small: bool = group.small, given: Mapping[int, object] = given) -> tuple[int, ...]:
                    return (self._link(s, t) != "local", small and s not in given, sent[s], s)  # noqa: B023

                best = min(near, key=cost)
                given[best].append(group)
                if self._link(best, t) == "node":
                    sent[best] += group.nbytes
            for s, groups in given.items():
                part = self._part_of_groups(s, kind, groups)
                self.hops.append(Hop(part, s, len(self.sources) + t, self._link(s, t), 0))
        return far

    def _link(self, source: int, target: int) -> str:
        a, b = self.sources[source], self.targets[target]
        return "network" if a.node != b.node else "local" if a.gpu and a.gpu == b.gpu else "node"

    def _part_of_groups(self, source: int, kind: int, groups: Iterable[_Group]) -> int:
        """Whole groups, in the order of this kind of target."""
        giver, numbers = self.source_kinds[source], tuple(sorted(g.number for g in groups))
        atoms = {(a.name, a.start, a.shape, a.target) for g in groups for a in g.atoms}
        return self._part(
            (giver, kind, numbers),
            giver,
            lambda: [a for a in self.wanted[kind] if (a.name, a.start, a.shape, a.target) in atoms],
        )

    def _part(self, key: Hashable, giver: int, atoms: Callable[[], Iterable[Atom]]) -> int:
        if key not in self.parts:
            self.parts[key] = len(self.copies)
            copies = (Copy(a.name, a.shape, a.source(giver), a.target, a.nbytes) for a in atoms())
            self.copies.append(_coalesced(copies))
        return self.parts[key]

    def _shares(self, far: Mapping[tuple[int, str], list[int]]) -> list[_Share]:
        """What crosses the network, cut so that the workers of every cohort take equally much; largest first."""
        groups = {group.number: group for each in self.groups for group in each}
        nodes: dict[int, list[list[int]]] = _lists((number, takers) for (number, _), takers in sorted(far.items()))
        taken: dict[Hashable, int] = defaultdict(int)
        shares = []
        for number in sorted(nodes, key=lambda n: (-groups[n].nbytes, n)):
            group, cohorts = groups[number], nodes[number]
            count = 1 if group.small else math.lcm(*(len(cohort) for cohort in cohorts))
            for i, atoms in enumerate(_cut(group.atoms, count)):
                if not atoms:  # fewer elements than workers
                    continue
                share = _Share(group, i, count, atoms, [], {})
                for cohort in cohorts:
                    first = min(cohort, key=lambda t: (taken[self._nic(len(self.sources) + t)], t))
                    taken[self._nic(len(self.sources) + first)] += share.nbytes
                    share.cohorts.append([first, *(t for t in cohort if t != first)])
                shares.append(share)
        self.intake = max(taken.values(), default=0)
        return shares

    def _nic(self, process: int) -> Hashable:
        """What a process sends and takes through: that of its GPU; on CPUs every process counts for itself."""
        count = len(self.sources)
        end = self.sources[process] if process < count else self.targets[process - count]
        return (end.node, end.gpu) if end.gpu else process

    def _network(self, shares: Sequence[_Share]) -> None:
        """Hops of every share to all nodes that want it: to one node each first, then to the next of each."""
        sent: dict[Hashable, int] = defaultdict(int)
        limit = self.intake
        for turn in range(max((len(share.cohorts) for share in shares), default=0)):
            for share in shares:
                if turn < len(share.cohorts):
                    self._bring(share, share.cohorts[turn], sent, limit * _SLACK)
            if turn == 0:  # if a source must send more than that, others may, too
                limit = max([limit, *sent.values()])

    def _bring(self, share: _Share, cohort: Sequence[int], sent: dict[Hashable, int], limit: float) -> None:
        """A share to one more node."""
        count, first = len(self.sources), len(self.sources) + cohort[0]
        givers = [(s, 0) for kind in share.group.holders for s in self.by_kind[kind]]
        givers += [(t, depth + 1) for t, (_, depth) in share.taken.items()]

        def cost(giver: tuple[int, int]) -> tuple[float, ...]:
            process, depth = giver
            load = sent[self._nic(process)] + share.nbytes
            return (0, depth, load, process) if load <= limit else (1, load, depth, process)

        giver, depth = min(givers, key=cost)
        if depth:
            part, _ = share.taken[giver]
        else:
            kind = self.source_kinds[giver]
            part = self._part((kind, share.group.number, share.number, share.of), kind, lambda: share.atoms)
        sent[self._nic(giver)] += share.nbytes
        share.taken[first] = part, depth
        self.hops.append(Hop(part, giver, first, "network", depth))
        self.hops += [Hop(part, first, count + t, "node", depth + 1) for t in cohort[1:]]

    def _minimum(self) -> dict[str, int]:
        """See `Plan.minimum`. Nodes with the same kinds of processes are worked out once."""
        nodes: dict[str, tuple[set[int], set[int]]] = defaultdict(lambda: (set(), set()))
        cards: dict[Hashable, set[int]] = defaultdict(set)
        for source, kind in zip(self.sources, self.source_kinds, strict=True):
            nodes[source.node][0].add(kind)
            if source.gpu:
                cards[source.node, source.gpu].add(kind)
        local = wanted = 0
        for target, kind in zip(self.targets, self.target_kinds, strict=True):
            nodes[target.node][1].add(kind)
            wanted += sum(g.nbytes for g in self.groups[kind])
            here = cards.get((target.node, target.gpu), set())
            local += sum(g.nbytes for g in self.groups[kind] if not here.isdisjoint(g.holders))
        alike: dict[tuple[frozenset[int], frozenset[int]], int] = defaultdict(int)
        for held, takers in nodes.values():
            alike[frozenset(held), frozenset(takers)] += 1
        network = sum(count * self._missing(*kinds) for kinds, count in alike.items())
        return {"local": local, "node": wanted - local - network, "network": network}

    def _missing(self, held: frozenset[int], takers: frozenset[int]) -> int:
        """Bytes of the checkpoint that these kinds of targets want and none of these kinds of sources holds."""
        boxes: dict[tuple[str, Ints], dict[Box, int]] = defaultdict(dict)
        for atom in (a for kind in sorted(takers) for a in self.wanted[kind] if held.isdisjoint(a.holders)):
            boxes[atom.name, atom.origin][atom.start, atom.shape] = atom.nbytes
        return sum(_union_bytes(each) for each in boxes.values())


def _lists[K: Hashable, T](pairs: Iterable[tuple[K, T]]) -> dict[K, list[T]]:
    found: dict[K, list[T]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found


def _union_bytes(boxes: Mapping[Box, int]) -> int:
    """Of boxes of one HF tensor that may overlap."""
    total, before = 0, list[Box]()
    for box, nbytes in boxes.items():
        rest = [box]
        for other in before:
            if intersection(box, other):
                rest = [piece for each in rest for piece in subtract(each, other)]
        total += nbytes // volume(box[1]) * sum(volume(shape) for _, shape in rest)
        before.append(box)
    return total


def _cut(atoms: Sequence[Atom], count: int) -> list[tuple[Atom, ...]]:
    """So many shares of about equal bytes, each in the order of the atoms."""
    total, sizes = sum(a.nbytes for a in atoms), [0] * count
    shares: list[list[Atom]] = [[] for _ in sizes]
    for atom in atoms:
        for piece in atom.cut(count) if atom.nbytes * count * _GRAIN > total else (atom,):
            least = min(range(count), key=sizes.__getitem__)
            shares[least].append(piece)
            sizes[least] += piece.nbytes
    return [tuple(share) for share in shares]


def _coalesced(copies: Iterable[Copy]) -> tuple[Copy, ...]:
    """Copies that go on where the one before ends, in the HF tensor and on both sides, as one."""
    joined: list[Copy] = []
    for copy in copies:
        if joined and (both := _join(joined[-1], copy)):
            joined[-1] = both
        else:
            joined.append(copy)
    return tuple(joined)


def _join(a: Copy, b: Copy) -> Copy | None:
    same = a.name == b.name and (a.source.stride, a.target.stride) == (b.source.stride, b.target.stride)
    if not same or (a.source.tensor, a.target.tensor) != (b.source.tensor, b.target.tensor):
        return None
    for dim, size in enumerate(a.shape):
        if (*a.shape[:dim], *a.shape[dim + 1 :]) == (*b.shape[:dim], *b.shape[dim + 1 :]):
            by = tuple(size if d == dim else 0 for d in range(len(a.shape)))
            if a.source.moved(by) == b.source and a.target.moved(by) == b.target:
                shape = (*a.shape[:dim], size + b.shape[dim], *a.shape[dim + 1 :])
                return replace(a, shape=shape, nbytes=a.nbytes + b.nbytes)
    return None
