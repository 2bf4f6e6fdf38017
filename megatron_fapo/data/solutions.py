"""Written solutions of testbed problems: sound ones, and ones with one planted error whose place is known.

The planted errors are those of real flawed positives: a slip in the arithmetic, a misread quantity, the wrong
operation, a skipped step, a jump to a total or to an answer that nothing written supports, and an end that contradicts
the steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_fapo.data.testbed import GAINS, LOSSES, Operation, Problem

SOUND, FLAWED_POSITIVE, WRONG = "sound", "flawed_positive", "wrong"
SLIPS = (-4, -3, -2, -1, 1, 2, 3, 4)


@dataclass(frozen=True)
class Solution:
    paragraphs: tuple[str, ...]
    answer: str
    """What the last box says."""
    first_wrong: int
    """0-based index of the planted error's paragraph, -1 when sound."""

    @property
    def text(self) -> str:
        return "\n\n".join(self.paragraphs)


def write_solution(problem: Problem, kind: str, rng: random.Random) -> Solution:
    """A solution of `kind`: `sound`, `flawed_positive` (right answer, one invalid step) or `wrong` (wrong answer).

    Flaw families are equally likely, and so are all flaws of the family that end in the wanted answer. Raises
    ValueError for another kind.
    """
    if kind == SOUND:
        return _carry_on(problem, [start_paragraph(problem)], problem.start, first_wrong=-1)
    if kind not in (FLAWED_POSITIVE, WRONG):
        raise ValueError(f"unknown kind {kind!r}: use {SOUND}, {FLAWED_POSITIVE} or {WRONG}")
    for family in rng.sample(_FAMILIES, len(_FAMILIES)):
        if wanted := [s for s in family(problem) if (s.answer == problem.answer) == (kind == FLAWED_POSITIVE)]:
            return rng.choice(wanted)
    raise AssertionError("a guess can end in any answer, so some family always fits")


def start_paragraph(problem: Problem) -> str:
    return f"{problem.name} has {problem.start} {problem.objects}."


def step_paragraph(problem: Problem, operation: Operation, total: int, result: int, sign: int | None = None) -> str:
    symbol = "+" if (sign or operation.sign) > 0 else "-"
    return f"{problem.name} {operation.verb} {operation.amount}: {total} {symbol} {operation.amount} = {result}."


def jump_paragraph(problem: Problem, total: int) -> str:
    return f"That makes {total} {problem.objects}."


def guess_paragraph(answer: int | str) -> str:
    return f"It must be \\boxed{{{answer}}}."


def final_paragraph(
    problem: Problem, total: int, quotient: int | None = None, remainder: int | None = None, answer: int | None = None
) -> str:
    """The division and the boxed answer; quotient, remainder and answer are the right ones of `total` unless given."""
    quotient = total // problem.box_size if quotient is None else quotient
    remainder = total % problem.box_size if remainder is None else remainder
    answer = remainder if answer is None else answer
    size = problem.box_size
    return f"Boxes of {size}: {total} = {quotient} * {size} + {remainder}, so \\boxed{{{answer}}}."


def _carry_on(problem: Problem, paragraphs: list[str], total: int, first_wrong: int, done: int = 0) -> Solution:
    """Finish soundly, given that the paragraphs so far claim `total` after `done` operations."""
    paragraphs = list(paragraphs)
    for operation in problem.operations[done:]:
        result = total + operation.sign * operation.amount
        paragraphs.append(step_paragraph(problem, operation, total, result))
        total = result
    paragraphs.append(final_paragraph(problem, total))
    return Solution(tuple(paragraphs), str(total % problem.box_size), first_wrong)


def _stays_natural(problem: Problem, total: int, done: int) -> bool:
    """No total below zero from here on: a story that goes negative would give its error away by form alone."""
    remaining = [t - problem.totals[done] for t in problem.totals[done:]]
    return all(total + change >= 0 for change in remaining)


