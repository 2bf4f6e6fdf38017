"""A reward that random weights can earn; in a file of its own, since verifier processes import it."""

from __future__ import annotations


def of_text(data_source: str, solution_str: str, ground_truth: str, extra_info: dict, **_: object) -> float:
    """From -0.5 to 0.5, whatever the text says: samples of a group differ, so that there are gradients."""
    del data_source, ground_truth, extra_info
    return (sum(map(ord, solution_str)) % 97) / 97 - 0.5
