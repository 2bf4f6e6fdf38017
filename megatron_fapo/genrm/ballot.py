"""Several critiques of one solution, and what the majority of them says: pure.

Sound or flawed is decided by more than half of all `votes`; asking ends as soon as that is certain. A critique that
failed is a vote that was not cast, and no more are cast in its place: without a majority there is no verdict.
"""

from __future__ import annotations

from collections import Counter


class Ballot[T]:
    """One solution's votes. `T` is what was cast: whoever cast it, with an index."""

    def __init__(self, votes: int) -> None:
        self._votes, self._majority = votes, votes // 2 + 1
        self._sound: list[T] = []
        self._flawed: list[tuple[int, T]] = []
        self._failed = 0

    def fail(self) -> None:
        """Counts a critique that failed."""
        self._failed += 1

    def add(self, index: int, vote: T) -> None:
        """Counts a vote: -1 for sound, the 0-based paragraph of the first error."""
        if index == -1:
            self._sound.append(vote)
        else:
            self._flawed.append((index, vote))

    @property
    def cast(self) -> int:
        return len(self._sound) + len(self._flawed) + self._failed

    def wanted(self) -> int:
        """How many votes could decide it at once, if they all agreed with those who lead; 0: no vote changes it."""
        missing = self._majority - max(len(self._sound), len(self._flawed))
        return missing if 0 < missing <= self._votes - self.cast else 0

    def decision(self) -> tuple[int, T] | None:
        """The index and a vote that names it; None: there is no majority.

        Flawed votes that differ on the paragraph agree that there is an error: the most frequent counts, of equally
        frequent ones the earliest.
        """
        if len(self._sound) >= self._majority:
            return -1, self._sound[0]
        if len(self._flawed) < self._majority:
            return None
        counts = Counter(index for index, _ in self._flawed)
        index = min(counts, key=lambda each: (-counts[each], each))
        return index, next(vote for named, vote in self._flawed if named == index)

    def agreement(self) -> float:
        """Share of the critiques with a verdict that say what the majority says."""
        read = len(self._sound) + len(self._flawed)
        return max(len(self._sound), len(self._flawed)) / read if read else 0.0
