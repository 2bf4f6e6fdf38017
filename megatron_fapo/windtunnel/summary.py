"""Readings of all runs -> values with intervals, differences to the baseline, theory, and whether the claims hold.

Intervals are 95 %. Over seeds, where an arm has two or more: Student's t. With one seed: over the prompts of its last
quarter, which sees the noise of sampling and not that of training. Differences are paired by seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from megatron_fapo.algorithm.judgements import ratios
from megatron_fapo.windtunnel.arms import Arm
from megatron_fapo.windtunnel.readings import Flip, Sample, by_prompt, critic_terms, flips, judged, policy_terms

_BOUNDS = ("largest_rho_with_positive", "smallest_rho_with_negative")
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom."""
Interval = tuple[float, float]


@dataclass(frozen=True)
class Reading:
    """One finished run, by the oracle."""

    arm: Arm
    seed: int
    steps: list[dict[str, float]]
    """One record a step, for plots."""
    first: dict[str, float]
    """Over the first quarter of the steps."""
    final: dict[str, float]
    """Over the last quarter."""
    stderr: dict[str, float]
    """Of `final`, over prompts; without the metrics in which all prompts agree."""
    flips: list[Flip]


def read(arm: Arm, seed: int, samples_by_step: Mapping[int, Sequence[Sample]]) -> Reading:
    """The reading of a run from all of its recorded samples."""
    terms = critic_terms
    if arm.kind == "policy":
        terms = policy_terms
        samples_by_step = {step: judged(samples) for step, samples in samples_by_step.items()}

    def estimates(samples: Sequence[Sample]) -> dict[str, tuple[float, float | None]]:
        return ratios([[terms(sample) for sample in group] for group in by_prompt(samples)])

    ordered = sorted(samples_by_step)
    steps = [
        {"step": float(step)} | {name: value for name, (value, _) in estimates(samples_by_step[step]).items()}
        for step in ordered
    ]
    quarter = max(len(ordered) // 4, 1)
    first, final = (
        estimates([sample for step in part for sample in samples_by_step[step]])
        for part in (ordered[:quarter], ordered[-quarter:])
    )
    crossed = []
    if arm.flawed_penalty is not None:
        crossed = [flip for step in ordered for flip in flips(samples_by_step[step])]
    before, after = ({name: value for name, (value, _) in part.items()} for part in (first, final))
    errors = {name: stderr for name, (_, stderr) in final.items() if stderr is not None}
    return Reading(arm, seed, steps, before, after, errors, crossed)


def summarise(readings: Sequence[Reading]) -> dict[str, Any]:
    """summary.json: `arms` by name with their values, and `claims`."""
    arms: dict[str, dict[str, Any]] = {}
    by_arm: dict[str, list[Reading]] = {}
    for reading in readings:
        by_arm.setdefault(reading.arm.name, []).append(reading)
    for name, runs in by_arm.items():
        arm = runs[0].arm
        entry: dict[str, Any] = {"about": arm.about, "kind": arm.kind, "seeds": [run.seed for run in runs]}
        metrics = list(dict.fromkeys(metric for run in runs for metric in run.final))
        for metric in metrics:
            value, interval = over_seeds(metric, runs)
            if value is not None:
                entry |= {metric: value, f"{metric}_interval": interval}
        entry["per_seed"] = {str(run.seed): run.final for run in runs}
        reference = by_arm.get(arm.reference)
        if reference and reference is not runs and reference[0].arm.kind == arm.kind:
            same_seed = [(run, other) for run in runs for other in reference if run.seed == other.seed]
            entry["against"] = {"arm": reference[0].arm.name} | {
                metric: difference
                for metric in metrics
                if (difference := paired([(run.final, other.final) for run, other in same_seed], metric)) is not None
            }
        drifts = {metric: paired([(run.final, run.first) for run in runs], metric) for metric in metrics}
        entry["drift"] = {metric: drift for metric, drift in drifts.items() if drift is not None}
        if arm.flawed_penalty is not None:
            entry["theory"] = against_theory(arm.flawed_penalty, runs)
        arms[name] = entry
    return {"arms": arms, "claims": claims(arms)}


def over_seeds(metric: str, runs: Sequence[Reading]) -> tuple[float | None, Interval | None]:
    """Mean over the seeds and its interval, None when there is no spread to tell it from; (None, None) when a run lacks
    the metric."""
    values = [run.final.get(metric) for run in runs]
    present = [value for value in values if value is not None]
    if len(present) < len(values):
        return None, None
    if len(present) > 1:
        return fmean(present), student(present)
    stderr = runs[0].stderr.get(metric)
    return present[0], None if stderr is None else (present[0] - 1.96 * stderr, present[0] + 1.96 * stderr)


def student(values: Sequence[float]) -> Interval:
    """The interval of the mean of two or more independent values."""
    half = T_95[min(len(values) - 2, len(T_95) - 1)] * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def paired(pairs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]], metric: str) -> dict[str, Any] | None:
    """Mean of first minus second over the pairs; its interval needs two. None when one lacks the metric."""
    gaps = [a[metric] - b[metric] for a, b in pairs if metric in a and metric in b]
    if not gaps or len(gaps) < len(pairs):
        return None
    return {"difference": fmean(gaps), "interval": student(gaps) if len(gaps) > 1 else None}


