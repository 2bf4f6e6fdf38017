"""How a part is cut into messages, for parts of any make."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fapo.weight_sync.plan import Copy, Endpoint, Part, make_plan
from megatron_fapo.weight_sync.regions import View, contiguous_stride, volume
from megatron_fapo.weight_sync.share import Share, chunks_of, piece_of, shares_of
from tests.weight_sync.plain import columns_of, rows_of

SHAPES = st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=6)


def part_of(shapes: list[list[int]], item: int) -> Part:
    views = [View(f"t{i}", 5, contiguous_stride(tuple(shape))) for i, shape in enumerate(shapes)]
    return Part(tuple(Copy("x", tuple(s), v, v, volume(tuple(s)) * item) for s, v in zip(shapes, views, strict=True)))


@given(shapes=SHAPES, item=st.sampled_from([1, 2, 4]), limit=st.integers(1, 400))
@settings(max_examples=200, deadline=None)
def test_chunks_hold_every_row_once_and_keep_to_their_size(shapes: list[list[int]], item: int, limit: int) -> None:
    part = part_of(shapes, item)
    chunks = chunks_of(part, limit)
    rows = [(p.copy, row) for chunk in chunks for p in chunk for row in range(p.first, p.first + p.rows)]
    assert rows == [(i, row) for i, shape in enumerate(shapes) for row in range(shape[0] if shape else 1)]
    for chunk in chunks:
        ends = [(p.offset, p.offset + p.nbytes) for p in chunk]
        assert all(end <= start for (_, end), (start, _) in pairwise(ends))
        assert ends[-1][1] <= limit or (len(chunk) == 1 and chunk[0].rows == 1)
        for p in chunk:
            copy = part.copies[p.copy]
            view, shape = piece_of(copy, copy.source, p)
            assert volume(shape) * item == p.nbytes
            assert view.offset == 5 + (p.first * copy.source.stride[0] if copy.shape else 0)


def test_a_share_survives_the_wire_and_messages_fit_a_bucket() -> None:
    shapes = {"a": (64, 64), "b": (8, 8)}
    ends = [Endpoint("x", "g0", rows_of(shapes, 2, 0)), Endpoint("y", "g0", rows_of(shapes, 2, 1))]
    workers = [Endpoint("x", f"g{i}", columns_of(shapes, 2, i)) for i in range(2)]
    plan = make_plan(ends, workers)
    assert {hop.link for hop in plan.hops} == {"local", "node", "network"}
    for node_messages in (False, True):
        shares, members = shares_of(plan, node_messages=node_messages, bucket_bytes=1000)
        assert [Share.from_json(share.to_json()) for share in shares] == shares
        for share in shares:
            assert len(share.messages) + len(share.mapped) == len(share.plan.hops)
            assert len(share.messages) * share.chunk_bytes <= 1000
            assert bool(share.messages) == (share.me in members)
            links = {hop.link for hop in share.mapped}
            assert "network" not in links
            assert node_messages <= ("node" not in links)


@pytest.mark.parametrize("limit", [1, 10**9])
def test_limits_of_any_size(limit: int) -> None:
    chunks = chunks_of(part_of([[4, 3], [], [2]], 4), limit)
    assert len(chunks) == (7 if limit == 1 else 1)
