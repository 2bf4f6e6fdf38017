from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fapo.data.cursor import DataCursor
from megatron_fapo.data.records import Prompt


def prompts(n: int, answer: str = "1") -> list[Prompt]:
    return [Prompt(f"toy/{i}", "toy", ({"role": "user", "content": "q"},), answer, "q", (i, i + 1)) for i in range(n)]


def ids(taken):
    return [(prompt.prompt_id, epoch) for prompt, epoch in taken]


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 12), seed=st.integers(0, 99), takes=st.lists(st.integers(0, 30), max_size=6), shuffle=st.booleans()
)
def test_each_prompt_exactly_once_per_epoch(n, seed, takes, shuffle):
    cursor = DataCursor(prompts(n), seed, shuffle)
    sequence = ids(taken for k in takes for taken in cursor.take(k))
    assert len(sequence) == sum(takes)
    assert [epoch for _, epoch in sequence] == [position // n for position in range(len(sequence))]
    counts = Counter(sequence)
    assert set(counts.values()) <= {1}
    for epoch in range(len(sequence) // n):
        assert {prompt_id for prompt_id, e in counts if e == epoch} == {f"toy/{i}" for i in range(n)}


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 12), seed=st.integers(0, 99), before=st.integers(0, 30), after=st.integers(0, 30))
def test_resumed_equals_uninterrupted(n, seed, before, after):
    straight = DataCursor(prompts(n), seed)
    straight.take(before)
    resumed = DataCursor(prompts(n), seed)
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    assert ids(resumed.take(after)) == ids(straight.take(after))
    assert resumed.state_dict() == straight.state_dict()


def test_size_of_takes_does_not_matter():
    one, many = DataCursor(prompts(7), 3), DataCursor(prompts(7), 3)
    assert ids(one.take(20)) == ids(pair for _ in range(20) for pair in many.take(1))


def test_order_depends_on_seed_and_epoch():
    def orders(seed):
        taken = ids(DataCursor(prompts(30), seed).take(60))
        return [name for name, _ in taken[:30]], [name for name, _ in taken[30:]]

    assert orders(0) == orders(0)
    assert orders(0)[0] != orders(0)[1]
    assert orders(0)[0] != orders(1)[0]


def test_without_shuffle_file_order():
    assert [prompt.prompt_id for prompt, _ in DataCursor(prompts(3), 0, shuffle=False).take(4)] == [
        "toy/0",
        "toy/1",
        "toy/2",
        "toy/0",
    ]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: DataCursor(prompts(5), 0), "fingerprint"),
        (lambda: DataCursor(prompts(6, answer="2"), 0), "fingerprint"),
        (lambda: DataCursor(prompts(6)[::-1], 0), "fingerprint"),
        (lambda: DataCursor(prompts(6), 1), "seed"),
        (lambda: DataCursor(prompts(6), 0, shuffle=False), "shuffle"),
    ],
)
def test_state_of_another_sequence_is_refused(other, named):
    state = DataCursor(prompts(6), 0).state_dict()
    cursor = other()
    before = cursor.state_dict()
    with pytest.raises(ValueError, match=named) as refusal:
        cursor.load_state_dict(state)
    assert "resume with" in str(refusal.value)
    assert cursor.state_dict() == before


def test_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="at least one prompt"):
        DataCursor([], 0)
