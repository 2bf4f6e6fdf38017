"""What one process does in a refit: its share of the plan, and how parts are cut into messages. Pure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from megatron_fapo.weight_sync.plan import Copy, Hop, Part, Plan
from megatron_fapo.weight_sync.protocol import RefitError
from megatron_fapo.weight_sync.regions import Ints, View

_ALIGNMENT = 16
"""Of pieces in a chunk, bytes: any dtype can be viewed in place."""


@dataclass(frozen=True)
class Share:
    """The hops of one process. A hop is mapped, where the taker can map the tensors of the policy rank that gives, or
    else a message.

    NCCL takes one process of each card. Where a policy rank shares its card with a worker, the worker stands for it:
    it maps the rank's tensors, and sends what the rank would.
    """

    plan: Plan
    """Its hops alone (Plan.of); messages that a worker sends for a policy rank are the worker's, and the rank's too."""
    me: int
    terms: Terms
    stands_for: int | None = None
    """Of a worker: the policy rank that it sends for."""
    stood_for: bool = False
    """Of a policy rank: a worker sends for it."""

    @property
    def messages(self) -> list[Hop]:
        """What this process sends and receives, in an order that is the same for the two processes of each."""
        return [] if self.stood_for else [hop for hop in self.plan.hops if is_message(hop, self.terms.node_messages)]

    @property
    def mapped(self) -> list[Hop]:
        """What is taken by mapping the tensors of a policy rank: by this process, or from it."""
        everything = self.plan.hops
        return [hop for hop in everything if self.stood_for or not is_message(hop, self.terms.node_messages)]

    def to_json(self) -> str:
        return json.dumps([self.plan.to_json(), self.me, asdict(self.terms), self.stands_for, self.stood_for])

    @classmethod
    def from_json(cls, text: str) -> Share:
        plan, me, terms, *about = json.loads(text)
        return cls(Plan.from_json(plan), me, Terms(**terms), *about)


@dataclass(frozen=True)
class Terms:
    """What holds for all processes of a run."""

    node_messages: bool
    """Whether hops between cards of one node are messages."""
    bucket_bytes: int
    """Of messages that a process holds at once, and of tensors that a policy rank mirrors at once, on CPUs."""
    keep_mapped: bool = False
    """Whether what was mapped stays mapped between refits: the policy's tensors stay where they are."""
    chunk_bytes: int = 0
    """Of a message; shares_of sets it."""


def is_message(hop: Hop, node_messages: bool) -> bool:
    """Whether a hop is a message."""
    return hop.link == "network" or hop.depth > 0 or (node_messages and hop.link == "node")


def chunk_size(plan: Plan, *, node_messages: bool, bucket_bytes: int) -> int:
    """Bytes of a chunk at which no process holds more than `bucket_bytes` of a step's messages."""
    return max(bucket_bytes // max(_messages(plan, node_messages).values(), default=1), 1)


def _messages(plan: Plan, node_messages: bool) -> Counter[int]:
    """How many messages of a step each process may have, of those that have any."""
    hops = (hop for hop in plan.hops if is_message(hop, node_messages))
    return Counter(process for hop in hops for process in (hop.giver, hop.taker))


def shares_of(
    plan: Plan, terms: Terms, places: Sequence[tuple[str, str]] | None = None
) -> tuple[list[Share], list[int]]:
    """The share of each process of a plan, and the processes that send or receive messages.

    Args:
        places: node and GPU (empty on CPUs) of every process; None: all are on CPUs.

    Raises:
        RefitError: two processes of one card would have to be in one group of NCCL.
    """
    where = places or [("", "")] * (plan.sources + plan.targets)
    worker_at = {where[i]: i for i in reversed(range(plan.sources, plan.sources + plan.targets)) if where[i][1]}
    sent = {hop.giver for hop in plan.hops if hop.depth == 0 and is_message(hop, terms.node_messages)}
    stand_ins = {giver: worker_at[where[giver]] for giver in sent if where[giver] in worker_at}
    routed = replace(plan, hops=tuple(_sent_by(hop, stand_ins, terms) for hop in plan.hops))
    terms = replace(
        terms, chunk_bytes=chunk_size(routed, node_messages=terms.node_messages, bucket_bytes=terms.bucket_bytes)
    )
    stands_for = {worker: giver for giver, worker in stand_ins.items()}
    if len(stands_for) < len(stand_ins):
        raise RefitError("several policy ranks that send weights share a GPU, which NCCL refuses: give each its own")
    shares = [Share(plan.of(i), i, terms, None, i in stand_ins) for i in range(plan.sources)]
    workers = range(plan.sources, plan.sources + plan.targets)
    shares += [Share(routed.of(i), i, terms, stands_for.get(i)) for i in workers]
    members = sorted(_messages(routed, terms.node_messages))
    cards = Counter(where[i] for i in members if where[i][1])
    if crowded := [f"{gpu} of node {node}" for (node, gpu), count in cards.items() if count > 1]:
        raise RefitError(
            f"several processes that exchange weights share a GPU ({', '.join(crowded[:3])}), which NCCL refuses: set "
            "gpu_share=1, or on one node weight_sync.node_link=map"
        )
    return shares, members


def _sent_by(hop: Hop, stand_ins: Mapping[int, int], terms: Terms) -> Hop:
    if hop.depth == 0 and hop.giver in stand_ins and is_message(hop, terms.node_messages):
        return replace(hop, giver=stand_ins[hop.giver])
    return hop


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one copy in one chunk."""

    copy: int
    first: int
    rows: int
    offset: int
    """Bytes from the chunk's start."""
    nbytes: int


def chunks_of(part: Part, limit: int) -> list[list[Piece]]:
    """Cut a part into chunks of at most `limit` bytes (or one row); giver and takers cut alike."""
    chunks: list[list[Piece]] = [[]]
    end = 0
    for number, copy in enumerate(part.copies):
        rows = copy.shape[0] if copy.shape else 1
        row_bytes = copy.nbytes // rows
        first = 0
        while first < rows:
            fit = min(rows - first, max(limit - end, 0) // row_bytes)
            if fit == 0 and end == 0:
                fit = 1
            if fit == 0:
                chunks.append([])
                end = 0
                continue
            chunks[-1].append(Piece(number, first, fit, end, fit * row_bytes))
            end += -(-fit * row_bytes // _ALIGNMENT) * _ALIGNMENT
            first += fit
    return chunks


def piece_of(copy: Copy, view: View, piece: Piece) -> tuple[View, Ints]:
    """The rows of a piece as view and shape, at the giver's or at the taker's end of its copy."""
    if not copy.shape:
        return view, ()
    return view.moved((piece.first, *([0] * (len(copy.shape) - 1)))), (piece.rows, *copy.shape[1:])
