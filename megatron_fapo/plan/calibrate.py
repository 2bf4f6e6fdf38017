"""Rates out of what a run measured: those under which the simulation takes as long as the run did.

Each phase has one rate that answers for it; they are fitted one after the other, in the order of the step, so that a
rate is settled before another builds on it. Seconds fall steadily as a rate rises (or the other way round), so halving
an interval finds it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_fapo.errors import UserError
from megatron_fapo.observe.metrics import read_metrics
from megatron_fapo.plan.hardware import Rates, calibrated
from megatron_fapo.plan.layouts import Planner
from megatron_fapo.plan.lengths import Record, read_records

_HALVINGS = 20
_RANGE = 1000.0
"""A fitted rate is within this factor of the one that is assumed."""
_STEPS = 16
"""Records that a fit looks at, spread over the run."""


def fit(planner: Planner, records: Sequence[Record], source: str) -> Planner:
    """The planner with rates under which it predicts the sums of the records' phases."""
    records = records[:: math.ceil(len(records) / _STEPS)]
    samples = [record.samples for record in records]

    def measured(*phases: str) -> float:
        return sum(record.phases[name] for record in records for name in phases)

    def scaled(at: Planner, names: tuple[str, ...], factor: float) -> Planner:
        rates = {name: getattr(at.hardware.rates, name) * factor for name in names}
        return dataclasses.replace(at, hardware=calibrated(at.hardware, rates, source))

    def solve(at: Planner, names: tuple[str, ...], seconds: Callable[[Planner], float], target: float) -> Planner:
        low, high = 1 / _RANGE, _RANGE
        rises = seconds(scaled(at, names, 2.0)) > seconds(at)
        for _ in range(_HALVINGS):
            middle = math.sqrt(low * high)
            too_long = seconds(scaled(at, names, middle)) > target
            low, high = (low, middle) if too_long == rises else (middle, high)
        return scaled(at, names, math.sqrt(low * high))

    def generation(at: Planner) -> float:
        return sum(at.rollout(record.samples).generation_s for record in records)

    def scoring(at: Planner) -> float:
        return sum(max(at.rollout(record.samples).scored) for record in records)

    planner = solve(planner, ("decode_base_s", "decode_sequence_s"), generation, measured("rollout"))
    if planner.judges and any(s.critique for record in records for s in record.samples):
        planner = solve(planner, ("judge_factor",), scoring, measured("rollout", "score_tail"))
    planner = solve(
        planner,
        ("forward_mfu",),
        lambda at: sum(at.work.times(each).logprobs_s for each in samples),
        measured("logprobs"),
    )
    planner = solve(
        planner, ("train_mfu",), lambda at: sum(at.work.times(each).train_s for each in samples), measured("train")
    )
    refit = measured("refit") / len(records)
    return solve(planner, ("refit_s",), lambda at: at.refit_s, refit)


def calibrate(planner: Planner, path: Path) -> Planner:
    """Of `--calibrate`: a JSON file of rates by name, or the directory or records of a run to fit them to. The run's
    configuration has to be the planner's.

    Raises:
        UserError: neither, or not rates, or a run whose rollouts ran ahead.
    """
    if path.is_dir():
        if any(record.get("staleness/max") for record in read_metrics(path)):
            raise UserError(
                f"--calibrate {path}: its rollouts ran ahead of updates: its phases are what was waited for, and "
                "not what the work took: give a run with training.asynchrony.max_staleness=0"
            )
        return fit(planner, read_records(path), str(path))
    if not path.is_file():
        raise UserError(f"--calibrate {path}: neither a file nor a run directory")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"--calibrate {path}: not JSON: {error}") from error
    if isinstance(raw, Mapping) and "steps" in raw:
        return fit(planner, read_records(path), str(path))
    if not isinstance(raw, Mapping):
        raise UserError(f'--calibrate {path}: write a map of rates, such as {{"train_mfu": 0.45}}')
    return dataclasses.replace(planner, hardware=calibrated(planner.hardware, raw, str(path)))


def fitted(before: Rates, after: Rates) -> dict[str, float]:
    """The rates that differ."""
    return {name: value for name, value in dataclasses.asdict(after).items() if value != getattr(before, name)}
