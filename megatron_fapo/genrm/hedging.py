"""When a slow request gets a second one beside it, and how many may: pure, with observations passed in.

A request that takes longer than 97 % do is likely to be held up by its server; another server probably answers in half
the time. The budget keeps what this costs bounded when every request is slow, which a second one would make slower.
"""

from __future__ import annotations

from collections import deque

ENOUGH = 50
"""Observations before a quantile is believed."""
_KEPT, _STALE_AFTER = 512, 32
_BURST = 16.0
SILENCE_FACTOR, SILENCE_LEAST_S = 3.0, 2.0


class Latencies:
    """The seconds that the last requests took."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=_KEPT)
        self._sorted: list[float] = []
        self._new = 0

    def add(self, seconds: float) -> None:
        self._last.append(seconds)
        self._new += 1

    def quantile(self, share: float) -> float | None:
        """Seconds within which `share` of the requests ended; None: too few are known. Of a moment ago, since sorting
        for every request would cost more than asking."""
        if len(self._last) < ENOUGH:
            return None
        if not self._sorted or self._new >= _STALE_AFTER:
            self._sorted, self._new = sorted(self._last), 0
        return self._sorted[min(len(self._sorted) - 1, int(share * len(self._sorted)))]

    def silence_s(self) -> float | None:
        """How long a server that holds requests may answer none while others do; None: too little is known."""
        slow = self.quantile(0.99)
        return None if slow is None else max(SILENCE_LEAST_S, SILENCE_FACTOR * slow)


class HedgeBudget:
    """A bucket that every request fills by `share` of a second request."""

    def __init__(self, share: float) -> None:
        self._share, self._saved = share, 0.0

    def earn(self) -> None:
        self._saved = min(_BURST, self._saved + self._share)

    def spend(self) -> bool:
        """Whether a second request may be sent; it is then paid for."""
        if self._saved < 1:
            return False
        self._saved -= 1
        return True
