"""Spec vectors of the FAPO reward and the overlong term, and the properties that hold for every input."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fapo.algorithm.reward import critic_reward, fapo_reward, overlong_penalty, step_ratio_reward
from megatron_fapo.config.reward import OverlongConfig, RewardConfig


@pytest.mark.parametrize(
    ("correct", "flawed", "penalty", "reward"),
    [
        (True, False, 1.0, 1.0),
        (True, True, 1.0, 0.0),
        (False, False, 1.0, -1.0),
        (False, True, 1.0, -1.0),
        (True, True, 2.0, -1.0),
        (True, True, 0.0, 1.0),
        (True, True, 4 / 3, -1 / 3),
        (True, True, 2 / 3, 1 / 3),
    ],
)
def test_reward_table(correct, flawed, penalty, reward):
    assert fapo_reward(correct, flawed, penalty) == pytest.approx(reward, abs=1e-15)


def test_rho_shift_sets_the_penalty_and_a_plain_penalty_stands_without_it():
    shifted = [RewardConfig(rho_shift=rho).flawed_penalty_at(1) for rho in (1.0, 2.0, 0.5)]
    assert shifted == pytest.approx([1.0, 2 / 3, 4 / 3])
    assert RewardConfig(flawed_penalty=0.3).flawed_penalty_at(1) == 0.3


@pytest.mark.parametrize(
    ("tokens", "limit", "penalty"),
    [(4096, 8192, 0.0), (6144, 8192, -0.5), (8192, 8192, -1.0), (18432, 20480, -0.5), (4097, 8192, -1 / 4096)],
)
def test_overlong_vectors(tokens, limit, penalty):
    assert overlong_penalty(tokens, limit, OverlongConfig()) == penalty


def test_totals_at_the_limit():
    at_limit = overlong_penalty(8192, 8192, OverlongConfig())
    assert fapo_reward(False, False, 1.0) + at_limit == -2.0
    assert fapo_reward(True, True, 1.0) + at_limit == -1.0


@given(
    limit=st.integers(1, 5000),
    buffer=st.integers(1, 8000),
    factor=st.floats(0, 10),
    data=st.data(),
)
def test_overlong_stays_in_range_and_never_grows(limit, buffer, factor, data):
    cfg = OverlongConfig(buffer_tokens=buffer, penalty_factor=factor)
    shorter, longer = sorted(data.draw(st.tuples(st.integers(0, limit), st.integers(0, limit))))
    assert -factor <= overlong_penalty(longer, limit, cfg) <= overlong_penalty(shorter, limit, cfg) <= 0.0
    assert overlong_penalty(limit, limit, cfg) == -factor


def test_overlong_off_and_impossible_lengths():
    assert overlong_penalty(8192, 8192, OverlongConfig(enabled=False)) == 0.0
    with pytest.raises(ValueError, match=r"8193 tokens .*rollout\.max_response_tokens"):
        overlong_penalty(8193, 8192, OverlongConfig())


@pytest.mark.parametrize(
    ("predicted", "label", "reward"),
    [(-1, -1, 1), (3, -1, -1), (-1, 3, -1), (3, 3, 1), (5, 3, 5 / 7), (0, 6, 1 / 7), (None, 3, -1), (None, -1, -1)],
)
def test_critic_vectors(predicted, label, reward):
    assert critic_reward(predicted, label, 7) == pytest.approx(reward)
    assert critic_reward(predicted, label, 7, process=False) == (1 if reward > 0 else -1)


@given(total=st.integers(1, 40), data=st.data())
def test_critic_found_flaws_earn_more_the_nearer_they_are_placed(total, data):
    label = data.draw(st.integers(0, total - 1))
    nearer, further = sorted((data.draw(st.integers(0, total - 1)) for _ in range(2)), key=lambda i: abs(i - label))
    assert 1 / total <= critic_reward(further, label, total) + 1e-12
    assert critic_reward(further, label, total) <= critic_reward(nearer, label, total) <= 1
    assert critic_reward(-1, label, total) == critic_reward(label, -1, total) == -1


def test_step_ratio_pays_for_paragraphs_before_the_error():
    assert [step_ratio_reward(True, i, 4) for i in (-1, 0, 1, 3)] == [1.0, 0.0, 0.25, 0.75]
    assert step_ratio_reward(False, -1, 4) == -1.0


def test_rho_shift_schedule_is_piecewise_linear():
    reward = RewardConfig(rho_shift_schedule=[(30, 0.5), (10, 3.0)])
    assert [reward.flawed_penalty_at(step) for step in (1, 10, 20, 30, 99)] == pytest.approx(
        [2 / (rho + 1) for rho in (3.0, 3.0, 1.75, 0.5, 0.5)]
    )
