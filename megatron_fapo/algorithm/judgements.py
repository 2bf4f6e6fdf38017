"""How well a critic judges: FlawedPositiveBench (paper, equation 6), ProcessBench, and how near a found flaw is placed.

One convention for unparsable answers (predicted None), here and everywhere: they are wrong whatever the label, and are
never "called flawed". A flaw answered so is a missed flaw and a wrong `err_loc_acc`; a sound solution answered so is a
wrong `corr_acc` and leaves precision alone. Counting them as flawed would pay a critic for babble on benchmarks with
many flaws; leaving them out would pay it for silence on hard ones.

Invariants
- Every value is a ratio of sums over judgements; a ratio over nothing is left out, not reported as 0.
- A critic that calls nothing flawed has F1 0 and no precision; a set without flaws has no F1.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

Terms = dict[str, tuple[float, float]]
"""(numerator, denominator) that one answer adds to each ratio."""


@dataclass(frozen=True)
class Judgement:
    """One answer of a critic, and what was to be found."""

    predicted: int | None
    """-1 for no error, else the 0-based paragraph of the first one; None when the answer has no readable index."""
    label: int
    """The truth, in the same terms."""
    total_steps: int
    """Paragraphs of the solution, n."""
    subset: str
    """The part of the benchmark that the solution is from; ProcessBench averages over these."""
    tokens: int
    """Length of the answer."""


def judgement_metrics(judgements: Sequence[Judgement]) -> dict[str, float]:
    """Confusion table (counts `confusion/<label>_as_<answer>`) and every ratio of docs/metrics.md, "Critics"."""
    table = Counter((_class(j.label), _class(j.predicted)) for j in judgements)
    metrics: dict[str, float] = {
        f"confusion/{label}_as_{answer}": table[label, answer]
        for label in ("flawed", "sound")
        for answer in ("flawed", "sound", "unparsable")
    }
    metrics |= {name: value for name, (value, _) in _estimates([judgements]).items()}
    return metrics


def judgement_stderrs(by_prompt: Sequence[Sequence[Judgement]]) -> dict[str, float]:
    """Standard errors `<metric>_stderr` of the ratios of `judgement_metrics`, over prompts: the judgements of one
    prompt are not independent. Left out where `ratio_stderr` gives none."""
    found = _estimates(by_prompt).items()
    return {f"{name}_stderr": stderr for name, (_, stderr) in found if stderr is not None}


def ratio_stderr(units: Sequence[tuple[float, float]]) -> float | None:
    """Standard error of sum(a) / sum(b) over independent units (a, b), to first order (the ratio estimator).

    For b = 1 it is the unbiased standard deviation over sqrt(n); for several answers per prompt it is the error that
    resampling whole prompts gives. None when fewer than two units have b > 0, or all of them agree: then there is no
    spread to tell it from, and 0 would claim certainty.
    """
    units = [(a, b) for a, b in units if b > 0]
    total = sum(b for _, b in units)
    if len(units) < 2:
        return None
    ratio = sum(a for a, _ in units) / total
    squares = sum((a - ratio * b) ** 2 for a, b in units)
    stderr = math.sqrt(len(units) / (len(units) - 1) * squares) / total
    return stderr if stderr > 1e-12 else None


def majority_judgement(judgements: Sequence[Judgement]) -> Judgement:
    """The vote of several answers to one prompt: the most frequent readable index, of tied ones the first sampled.

    The order of sampling knows nothing of the label, so ties favour neither side. None when no answer is readable. Its
    tokens are those of all answers: what the vote costs. Raises ValueError for no judgement.
    """
    if not judgements:
        raise ValueError("a vote needs at least one judgement")
    first = judgements[0]
    votes = Counter(j.predicted for j in judgements if j.predicted is not None).most_common(1)
    tokens = sum(j.tokens for j in judgements)
    return Judgement(votes[0][0] if votes else None, first.label, first.total_steps, first.subset, tokens)


def _class(index: int | None) -> str:
    return "unparsable" if index is None else "sound" if index == -1 else "flawed"


def judgement_terms(j: Judgement) -> Terms:
    """What one judgement adds to each ratio."""
    flawed, called = j.label != -1, _class(j.predicted) == "flawed"
    found, exact = flawed and called, j.predicted == j.label
    distance = abs(j.predicted - j.label) / j.total_steps if found and j.predicted is not None else 0.0
    return {
        "accuracy": (_class(j.predicted) == _class(j.label), 1),
        "exact_accuracy": (exact, 1),
        "precision": (found, called),
        "recall": (found, flawed),
        "f1": (2 * found, called + flawed),  # the harmonic mean, without dividing by a precision over nothing
        "localisation_error": (distance, found),
        "localisation_exact": (found and exact, found),
        "err_loc_acc": (flawed and exact, flawed),
        "corr_acc": (not flawed and exact, not flawed),
        "unparsable_share": (j.predicted is None, 1),
        "response/tokens_mean": (j.tokens, 1),
    }


def _estimates(by_prompt: Sequence[Sequence[Judgement]]) -> dict[str, tuple[float, float | None]]:
    """Metric -> (value, standard error), for the whole and for each subset."""
    terms: dict[str, list[list[Terms]]] = {}
    for prompt in by_prompt:
        for subset in dict.fromkeys(j.subset for j in prompt):
            terms.setdefault(subset, []).append([judgement_terms(j) for j in prompt if j.subset == subset])
    whole = ratios([prompt for subset in terms.values() for prompt in subset])
    if "recall" not in whole:
        whole.pop("f1", None)
    scores = []
    for subset in sorted(terms):
        own = ratios(terms[subset]) if len(terms) > 1 else whole
        parts = {name: own[name] for name in own if name in ("err_loc_acc", "corr_acc")}
        if len(parts) == 2:
            parts["processbench_f1"] = _harmonic(*parts.values())
            scores.append(parts["processbench_f1"])
        if len(terms) > 1:
            whole |= {f"{subset}/{name}": estimate for name, estimate in parts.items()}
    if scores:
        errors = [stderr for _, stderr in scores if stderr is not None]
        spread = math.hypot(*errors) / len(scores) if len(errors) == len(scores) else None
        whole["processbench_f1"] = statistics.fmean(value for value, _ in scores), spread
        whole["processbench_f1_pooled"] = _harmonic(whole["err_loc_acc"], whole["corr_acc"])
    return whole


def ratios(by_prompt: Sequence[Sequence[Terms]]) -> dict[str, tuple[float, float | None]]:
    """Name -> (sum of numerators / sum of denominators, its standard error over prompts), of what each answer adds."""
    found = {}
    for name in by_prompt[0][0] if by_prompt else ():
        pairs = [(sum(t[name][0] for t in prompt), sum(t[name][1] for t in prompt)) for prompt in by_prompt]
        if (total := sum(b for _, b in pairs)) > 0:
            found[name] = sum(a for a, _ in pairs) / total, ratio_stderr(pairs)
    return found


def _harmonic(first: tuple[float, float | None], second: tuple[float, float | None]) -> tuple[float, float | None]:
    """2ab / (a + b) of two independent estimates, 0 when both are; its error to first order."""
    (a, error_a), (b, error_b) = first, second
    if a + b == 0:
        return 0.0, None
    if error_a is None or error_b is None:
        return 2 * a * b / (a + b), None
    return 2 * a * b / (a + b), 2 * math.hypot(b * b * error_a, a * a * error_b) / (a + b) ** 2
