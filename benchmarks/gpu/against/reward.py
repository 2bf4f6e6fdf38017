"""The reward of all systems; a file of its own, which each loads by its path."""

from __future__ import annotations

from typing import Any


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any) -> float:
    """A rule that costs nothing: the share of letters and spaces. In [0, 1], and different for every sample."""
    del data_source, ground_truth, extra_info
    return sum(c.isalpha() or c == " " for c in solution_str) / max(len(solution_str), 1)