def against_theory(flawed_penalty: float, runs: Sequence[Reading]) -> dict[str, Any]:
    """Advantages of flawed positives against the paper's Appendix A: negative exactly where rho > 2/lambda - 1."""
    shift = 2.0 / flawed_penalty - 1.0
    seen = [flip for run in runs for flip in run.flips]
    positive = [flip.rho for flip in seen if flip.advantage > 1e-9]
    negative = [flip.rho for flip in seen if flip.advantage < -1e-9]
    agree = sum(_sign(flip.advantage) == _sign(shift - flip.rho) for flip in seen)
    return {
        "rho_shift": shift,
        "groups": len(seen),
        "groups_that_agree": agree,
        "largest_rho_with_positive_advantage": max(positive, default=None),
        "smallest_rho_with_negative_advantage": min(negative, default=None),
        "steps_before_the_shift": [sum(step.get("rho", math.inf) <= shift for step in run.steps) for run in runs],
    }


def claims(arms: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the paper says, held against these runs; only claims whose arms were run.

    `holds` is `yes` or `no` when the paired interval says so, and `undecided` when it covers both or one seed gives no
    interval. That accuracy is `not lower` is `yes` from a mean difference of 0 on, and `no` when the whole interval is
    below. A flip is claimed only where groups were seen on both sides of it.
    """
    found: list[dict[str, Any]] = []

    def claim(text: str, holds: str, evidence: str) -> None:
        found.append({"claim": text, "holds": holds, "evidence": evidence})

    base = arms.get("baseline")
    for name in ("fapo_oracle", "fapo_genrm"):
        arm = arms.get(name)
        if arm is None or base is None:
            continue
        excess = _paired_values(arm, base, "flawed_ratio", 0.5)
        claim(
            f"{name}: flawed-positive ratio at most half the baseline's",
            _below_zero(excess),
            f"{_shown(arm, 'flawed_ratio')} against {_shown(base, 'flawed_ratio')}; minus half: {shown_gap(excess)}",
        )
        gap = arm["against"].get("accuracy")
        lower = "undecided" if gap is None or gap["difference"] < 0 else "yes"
        claim(
            f"{name}: accuracy not lower than the baseline's",
            "no" if gap and gap["interval"] and gap["interval"][1] < 0 else lower,
            f"{_shown(arm, 'accuracy')} against {_shown(base, 'accuracy')}; difference {shown_gap(gap)}",
        )
    for name, arm in arms.items():
        if theory := arm.get("theory"):
            shift, groups, agree = theory["rho_shift"], theory["groups"], theory["groups_that_agree"]
            below, above = (theory[f"{bound}_advantage"] is not None for bound in _BOUNDS)
            both = above and (below or shift <= 0)
            claim(
                f"{name}: flawed positives lose from rho = {shift:.3g} on",
                "no" if agree < groups else "yes" if both else "undecided",
                f"{agree} of {groups} groups" + ("" if both else ", none of them on one side"),
            )
    if "critic_stepwise" in arms and "critic_outcome" in arms:
        stepwise, outcome = arms["critic_stepwise"], arms["critic_outcome"]
        gap = stepwise["against"].get("localisation_error")
        claim(
            "step-wise GenRM training: localisation error below outcome-only's",
            _below_zero(gap),
            f"{_shown(stepwise, 'localisation_error')} against {_shown(outcome, 'localisation_error')}; difference "
            + shown_gap(gap),
        )
    return found


def _paired_values(
    arm: Mapping[str, Any], other: Mapping[str, Any], metric: str, share: float
) -> dict[str, Any] | None:
    """The metric of an arm minus `share` of another's, paired by seed."""
    common = [seed for seed in arm["per_seed"] if seed in other["per_seed"]]
    pairs = [(arm["per_seed"][seed], other["per_seed"][seed]) for seed in common]
    return paired([(a, {name: share * value for name, value in b.items()}) for a, b in pairs], metric)


def _below_zero(gap: Mapping[str, Any] | None) -> str:
    if gap is None or gap["interval"] is None:
        return "undecided"
    low, high = gap["interval"]
    return "yes" if high <= 0 else "no" if low > 0 else "undecided"


def shown_gap(gap: Mapping[str, Any] | None) -> str:
    """A difference of `paired` with its interval."""
    if gap is None:
        return "unknown: a run lacks it"
    interval = gap["interval"]
    return f"{gap['difference']:+.3f}" + (f" [{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else "")


def _shown(arm: Mapping[str, Any], metric: str) -> str:
    if arm.get(metric) is None:
        return "unknown"
    interval = arm[f"{metric}_interval"]
    return f"{arm[metric]:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def _sign(value: float) -> int:
    return 0 if abs(value) < 1e-9 else 1 if value > 0 else -1
