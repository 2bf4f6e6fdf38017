"""How a part is cut into messages, for parts of any make."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fapo.weight_sync.plan import Copy, Endpoint, Part, make_plan
from megatron_fapo.weight_sync.protocol import RefitError
from megatron_fapo.weight_sync.regions import View, contiguous_stride, volume
from megatron_fapo.weight_sync.share import Share, Terms, chunks_of, piece_of, shares_of
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
        shares, members = shares_of(plan, Terms(node_messages, 1000))
        assert [Share.from_json(share.to_json()) for share in shares] == shares
        for share in shares:
            assert len(share.messages) + len(share.mapped) == len(share.plan.hops)
            assert 0 < len(share.messages) * share.terms.chunk_bytes <= 1000 or not share.messages
            assert bool(share.messages) == (share.me in members)
            links = {hop.link for hop in share.mapped}
            assert "network" not in links
            assert node_messages <= ("node" not in links)


def test_a_worker_sends_for_the_policy_rank_of_its_card_and_no_card_has_two_members() -> None:
    shapes = {"a": (64, 64), "b": (8, 8)}
    places = [("x", "g0"), ("x", "g1"), ("x", "g0"), ("y", "g0")]  # two policy ranks, then two workers
    sources = [Endpoint(*places[rank], rows_of(shapes, 2, rank)) for rank in range(2)]
    workers = [Endpoint(*places[2 + i], columns_of(shapes, 2, i)) for i in range(2)]
    shares, members = shares_of(make_plan(sources, workers), Terms(True, 1000), places)
    assert [share.stands_for for share in shares] == [None, None, 0, None]
    assert [share.stood_for for share in shares] == [True, False, False, False]
    assert members == [1, 2, 3]
    assert shares[0].messages == []
    assert {hop.taker for hop in shares[0].mapped} == {2, 3}, "it exposes what is sent for it too"
    assert {(hop.giver, hop.taker) for hop in shares[2].messages} == {(1, 2), (2, 3)}
    assert {(hop.giver, hop.taker) for hop in shares[2].mapped} == {(0, 2)}
    assert shares[1].messages + shares[2].messages != []
    assert [Share.from_json(share.to_json()) for share in shares] == shares
    crowded = [*places[:2], ("y", "g0"), ("y", "g0")]
    twice = [Endpoint(*crowded[2 + i], columns_of(shapes, 2, i)) for i in range(2)]
    with pytest.raises(RefitError, match="g0 of node y"):
        shares_of(make_plan(sources, twice), Terms(True, 1000), crowded)


@pytest.mark.parametrize("limit", [1, 10**9])
def test_limits_of_any_size(limit: int) -> None:
    chunks = chunks_of(part_of([[4, 3], [], [2]], 4), limit)
    assert len(chunks) == (7 if limit == 1 else 1)
