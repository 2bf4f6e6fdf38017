"""A range of a flattened tensor as boxes."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_fapo.policy.optimizer_shards import boxes


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_boxes_are_the_range_in_its_order_and_few(shape: list[int], data: st.DataObject) -> None:
    numbers = np.arange(math.prod(shape)).reshape(shape)
    start = data.draw(st.integers(0, numbers.size))
    stop = data.draw(st.integers(start, numbers.size))
    found = boxes(tuple(shape), start, stop)
    places = [tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True)) for offset, size in found]
    assert [n for place in places for n in numbers[place].flatten()] == list(range(start, stop))
    assert all(numbers[place].shape == size for place, (_, size) in zip(places, found, strict=True))
    assert len(found) <= 2 * len(shape) - 1


def test_a_range_that_ends_where_the_next_begins_leaves_nothing_between() -> None:
    assert boxes((4, 6), 0, 24) == [((0, 0), (4, 6))]
    assert boxes((4, 6), 3, 20) == [((0, 3), (1, 3)), ((1, 0), (2, 6)), ((3, 0), (1, 2))]
    assert boxes((4, 6), 7, 9) == [((1, 1), (1, 2))]
    assert boxes((4, 6), 6, 6) == boxes((4, 6), 20, 12) == []
