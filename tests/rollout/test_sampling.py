from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_fapo.data.records import SampleKey
from megatron_fapo.rollout.sampling import assign, sample_seed


def test_seeds_never_change():
    """A changed seed would silently break the comparison of runs across releases."""
    assert sample_seed(0, SampleKey("math/17", 3, 5)) == 6812278762608719112


def test_each_part_of_the_identity_counts():
    base = (0, SampleKey("a/1", 2, 3))
    others = [
        (1, SampleKey("a/1", 2, 3)),
        (0, SampleKey("a/12", 2, 3)),
        (0, SampleKey("a/1", 3, 3)),
        (0, SampleKey("a/1", 2, 4)),
        (0, SampleKey("a/1", 23, 0)),
    ]
    assert len({sample_seed(*base), *(sample_seed(*other) for other in others)}) == 6
    assert all(0 <= sample_seed(*other) < 2**63 for other in others)


@given(st.integers(0, 200), st.integers(1, 17))
def test_assignment_covers_every_position_once_and_is_balanced(count, engines):
    parts = assign(count, engines)
    assert [position for part in parts for position in part] == list(range(count))
    assert len(parts) == engines
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
