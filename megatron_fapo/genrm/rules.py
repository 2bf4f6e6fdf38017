"""The rules that compare a final answer with the ground truth: pure, and possibly slow, so they run in workers."""

from __future__ import annotations

import re
from typing import NamedTuple


class RuleResult(NamedTuple):
    correct: bool
    prediction: str | None
    """The final answer as extracted; None when there is none."""
    other: bool | None = None
    """What the rule says that does not decide; None when it was not asked, or gave no answer."""


def last_boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{...}`, braces matched; None when there is none or its braces do not close."""
    opening = "\\boxed{"
    start = text.rfind(opening)
    if start < 0:
        return None
    start += len(opening)
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None


def math_verify_rule(solution: str, ground_truth: str) -> RuleResult:
    """Compares the last box of the solution with the ground truth as mathematics.

    Only the box is read: letting math-verify search the whole text would reward an answer that is merely mentioned.
    No box is a wrong answer. math-verify's own timeouts are off, because they use signal.alarm; the worker is killed.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    prediction = last_boxed(solution)
    if prediction is None:
        return RuleResult(False, None)
    prediction = prediction.strip()
    if prediction == ground_truth.strip():
        return RuleResult(prediction != "", prediction)
    extraction = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    gold, answer = (
        parse(f"\\boxed{{{text.strip().removesuffix('.')}}}", extraction, parsing_timeout=None)
        for text in (ground_truth, prediction)
    )
    return RuleResult(verify(gold, answer, timeout_seconds=None), prediction)


def recipe_string_rule(solution: str, ground_truth: str) -> RuleResult:
    """The recipe's rule: the last box within the last 300 characters, equal as a string after normalisation."""
    boxed = last_boxed(solution[-300:])
    prediction = "[INVALID]" if boxed is None else normalize_final_answer(boxed)
    return RuleResult(prediction == normalize_final_answer(ground_truth), prediction)


RULES = {"math_verify": math_verify_rule, "recipe_string": recipe_string_rule}
"""By the words of `reward.verifier`."""
OTHER_RULE = {"math_verify": "recipe_string", "recipe_string": "math_verify"}


# Order matters in all three tables: they are the recipe's (verl's `math_dapo` scoring), which has them from Minerva.
_SUBSTITUTIONS = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    ("\\$", ""),
    ("\\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (",\\text{and}", ","),
    ("\\text{and}", ","),
    ("\\text{m}", "\\text{}"),
)
# fmt: off
_REMOVED = (
    "square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", "\\ldots", "sue", "points",
    "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students",
    "childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}",
    "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots",
)
# fmt: on
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(.*?)\$(.*?)\$(.*)", r"$\2$"),
        (r"\\text\{(.*?)\}", r"\1"),
        (r"\\textbf\{(.*?)\}", r"\1"),
        (r"\\overline\{(.*?)\}", r"\1"),
        (r"\\boxed\{(.*)\}", r"\1"),
        (r"frac([^{])(.)", r"frac{\1}{\2}"),
        (r"sqrt([^{])", r"sqrt{\1}"),
    )
)


def normalize_final_answer(answer: str) -> str:
    """An answer without units, spacing and LaTeX dressing, as the recipe's string rule compares it."""
    answer = answer.split("=")[-1]
    for before, after in _SUBSTITUTIONS:
        answer = answer.replace(before, after)
    for removed in _REMOVED:
        answer = answer.replace(removed, "")
    for pattern, replacement in _REWRITES:
        answer = pattern.sub(replacement, answer)
    answer = answer.replace("$", "")
    digits = answer.replace(",", "")
    return (digits if digits.isdigit() else answer).strip()
