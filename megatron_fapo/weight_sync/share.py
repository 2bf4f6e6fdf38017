"""What one process does in a refit: its share of the plan, and how parts are cut into messages. Pure."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

from megatron_fapo.weight_sync.plan import Copy, Hop, Part, Plan
from megatron_fapo.weight_sync.regions import Ints, View

_ALIGNMENT = 16
"""Of pieces in a chunk, bytes: any dtype can be viewed in place."""


@dataclass(frozen=True)
class Share:
    """The hops of one process. A hop is mapped, where the taker can map the tensors of the policy rank that gives, or
    else a message."""

    plan: Plan
    """Its hops alone (Plan.of)."""
    me: int
    node_messages: bool
    """Whether hops between cards of one node are messages too."""
    bucket_bytes: int
    """Of tensors that a policy rank mirrors at once, on CPUs."""
    chunk_bytes: int
    """Of a message."""

    @property
    def messages(self) -> list[Hop]:
        """In an order that is the same for the two processes of each."""
        return [hop for hop in self.plan.hops if is_message(hop, self.node_messages)]

    @property
    def mapped(self) -> list[Hop]:
        return [hop for hop in self.plan.hops if not is_message(hop, self.node_messages)]

    def to_json(self) -> str:
        about = (self.me, self.node_messages, self.bucket_bytes, self.chunk_bytes)
        return json.dumps([self.plan.to_json(), *about])

    @classmethod
    def from_json(cls, text: str) -> Share:
        plan, *about = json.loads(text)
        return cls(Plan.from_json(plan), *about)


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


def shares_of(plan: Plan, *, node_messages: bool, bucket_bytes: int) -> tuple[list[Share], list[int]]:
    """The share of each process of a plan, and the processes that send or receive messages."""
    limit = chunk_size(plan, node_messages=node_messages, bucket_bytes=bucket_bytes)
    processes = range(plan.sources + plan.targets)
    shares = [Share(plan.of(i), i, node_messages, bucket_bytes, limit) for i in processes]
    return shares, sorted(_messages(plan, node_messages))


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
