"""How often drift alarms are false, and how soon they come: simulated series of one metric, with unit spread.

    python benchmarks/drift_alarms.py

Prints the table of docs/metrics.md#drift. A minute of one core.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from statistics import median

from megatron_fapo.config.observe import ObserveConfig
from megatron_fapo.observe.drift import DriftWatch, Watched

RUNS, STEPS, SHIFT_AT, WITHIN = 30, 1000, 100, 60
Series = Callable[[random.Random], Iterator[float]]


def independent(noise: random.Random) -> Iterator[float]:
    while True:
        yield noise.gauss(0, 1)


def autocorrelated(rho: float) -> Series:
    def series(noise: random.Random) -> Iterator[float]:
        value = noise.gauss(0, 1)
        while True:
            yield value
            value = rho * value + math.sqrt(1 - rho**2) * noise.gauss(0, 1)

    return series


def heavy_tailed(noise: random.Random) -> Iterator[float]:
    """Student's t with 3 degrees of freedom."""
    while True:
        yield noise.gauss(0, 1) / math.sqrt(sum(noise.gauss(0, 1) ** 2 for _ in range(3)) / 3)


def trend(noise: random.Random) -> Iterator[float]:
    for step, value in enumerate(independent(noise)):
        yield value + step / 50


def shifted(by: float) -> Series:
    def series(noise: random.Random) -> Iterator[float]:
        for step, value in enumerate(independent(noise)):
            yield value + by * (step >= SHIFT_AT)

    return series


def alarms(series: Series, threshold: float, seed: int, steps: int) -> list[int]:
    """The steps at which one begins."""
    drift = DriftWatch(ObserveConfig().drift_window, threshold, (Watched("a/x", "x"),))
    values = series(random.Random(seed))
    said = (drift.add({"a/x": next(values)})[1] for _ in range(steps))
    return [step for step, lines in enumerate(said) if any("has drifted" in line for line in lines)]


def false_alarms(series: Series, threshold: float) -> float:
    """In 1,000 steps."""
    found = sum(len(alarms(series, threshold, seed, STEPS)) for seed in range(RUNS))
    return 1000 * found / (RUNS * STEPS)


def delay(by: float, threshold: float) -> str:
    found = [alarms(shifted(by), threshold, seed, SHIFT_AT + WITHIN) for seed in range(2 * RUNS)]
    firsts = [min(after) - SHIFT_AT + 1 for began in found if (after := [step for step in began if step >= SHIFT_AT])]
    return f"{100 * len(firsts) / len(found):.0f} % after {median(firsts):g}"


def main() -> None:
    noises = {"independent": independent, "AR 0.3": autocorrelated(0.3), "AR 0.5": autocorrelated(0.5)}
    noises |= {"t, 3 degrees": heavy_tailed, "a trend of 1/50": trend}
    shifts = (2.0, 3.0, 6.0)
    names = ["threshold", *noises, *(f"shift of {by:g}" for by in shifts)]
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for threshold in (5.0, 6.0, 8.0, 10.0):
        cells = [f"{threshold:g}", *(f"{false_alarms(series, threshold):.1f}" for series in noises.values())]
        print("| " + " | ".join([*cells, *(delay(by, threshold) for by in shifts)]) + " |", flush=True)


if __name__ == "__main__":
    main()
