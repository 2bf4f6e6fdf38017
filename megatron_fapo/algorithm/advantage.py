"""Group-relative advantages (paper, section 3; unbiased standard deviation as in the recipe).

Invariants
- Unscored samples (None) change nobody else's advantage and get None: the caller masks them out of the loss.
- Advantages of a group of two or more sum to 0; equal rewards give exactly 0, whatever the rounding of their mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

STD_EPS = 1e-6


def group_advantages(rewards: Sequence[float | None], normalize_std: bool) -> list[float | None]:
    """Advantage of each sample of one group: (reward - mean) / (std + 1e-6) over the scored ones, std with n - 1.

    `rewards` are in order of sample_index, None where unscored; `normalize_std=False` leaves the division out.
    A group of one sample has no one to compare with and takes mean 0, std 1: its advantage is its reward (the recipe's
    rule for n = 1). A larger group with one scored sample left gives that sample 0: its reward alone, without the
    baseline that all other groups have, would be a push of another kind and size.
    Raises ValueError for a reward that is not finite.
    """
    scored = [reward for reward in rewards if reward is not None]
    if not all(map(math.isfinite, scored)):
        raise ValueError(
            f"rewards {list(rewards)} are not all finite: a sample that could not be scored is None (unscored), not NaN"
        )
    if len(rewards) == 1:
        return list(rewards)
    if len(set(scored)) <= 1:
        return [None if reward is None else 0.0 for reward in rewards]
    mean = math.fsum(scored) / len(scored)
    scale = 1.0
    if normalize_std:
        scale = math.sqrt(math.fsum((reward - mean) ** 2 for reward in scored) / (len(scored) - 1)) + STD_EPS
    return [None if reward is None else (reward - mean) / scale for reward in rewards]


def has_signal(advantages: Sequence[float | None]) -> bool:
    """Whether any advantage of a group moves the policy: some are neither 0 nor unscored."""
    return any(advantages)
