"""What counts as one step of a written solution: the unit of labels, verdicts and the oracle."""

from __future__ import annotations


def split_paragraphs(solution: str) -> list[str]:
    """The paragraphs that an index counts: split at empty lines, trimmed, empty ones left out."""
    return [stripped for part in solution.split("\n\n") if (stripped := part.strip())]