def _sound_start(problem: Problem, done: int) -> list[str]:
    """The sound paragraphs before operation number `done`."""
    steps = zip(problem.operations[:done], problem.totals, problem.totals[1:], strict=False)
    return [start_paragraph(problem), *(step_paragraph(problem, *step) for step in steps)]


def _with_replaced_step(
    problem: Problem, replace: Callable[[Operation, int], Sequence[tuple[str, int]]]
) -> list[Solution]:
    """One solution for each operation and each (paragraph, result) that `replace(operation, total before)` offers."""
    return [
        _carry_on(problem, [*_sound_start(problem, i), paragraph], result, first_wrong=i + 1, done=i + 1)
        for i, operation in enumerate(problem.operations)
        for paragraph, result in replace(operation, problem.totals[i])
        if _stays_natural(problem, result, i + 1)
    ]


def _slipped(problem: Problem) -> list[Solution]:
    def replace(operation: Operation, total: int) -> list[tuple[str, int]]:
        results = [total + operation.sign * operation.amount + slip for slip in SLIPS]
        return [(step_paragraph(problem, operation, total, result), result) for result in results]

    return _with_replaced_step(problem, replace)


def _misread(problem: Problem) -> list[Solution]:
    def replace(operation: Operation, total: int) -> list[tuple[str, int]]:
        others = [Operation(operation.verb, amount) for amount in range(1, 10) if amount != operation.amount]
        results = [(other, total + other.sign * other.amount) for other in others]
        return [(step_paragraph(problem, other, total, result), result) for other, result in results]

    return _with_replaced_step(problem, replace)


def _wrong_operation(problem: Problem) -> list[Solution]:
    def replace(operation: Operation, total: int) -> list[tuple[str, int]]:
        result = total - operation.sign * operation.amount
        return [(step_paragraph(problem, operation, total, result, -operation.sign), result)]

    return _with_replaced_step(problem, replace)


def _skipped(problem: Problem) -> list[Solution]:
    changes = [operation.sign * operation.amount for operation in problem.operations]
    return [
        _carry_on(problem, _sound_start(problem, i), problem.totals[i], first_wrong=i + 1, done=i + 1)
        for i in range(len(changes))
        # Of two equal changes in a row the second is missed, wherever the skip was meant.
        if changes[i] not in changes[i + 1 : i + 2] and _stays_natural(problem, problem.totals[i], i + 1)
    ]


def _jumped(problem: Problem) -> list[Solution]:
    return [
        _carry_on(
            problem,
            [*_sound_start(problem, i), jump_paragraph(problem, total)],
            total,
            first_wrong=i + 1,
            done=len(problem.operations),
        )
        for i in range(len(problem.operations))
        for total in (problem.totals[-1] + slip for slip in (0, *SLIPS))
        if total >= 0
    ]


def _guessed(problem: Problem) -> list[Solution]:
    return [
        Solution((*_sound_start(problem, i), guess_paragraph(answer)), str(answer), i + 1)
        for i in range(len(problem.operations) + 1)
        for answer in range(problem.box_size)
    ]


def _bad_end(problem: Problem) -> list[Solution]:
    """Wrong quotient or remainder, or a box that contradicts the division."""
    total, size = problem.totals[-1], problem.box_size
    quotient, remainder = divmod(total, size)
    end = len(problem.operations)
    ends = [(quotient + slip, remainder, remainder) for slip in (-2, -1, 1, 2) if quotient + slip >= 0]
    ends += [
        (quotient, other, answer)
        for other in range(size)
        for answer in range(size)
        if other != remainder or answer != remainder
    ]
    return [
        Solution((*_sound_start(problem, end), final_paragraph(problem, total, *values)), str(values[-1]), end + 1)
        for values in ends
    ]


_FAMILIES = (_slipped, _misread, _wrong_operation, _skipped, _jumped, _guessed, _bad_end)

assert not set(GAINS) & set(LOSSES), "a verb must say which way it goes"
