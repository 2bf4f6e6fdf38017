"""What the oracle says of the samples that a run recorded, one record a step; and where flawed advantages change sign.

Samples are read as they were drawn in training: each before the policy learned from its prompt, and no prompt twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_fapo.algorithm.advantage import group_advantages
from megatron_fapo.algorithm.judgements import Judgement, Terms, judgement_terms
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


def policy_terms(sample: Sample) -> Terms:
    """What a judged sample adds to each ratio: of the policy, and of the judge against the oracle."""
    right, truth = bool(sample["correct"]), sample["oracle"]
    flawed = right and truth != -1
    verdict = sample["verdict"]["index"] if right and sample["verdict"] is not None else None
    judged_flawed, judged_sound = verdict is not None and flawed, verdict is not None and not flawed
    found = judged_flawed and verdict != -1
    return {
        "accuracy": (right, sample["correct"] is not None),
        "flawed_ratio": (flawed, right),
        "rho": (right and not flawed, sample["correct"] is False),
        "response_tokens": (sample["response_tokens"], 1),
        "unscored_share": (sample["reward"] is None, 1),
        "judge_missed": (judged_flawed and not found, judged_flawed),
        "missed_of_right": (judged_flawed and not found, verdict is not None),
        "judge_invented": (judged_sound and verdict != -1, judged_sound),
        "judge_located": (found and verdict == truth, found),
    }


def critic_terms(sample: Sample) -> Terms:
    """The same for a critique against its label."""
    predicted = None if sample["prediction"] is None else int(sample["prediction"])
    label, total = int(sample["ground_truth"]), sample["extra"]["total_steps"]
    return judgement_terms(Judgement(predicted, label, total, "", sample["response_tokens"]))


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
