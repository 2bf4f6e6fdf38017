"""Schedules: invariants on arbitrary lengths, and waste on the recipe's."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.packing import RECIPE, draws
from megatron_fapo.plan.shapes import BUILT_IN
from megatron_fapo.policy.packing import CostModel, Schedule, schedule, waste

LINEAR = CostModel(0.0)


def up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.integers(1, 300) | st.sampled_from([1, 50, 51, 100]), max_size=60),
    ranks=st.integers(1, 5),
    max_tokens=st.integers(1, 400) | st.just(100),
    quadratic=st.sampled_from([0.0, 1e-3, 1.0]),
    multiple=st.integers(1, 4),
    round_to=st.integers(1, 8),
)
@example(
    lengths=[60, 60, 41, 39], ranks=1, max_tokens=100, quadratic=0.0, multiple=1, round_to=1
)  # 60 + 41 is too much
def test_invariants(
    lengths: list[int], ranks: int, max_tokens: int, quadratic: float, multiple: int, round_to: int
) -> None:
    cost = CostModel(quadratic)
    options = {"data_ranks": ranks, "max_tokens": max_tokens, "count_multiple": multiple, "round_to": round_to}
    made = schedule(lengths, cost=cost, **options)
    rows = made.micro_batches
    parts = [part for row in rows for part in row]
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    for part in parts:
        assert sum(up(lengths[i], round_to) for i in part) <= max_tokens or len(part) == 1
    assert len(rows) == ranks
    assert len({len(row) for row in rows}) == 1
    assert len(rows[0]) > 0
    assert len(rows[0]) % multiple == 0
    if any(not part for part in parts):
        assert len(lengths) < len(parts)
        assert all(len(part) <= 1 for part in parts)
    costs = [[sum(cost.of(up(lengths[i], round_to)) for i in part) for part in row] for row in rows]
    assert all(row == sorted(row, reverse=True) for row in costs)
    assert schedule(lengths, cost=cost, **options) == made
    # At most twice as many as tokens need, beside those that long samples and whole counts ask for.
    needed = -(-sum(up(n, round_to) for n in lengths) // max_tokens) + sum(
        up(n, round_to) > max_tokens for n in lengths
    )
    assert len(parts) <= 2 * needed + 2 * ranks * multiple
    figures = waste(made, lengths, cost, max_tokens=max_tokens, round_to=round_to)
    assert -1e-9 <= figures.floor <= figures.total + 1e-9 <= figures.lockstep + 2e-9
    assert -1e-9 <= figures.micro_batches < 1
    assert 0 <= figures.padding < 1


@pytest.mark.parametrize("name", RECIPE)
def test_waste_is_under_5_percent_on_the_recipe(name: str) -> None:
    model, *_, max_tokens = RECIPE[name]
    cost = CostModel.from_shape(BUILT_IN[model])
    for seed, lengths in enumerate(draws(name, 20)):
        for ranks in (2, 4, 8, 16):
            for options in ({}, {"count_multiple": 4}, {"round_to": 8}):
                made = schedule(lengths, data_ranks=ranks, max_tokens=max_tokens, cost=cost, **options)
                figures = waste(made, lengths, cost, max_tokens=max_tokens, round_to=options.get("round_to", 1))
                assert figures.total < 0.05, (seed, ranks, options)
            least = -(-sum(lengths) // (ranks * max_tokens))
            made = schedule(lengths, data_ranks=ranks, max_tokens=max_tokens, cost=cost)
            assert len(made.micro_batches[0]) <= 1.05 * least + 1  # hardly more passes than full ones would be


def test_waste_by_hand() -> None:
    made = Schedule((((0,), (1, 2)), ((3,), ())))
    figures = waste(made, [10, 3, 3, 7], LINEAR, max_tokens=12, round_to=4)
    # Padded: 12 | 4 + 4 and 8 | nothing: ranks of 20 and 8, 23 of 28 tokens useful.
    assert figures.total == pytest.approx(1 - 23 / (2 * 20))
    assert figures.lockstep == pytest.approx(1 - 23 / (2 * (12 + 8)))
    assert figures.micro_batches == pytest.approx(1 - 28 / (4 * 12))
    assert figures.padding == pytest.approx(5 / 28)
    assert figures.fill == pytest.approx(28 / (4 * 12))
    assert figures.floor == 0


def test_one_sample_longer_than_a_rank_s_share_is_the_floor() -> None:
    """Nothing helps there, and nothing is added to it: the others' work fits beside it."""
    lengths = [20000] + [1000] * 12
    made = schedule(lengths, data_ranks=4, max_tokens=22528, cost=LINEAR)
    figures = waste(made, lengths, LINEAR, max_tokens=22528)
    assert figures.floor == pytest.approx(1 - 32000 / 80000)
    assert figures.total == pytest.approx(figures.floor)


def test_balance_is_by_attention_cost() -> None:
    """One sample of 8 tokens costs as much as eight of 2 where attention is all there is, not as four."""
    lengths, cost = [8] + [2] * 16, CostModel(1e6)
    long, short = schedule(lengths, data_ranks=2, max_tokens=100, cost=cost).micro_batches
    assert long == ((0,),)
    assert len(short[0]) == 16
    even = schedule(lengths, data_ranks=2, max_tokens=100, cost=LINEAR).micro_batches
    assert {sum(lengths[i] for i in row[0]) for row in even} == {20}


def test_cost_of_a_model_is_its_flops() -> None:
    """Causal scores over all matrices."""
    shape = BUILT_IN["Qwen2.5-Math-7B"]
    weights = 28 * (3584 * (2 * 3584 + 2 * 512) + 3 * 3584 * 18944) + 3584 * 152064
    assert CostModel.from_shape(shape).quadratic == pytest.approx(28 * 3584 / weights)


@pytest.mark.parametrize("kind", ["recipe", "halves"])
def test_a_whole_step_is_scheduled_at_once(kind: str) -> None:
    """Processor time, since the machine may be busy; samples of a little over half a micro-batch are the worst case,
    each attempt leaving half of them without room."""
    lengths = [n for each in draws("7B", 16) for n in each] if kind == "recipe" else [8193] * 4096
    began = time.process_time()
    made = schedule(lengths, data_ranks=8, max_tokens=16384, cost=CostModel(1e-5))
    assert time.process_time() - began < (0.5 if kind == "recipe" else 3)
    assert len(made.micro_batches[0]) <= (46 if kind == "recipe" else 512)
