"""Group advantages: spec vectors, the treatment of unscored samples, and the paper's theory on finite groups.

The theory (paper, Appendix A) speaks of shares alpha (sound), beta (wrong), gamma (flawed), rho = alpha / beta and the
population standard deviation; a group of n samples has the shares exactly, and n - 1 is converted where it matters.
"""

import math
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_fapo.algorithm.advantage import STD_EPS, group_advantages, has_signal
from megatron_fapo.algorithm.reward import fapo_reward
from megatron_fapo.config.reward import RewardConfig

VECTORS = [
    ((1, 2, 5), [1.9843, 0.6614, 0.6614] + [-0.6614] * 5, [1.2076] * 3 + [-0.7246] * 5),
    ((3, 2, 3), [1.0801] * 3 + [0.0] * 2 + [-1.0801] * 3, [0.7246] * 5 + [-1.2076] * 3),
    ((5, 2, 1), [0.6614] * 5 + [-0.6614] * 2 + [-1.9843], [0.3536] * 7 + [-2.4749]),
    ((6, 2, 0), [0.5401] * 6 + [-1.6202] * 2, [0.0] * 8),
    ((8, 0, 0), [0.0] * 8, [0.0] * 8),
    ((0, 0, 8), [0.0] * 8, [0.0] * 8),
]
counts = st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(0, 12)).filter(lambda c: sum(c) >= 2)
"""(sound, flawed, wrong)"""
penalties = st.integers(1, 48).map(lambda sixteenths: Fraction(sixteenths, 16))
"""lambda in (0, 3], exact in binary, so that thresholds can be decided without rounding."""
rewards_or_none = st.lists(st.none() | st.floats(-3, 3), min_size=2, max_size=12)


def rewards_of(group: tuple[int, int, int], penalty: float) -> list[float]:
    sound, flawed, wrong = group
    outcomes = [(True, False)] * sound + [(True, True)] * flawed + [(False, False)] * wrong
    return [fapo_reward(correct, bad, penalty) for correct, bad in outcomes]


def mean_of(rewards: list[float]) -> float:
    """The group mean, read off what group_advantages subtracted."""
    return rewards[0] - group_advantages(rewards, normalize_std=False)[0]


def variance_of(rewards: list[float]) -> float:
    """The population variance, read off what group_advantages divided by."""
    low, high = rewards.index(min(rewards)), rewards.index(max(rewards))
    if rewards[low] == rewards[high]:
        return 0.0
    advantages = group_advantages(rewards, normalize_std=True)
    std = (rewards[high] - rewards[low]) / (advantages[high] - advantages[low]) - STD_EPS
    return std**2 * (len(rewards) - 1) / len(rewards)


@pytest.mark.parametrize(("group", "fapo", "grpo"), VECTORS)
def test_spec_vectors(group, fapo, grpo):
    assert group_advantages(rewards_of(group, 1.0), True) == pytest.approx(fapo, abs=5e-5)
    assert group_advantages(rewards_of(group, 0.0), True) == pytest.approx(grpo, abs=5e-5)


@given(rewards_or_none)
def test_unscored_samples_leave_the_statistics(rewards):
    scored = [r for r in rewards if r is not None]
    assume(len(scored) >= 2)
    for normalize in (True, False):
        advantages = group_advantages(rewards, normalize)
        assert [a is None for a in advantages] == [r is None for r in rewards]
        assert [a for a in advantages if a is not None] == group_advantages(scored, normalize)


@given(rewards_or_none)
def test_sum_is_zero_and_order_is_kept(rewards):
    advantages = group_advantages(rewards, True)
    pairs = sorted((r, a) for r, a in zip(rewards, advantages, strict=True) if r is not None)
    assert math.fsum(a for _, a in pairs) == pytest.approx(0, abs=1e-6)
    assert [a for _, a in pairs] == sorted(a for _, a in pairs)


@given(st.floats(-3, 3), st.integers(2, 33))
def test_equal_rewards_give_exactly_zero(reward, n):
    advantages = group_advantages([reward] * n, True)
    assert advantages == [0.0] * n
    assert not has_signal(advantages)


def test_single_samples_and_lone_survivors():
    assert group_advantages([-1.5], True) == [-1.5]
    assert group_advantages([None], True) == [None]
    assert group_advantages([None, 1.0, None], True) == [None, 0.0, None]
    assert not has_signal([None, 0.0])
    assert has_signal([None, 0.0, -0.1])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rewards_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match=r"not all finite"):
        group_advantages([1.0, bad], True)


@given(counts, penalties)
def test_mean_and_variance_identities(group, penalty):
    sound, flawed, wrong = group
    n, lam = sum(group), float(penalty)
    beta, gamma = wrong / n, flawed / n
    mu_grpo, mu_fapo = mean_of(rewards_of(group, 0.0)), mean_of(rewards_of(group, lam))
    assert mu_grpo == pytest.approx(1 - 2 * beta, abs=1e-12)
    assert mu_fapo == pytest.approx(mu_grpo - lam * gamma, abs=1e-12)
    var_grpo, var_fapo = variance_of(rewards_of(group, 0.0)), variance_of(rewards_of(group, lam))
    assert var_grpo == pytest.approx((1 - beta) * (1 - mu_grpo) ** 2 + beta * (1 + mu_grpo) ** 2, abs=1e-9)
    if sound + wrong:
        inverse = wrong / (sound + wrong)  # 1 / (rho + 1), with rho infinite where nothing is wrong
        assert var_fapo == pytest.approx(var_grpo + lam * gamma * (1 - gamma) * (lam - 4 * inverse), abs=1e-9)


@given(counts, penalties)
def test_flawed_positives_change_sign_at_rho_two_over_lambda_minus_one(group, penalty):
    sound, flawed, wrong = group
    assume(flawed and sound + wrong)
    advantage = group_advantages(rewards_of(group, float(penalty)), True)[sound]
    side = sound * penalty - (2 - penalty) * wrong  # rho - (2 / lambda - 1), times beta lambda n: exact
    if side == 0:
        assert advantage == pytest.approx(0, abs=1e-9)
    else:
        assert (advantage < 0) == (side > 0)


@given(counts, penalties)
def test_spread_exceeds_grpo_beyond_rho_four_over_lambda_minus_one(group, penalty):
    sound, flawed, wrong = group
    assume(flawed and sound + wrong)
    side = sound * penalty - (4 - penalty) * wrong
    difference = variance_of(rewards_of(group, float(penalty))) - variance_of(rewards_of(group, 0.0))
    if side == 0:
        assert difference == pytest.approx(0, abs=1e-9)
    else:
        assert (difference > 0) == (side > 0)


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 6), st.integers(1, 4))
def test_rho_shift_is_where_flawed_positives_turn(wrong, flawed, numerator, denominator):
    rho = Fraction(numerator, denominator)
    lam = RewardConfig(rho_shift=float(rho)).flawed_penalty_at(1)
    at, below, above = (
        group_advantages(rewards_of((sound, flawed, wrong * denominator), lam), True)[sound]
        for sound in (wrong * numerator, wrong * numerator - 1, wrong * numerator + 1)
    )
    assert at == pytest.approx(0, abs=1e-9)
    assert below > 0 > above
