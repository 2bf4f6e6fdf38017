"""Counts and latencies since the step began."""

from __future__ import annotations

from collections import Counter, defaultdict


class Counters:
    """Named counts, and named series of seconds reported as p50, p95 and max."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, name: str, amount: int = 1) -> None:
        self.counts[name] += amount

    def observe(self, name: str, seconds: float) -> None:
        self._seconds[name].append(seconds)

    def clear(self) -> None:
        self.counts.clear()
        self._seconds.clear()

    def metrics(self, prefix: str) -> dict[str, float]:
        """`<prefix>/<count>` and, in seconds, `<prefix>/<series>_{p50,p95,max}_s` (nearest-rank percentiles)."""
        values = {f"{prefix}/{name}": float(count) for name, count in self.counts.items()}
        for name, seconds in self._seconds.items():
            ordered = sorted(seconds)
            for label, share in (("p50", 0.5), ("p95", 0.95), ("max", 1.0)):
                rank = max(0, -(-len(ordered) * share // 1) - 1)
                values[f"{prefix}/{name}_{label}_s"] = ordered[int(rank)]
        return values
