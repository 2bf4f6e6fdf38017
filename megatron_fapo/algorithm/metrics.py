"""What a step or an evaluation says about itself, as flat `name -> number` (glossary: docs/metrics.md).

Invariants
- Values are finite. A mean or share over nothing is left out, not reported as 0: absence is no news, 0 is news.
- A sample whose GenRM call failed is unscored but right: it counts for accuracy, and not for the flawed-positive ratio.
  Leaving it out of both would lower accuracy whenever the GenRM struggles, since only right answers are judged.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_fapo.algorithm.advantage import group_advantages, has_signal
from megatron_fapo.algorithm.judgements import (
    Judgement,
    judgement_metrics,
    judgement_stderrs,
    majority_judgement,
    ratio_stderr,
)
from megatron_fapo.algorithm.loss import LOG_RATIO_LIMIT
from megatron_fapo.data.records import Group, Score, ScoredSample


def step_metrics(groups: Sequence[Group], task: str = "policy") -> dict[str, float]:
    """Scores, rewards, lengths and group shares of one rollout.

    For the task `critic`, `critic/...` says how well it judged, in place of what a GenRM says of a policy's answers.
    """
    samples = [sample for group in groups for sample in group.samples]
    if task == "critic":
        judged = judgement_metrics([j for group in groups for j in group_judgements(group)])
        outcomes = {f"critic/{name}": value for name, value in judged.items() if name != "response/tokens_mean"}
    else:
        outcomes = _flaw_metrics(samples)
    metrics = _score_metrics(samples) | outcomes
    return metrics | _reward_metrics(samples) | _length_metrics(samples) | _group_metrics(groups)


def evaluation_metrics(groups: Sequence[Group], vote_key: Callable[[str], str] = str.strip) -> dict[str, float]:
    """avg@k, pass@k and maj@k over the prompts of one evaluation set, beside its scores and lengths.

    k is the number of samples of the largest group; pass@ is also given for the powers of two below k, each over the
    prompts with at least so many checked samples. Standard errors are over prompts. `vote_key` says which predictions
    are one vote. Names carry no prefix of the evaluation set: the caller adds it.
    """
    samples = [sample for group in groups for sample in group.samples]
    k = max((len(group.samples) for group in groups), default=0)
    counts = [(len(c), sum(c)) for c in map(_checked, groups) if c]
    metrics = _score_metrics(samples) | _flaw_metrics(samples) | _length_metrics(samples)
    shares: dict[str, list[tuple[float, float]]] = {
        f"avg@{k}": [(accuracy, 1) for accuracy in accuracy_by_prompt(groups).values()],
        f"maj@{k}": [(majority_correct(group, vote_key), 1) for group in groups if _checked(group)],
        "score/flawed_positive_ratio": [
            (sum(s.flawed for s in judged), len(judged)) for judged in map(_judged, groups)
        ],
    }
    for j in sorted({k, *(2**i for i in range(1, k.bit_length()))}):
        shares[f"pass@{j}"] = [(pass_at_k(n, right, j), 1) for n, right in counts if n >= j]
    for name, units in shares.items():
        if (total := sum(b for _, b in units)) > 0:
            metrics[name] = sum(a for a, _ in units) / total
        if (stderr := ratio_stderr(units)) is not None:
            metrics[f"{name}_stderr"] = stderr
    return metrics


def critic_evaluation_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """`judgement_metrics` of one evaluation set over all its samples, with standard errors over prompts.

    With k > 1 samples per prompt the plain names say what a single answer is worth, and `maj@k/...` what their vote is.
    """
    samples = [sample for group in groups for sample in group.samples]
    k = max((len(group.samples) for group in groups), default=0)
    by_prompt = [group_judgements(group) for group in groups]
    metrics = _score_metrics(samples) | _length_metrics(samples)
    metrics |= judgement_metrics([j for prompt in by_prompt for j in prompt]) | judgement_stderrs(by_prompt)
    if k > 1:
        votes = [[majority_judgement(prompt)] for prompt in by_prompt if prompt]
        voted = judgement_metrics([vote for (vote,) in votes]) | judgement_stderrs(votes)
        metrics |= {f"maj@{k}/{name}": value for name, value in voted.items()}
    return metrics


def group_judgements(group: Group) -> list[Judgement]:
    """What a critic's samples of one prompt say of it. The subset is the data source after its first `/`, or all."""
    label, total = int(group.prompt.ground_truth), int(group.prompt.extra_info["total_steps"])
    subset = group.prompt.data_source.partition("/")[2] or group.prompt.data_source
    predictions = [(s.score.prediction, len(s.sample.token_ids)) for s in group.samples]
    return [Judgement(None if p is None else int(p), label, total, subset, tokens) for p, tokens in predictions]


