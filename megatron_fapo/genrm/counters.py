"""Counts and latencies since the step began."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


@dataclass
class Histogram:
    """Of seconds."""

    at_most: list[int] = field(default_factory=lambda: [0] * len(BUCKETS_S))
    """How many were no longer than each of `limits`."""
    limits: tuple[float, ...] = BUCKETS_S
    count: int = 0
    sum_s: float = 0.0

    def plus(self, seconds: Sequence[float]) -> Histogram:
        ordered = sorted(seconds)
        at_most = [n + bisect_right(ordered, limit) for n, limit in zip(self.at_most, BUCKETS_S, strict=True)]
        return Histogram(at_most, self.limits, self.count + len(ordered), self.sum_s + sum(ordered))


class Counters:
    """Named counts, named series of seconds reported as p50, p95 and max, and named shares reported by their mean."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)
        self._shares: defaultdict[str, list[float]] = defaultdict(list)
        self._earlier, self._earlier_seconds = Counter[str](), defaultdict[str, Histogram](Histogram)

    def add(self, name: str, amount: int = 1) -> None:
        self.counts[name] += amount

    def observe(self, name: str, seconds: float) -> None:
        self._seconds[name].append(seconds)

    def share(self, name: str, value: float) -> None:
        self._shares[name].append(value)

    def clear(self) -> None:
        self._earlier, self._earlier_seconds = self.totals(), self.histograms()
        self.counts.clear()
        self._seconds.clear()
        self._shares.clear()

    def totals(self) -> Counter[str]:
        """The counts since the beginning, whatever was cleared."""
        return self._earlier + self.counts

    def histograms(self) -> defaultdict[str, Histogram]:
        """The series since the beginning."""
        now = self._earlier_seconds.copy()
        for name, seconds in self._seconds.items():
            now[name] = self._earlier_seconds[name].plus(seconds)
        return now

    def metrics(self, prefix: str) -> dict[str, float]:
        """`<prefix>/<count>`, `<prefix>/<share>_mean` and, in seconds, `<prefix>/<series>_{p50,p95,max}_s`, which are
        nearest-rank percentiles."""
        values = {f"{prefix}/{name}": float(count) for name, count in self.counts.items()}
        values |= {f"{prefix}/{name}_mean": fmean(shares) for name, shares in self._shares.items()}
        for name, seconds in self._seconds.items():
            ordered = sorted(seconds)
            for label, share in (("p50", 0.5), ("p95", 0.95), ("max", 1.0)):
                rank = max(0, -(-len(ordered) * share // 1) - 1)
                values[f"{prefix}/{name}_{label}_s"] = ordered[int(rank)]
        return values
