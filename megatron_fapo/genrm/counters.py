"""Counts and latencies of a step, and of the run so far."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


@dataclass
class Histogram:
    """Of seconds."""

    at_most: list[int] = field(default_factory=lambda: [0] * len(BUCKETS_S))
    """How many were no longer than each of `limits`."""
    limits: tuple[float, ...] = BUCKETS_S
    count: int = 0
    sum_s: float = 0.0

    def add(self, seconds: float) -> None:
        for place in range(bisect_left(self.limits, seconds), len(self.limits)):
            self.at_most[place] += 1
        self.count += 1
        self.sum_s += seconds


@dataclass
class Totals:
    """Of all steps."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, Histogram] = field(default_factory=lambda: defaultdict(Histogram))


class Counters:
    """Named counts, named series of seconds reported as p50, p95 and max, and named shares reported by their mean. What
    is counted adds to `totals`, which others may add to as well."""

    def __init__(self, totals: Totals | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self.totals = totals or Totals()
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)
        self._shares: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, name: str, amount: int = 1) -> None:
        self.counts[name] += amount
        self.totals.counts[name] += amount

    def observe(self, name: str, seconds: float) -> None:
        self._seconds[name].append(seconds)
        self.totals.seconds[name].add(seconds)

    def share(self, name: str, value: float) -> None:
        self._shares[name].append(value)

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


@dataclass
class Book:
    """What the judges were asked for one step."""

    counters: Counters = field(default_factory=Counters)
    shared: dict[str, Any] = field(default_factory=dict)
    """Judgements, by what is judged, that identical samples share."""
    answered: dict[str, int] = field(default_factory=dict)
    """Tokens that each server had answered when the step began."""
