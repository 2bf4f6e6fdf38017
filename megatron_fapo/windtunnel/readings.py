"""What the oracle says of the samples that a run recorded, one record a step; and where flawed advantages change sign.

Samples are read as they were drawn in training: each before the policy learned from its prompt, and no prompt twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_fapo.algorithm.advantage import group_advantages
from megatron_fapo.data.oracle import first_wrong_step
from megatron_fapo.data.testbed import parse_question

Sample = dict[str, Any]
"""A record of observe/samples.py; here with `oracle`, the index of the first wrong step, for right answers."""


@dataclass(frozen=True)
class Flip:
    """A group with flawed positives: its learning progress, and the advantage they got."""

    rho: float
    """Sound / wrong in the group; infinite without a wrong sample."""
    advantage: float


def judged(samples: Iterable[Sample]) -> list[Sample]:
    """The samples with the oracle's word on each right answer added."""
    return [
        s | {"oracle": first_wrong_step(parse_question(s["question"]), s["text"]) if s["correct"] else None}
        for s in samples
    ]


def policy_counts(samples: Sequence[Sample]) -> dict[str, float]:
    """Counts that add over steps and prompts: samples, right, flawed, tokens, and the judge against the oracle."""
    right = [s for s in samples if s["correct"]]
    verdicts = [(s["verdict"]["index"], s["oracle"]) for s in right if s["verdict"] is not None]
    return {
        "samples": len(samples),
        "right": len(right),
        "wrong": sum(s["correct"] is False for s in samples),
        "flawed": sum(s["oracle"] != -1 for s in right),
        "tokens": sum(s["response_tokens"] for s in samples),
        "unscored": sum(s["reward"] is None for s in samples),
        "judged_flawed": sum(truth != -1 for _, truth in verdicts),
        "judged_sound": sum(truth == -1 for _, truth in verdicts),
        "missed": sum(index == -1 and truth != -1 for index, truth in verdicts),
        "invented": sum(index != -1 and truth == -1 for index, truth in verdicts),
        "found": sum(index != -1 and truth != -1 for index, truth in verdicts),
        "located": sum(index == truth != -1 for index, truth in verdicts),
    }


def critic_counts(samples: Sequence[Sample]) -> dict[str, float]:
    """Counts of critiques against their labels. A critique without a readable index finds nothing."""
    rows = [
        (None if s["prediction"] is None else int(s["prediction"]), int(s["ground_truth"]), s["extra"]["total_steps"])
        for s in samples
    ]
    found = [(p, label, total) for p, label, total in rows if p not in (None, -1) and label != -1]
    return {
        "samples": len(rows),
        "flawed": sum(label != -1 for _, label, _ in rows),
        "called_flawed": sum(p not in (None, -1) for p, _, _ in rows),
        "found": len(found),
        "located": sum(p == label for p, label, _ in found),
        "distance": sum(abs(p - label) / total for p, label, total in found if p is not None),
        "right_class": sum(bool(s["correct"]) for s in samples),
        "unreadable": sum(p is None for p, _, _ in rows),
        "tokens": sum(s["response_tokens"] for s in samples),
    }


def _shares(counts: dict[str, float], wanted: dict[str, tuple[str, str]]) -> dict[str, float]:
    return {name: counts[above] / counts[below] for name, (above, below) in wanted.items() if counts[below]}


def policy_values(counts: dict[str, float]) -> dict[str, float]:
    """Shares and means of policy_counts; a share of nothing is left out."""
    values = _shares(
        counts | {"checked": counts["right"] + counts["wrong"]},
        {
            "accuracy": ("right", "checked"),
            "flawed_ratio": ("flawed", "right"),
            "response_tokens": ("tokens", "samples"),
            "judge_missed": ("missed", "judged_flawed"),
            "judge_invented": ("invented", "judged_sound"),
            "judge_located": ("located", "found"),
            "unscored_share": ("unscored", "samples"),
        },
    )
    # One wrong sample at least is assumed: a lower bound where rho has no finite value.
    return values | {"rho": (counts["right"] - counts["flawed"]) / max(counts["wrong"], 1.0)}


def critic_values(counts: dict[str, float]) -> dict[str, float]:
    """Precision, recall and F1 of `flawed`, and how far off the place of a flaw that was found is, in [0, 1]."""
    values = _shares(
        counts,
        {
            "precision": ("found", "called_flawed"),
            "recall": ("found", "flawed"),
            "exact_localisation": ("located", "found"),
            "localisation_error": ("distance", "found"),
            "class_accuracy": ("right_class", "samples"),
            "unreadable_share": ("unreadable", "samples"),
            "response_tokens": ("tokens", "samples"),
        },
    )
    if counts["found"]:
        values["f1"] = 2 * counts["found"] / (counts["called_flawed"] + counts["flawed"])
    return values


def by_prompt(samples: Iterable[Sample]) -> list[list[Sample]]:
    groups: dict[tuple[str, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample["prompt_id"], sample["epoch"]].append(sample)
    return list(groups.values())


def flips(samples: Iterable[Sample]) -> list[Flip]:
    """The groups in which theory speaks: with flawed positives, all scored, none of them overlong, not all alike."""
    result = []
    for group in by_prompt(samples):
        flawed = [i for i, s in enumerate(group) if s["correct"] and s["oracle"] != -1]
        if not 0 < len(flawed) < len(group) or any(s["reward"] is None or s["overlong"] for s in group):
            continue
        advantages = group_advantages([s["reward"] for s in group], normalize_std=True)
        sound = sum(bool(s["correct"]) and s["oracle"] == -1 for s in group)
        wrong = sum(not s["correct"] for s in group)
        advantage = advantages[flawed[0]]
        assert advantage is not None
        result.append(Flip(sound / wrong if wrong else float("inf"), advantage))
    return result