def accuracy_by_prompt(groups: Sequence[Group]) -> dict[str, float]:
    """Prompt id -> share of right answers among its checked samples; prompts without a checked sample are left out."""
    return {group.prompt.prompt_id: statistics.fmean(checked) for group in groups if (checked := _checked(group))}


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, contain one of the `right` ones (unbiased pass@k).

    Raises ValueError unless 1 <= k <= n and 0 <= right <= n.
    """
    if not (1 <= k <= n and 0 <= right <= n):
        raise ValueError(
            f"pass@{k} of {right} right among {n} samples is undefined: needs 1 <= k <= n, 0 <= right <= n"
        )
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority_correct(group: Group, vote_key: Callable[[str], str] = str.strip) -> float:
    """Whether the most frequent prediction of a group is right: 0 or 1, or the right share of tied predictions.

    Predictions with one `vote_key` are one; merging right ones alone, which the rule knows to be equal, would favour
    them. Samples without a prediction or a rule outcome do not vote. No votes: 0.
    """
    votes: dict[str, list[bool]] = {}
    for scored in group.samples:
        if scored.score.prediction is not None and scored.score.correct is not None:
            votes.setdefault(vote_key(scored.score.prediction), []).append(scored.score.correct)
    most = max(map(len, votes.values()), default=0)
    return statistics.fmean([statistics.fmean(v) for v in votes.values() if len(v) == most] or [0.0])


def token_ages(lengths: Sequence[int], versions: Sequence[Sequence[tuple[int, int]]], version: int) -> Tensor:
    """Of every response token of samples, one after the other, how many versions before `version` it was sampled.

    Args:
        lengths: tokens of each sample.
        versions: whose weights they come from (Sample.versions).
    """
    ages, counts = [], []
    for length, starts in zip(lengths, versions, strict=True):
        ends = [*(token for token, _ in starts[1:]), length]
        ages += [version - born for _, born in starts]
        counts += [end - start for (start, _), end in zip(starts, ends, strict=True)]
    return torch.repeat_interleave(torch.tensor(ages, dtype=torch.long), torch.tensor(counts, dtype=torch.long))


def staleness_metrics(ages: Tensor, versions: Sequence[Sequence[tuple[int, int]]]) -> dict[str, float]:
    """How old trained tokens are (`token_ages`), and how many samples come from more than one version."""
    if not ages.numel():
        return {}
    values, counts = ages.unique(return_counts=True)
    shares = (counts / ages.numel()).tolist()
    metrics = {"mean": ages.double().mean().item(), "max": float(ages.max())}
    metrics |= {f"share_{age}": share for age, share in zip(values.tolist(), shares, strict=True)}
    metrics["crossed_share"] = statistics.fmean(len(starts) > 1 for starts in versions)
    return {f"staleness/{name}": value for name, value in metrics.items()}


def mismatch_metrics(
    old_logprobs: Tensor, behaviour_logprobs: Tensor, mask: Tensor, prefix: str = "mismatch"
) -> dict[str, float]:
    """How far the policy's log-probabilities are from the rollout engine's: of one version by rounding alone.

    All three share one shape; `mask` is bool and selects response tokens. Maximum and correlation do not add over
    ranks, so pass all tokens of a step at once. Empty when no token is selected.
    """
    if not bool(mask.any()):
        return {}
    old, behaviour = old_logprobs[mask].double(), behaviour_logprobs[mask].double()
    gap = old - behaviour
    bounded = gap.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    metrics = {
        "abs_mean": gap.abs().mean().item(),
        "abs_max": gap.abs().max().item(),
        "kl_k1": -gap.mean().item(),
        "kl_k3": (bounded.exp() - 1 - bounded).mean().item(),
        "token_mult_prob_error": bounded.abs().exp().mean().item(),
    }
    probs = torch.stack([old.exp(), behaviour.exp()])
    centred = probs - probs.mean(dim=1, keepdim=True)
    norms = centred.norm(dim=1)
    if bool((norms > 0).all()):
        metrics["prob_correlation"] = ((centred[0] @ centred[1]) / norms.prod()).item()
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


def _checked(group: Group) -> list[bool]:
    return [s.score.correct for s in group.samples if s.score.correct is not None]


def _judged(group: Group) -> list[Score]:
    return [s.score for s in group.samples if s.score.correct and s.score.verdict is not None]


def _score_metrics(samples: Sequence[ScoredSample]) -> dict[str, float]:
    """Counts, and the share of right outcomes."""
    scores = [s.score for s in samples]
    reasons = Counter(score.unscored_reason for score in scores if score.unscored_reason is not None)
    metrics: dict[str, float] = {"score/samples": len(scores), "score/unscored": reasons.total()}
    metrics |= {f"score/unscored/{reason}": count for reason, count in sorted(reasons.items())}
    if scores:
        metrics["score/unscored_share"] = reasons.total() / len(scores)
    checked = [score.correct for score in scores if score.correct is not None]
    if checked:
        metrics["score/accuracy"] = sum(checked) / len(checked)
    return metrics


def _flaw_metrics(samples: Sequence[ScoredSample]) -> dict[str, float]:
    """Outcome shares. With c checked samples: beta = wrong / c; gamma and alpha split the right rest by the ratio found
    among judged ones, so the three add to 1 and GenRM failures, which only right answers have, do not inflate beta."""
    checked = [s.score for s in samples if s.score.correct is not None]
    right = [score for score in checked if score.correct]
    judged = [score for score in right if score.verdict is not None]
    metrics: dict[str, float] = {"score/judged": len(judged)}
    if not checked:
        return metrics
    accuracy = len(right) / len(checked)
    metrics["score/wrong_share"] = wrong_share = 1.0 - accuracy
    if judged:
        metrics["score/flawed_positive_ratio"] = sum(score.flawed for score in judged) / len(judged)
    if judged or not right:
        flawed_share = accuracy * metrics.get("score/flawed_positive_ratio", 0.0)
        metrics["score/flawed_share"] = flawed_share
        metrics["score/sound_share"] = sound_share = accuracy - flawed_share
        # With no wrong sample rho has no finite value; one wrong sample is assumed, which gives a lower bound to plot.
        metrics["score/learning_progress"] = sound_share / max(wrong_share, 1.0 / len(checked))
    return metrics


def _reward_metrics(samples: Sequence[ScoredSample]) -> dict[str, float]:
    scored = [s.score for s in samples if s.score.reward is not None]
    if not scored:
        return {}
    rewards = [score.reward for score in scored if score.reward is not None]
    return {
        "reward/mean": statistics.fmean(rewards),
        "reward/std": statistics.pstdev(rewards),
        "reward/overlong_mean": statistics.fmean(score.overlong for score in scored),
        "reward/overlong_share": sum(score.overlong < 0 for score in scored) / len(scored),
    }


def _length_metrics(samples: Sequence[ScoredSample]) -> dict[str, float]:
    lengths = sorted(len(s.sample.token_ids) for s in samples)
    if not lengths:
        return {}
    return {
        "response/tokens_mean": statistics.fmean(lengths),
        "response/tokens_min": lengths[0],
        "response/tokens_p95": lengths[math.ceil(0.95 * len(lengths)) - 1],
        "response/tokens_max": lengths[-1],
        "response/truncated_share": sum(s.sample.finish_reason == "length" for s in samples) / len(samples),
    }


def _group_metrics(groups: Sequence[Group]) -> dict[str, float]:
    if not groups:
        return {}
    rewards = [[s.score.reward for s in group.samples] for group in groups]
    unscored = sum(all(reward is None for reward in group) for group in rewards)
    with_signal = sum(has_signal(group_advantages(group, normalize_std=False)) for group in rewards)
    return {
        "group/count": len(groups),
        "group/no_signal_share": 1.0 - with_signal / len(groups),
        "group/unscored_share": unscored / len(groups),
    }
