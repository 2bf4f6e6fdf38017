"""The oracle: says of any written text which paragraph, if any, is the first that is not a valid step.

It reads numbers, operators, boxes and the testbed's own words, and ignores all other wording. A paragraph is valid when
each fact in it follows from the question and the facts before it: the arithmetic is right, the operation is the story's
next one, the quantity carried is the one reached so far, and a box holds the remainder just worked out. A jump to a
total or to an answer that nothing written supports is therefore wrong, even when the number is right.
"""

from __future__ import annotations

import re

from megatron_fapo.data.paragraphs import split_paragraphs
from megatron_fapo.data.testbed import GAINS, LOSSES, NAMES, OBJECTS, Problem, parse_question

_NUMBER = r"0*([0-9]{1,9})"
_FACT = re.compile(r"\\boxed\{[^{}]*\}|\\boxed|[0-9=+*/×^%-][0-9=+*/×^% \t-]*")
_BOX = re.compile(rf"\\boxed\{{\s*{_NUMBER}\s*\}}")
_STEP = re.compile(rf"{_NUMBER}\s*([+-])\s*{_NUMBER}\s*=\s*{_NUMBER}")
_DIVISION = re.compile(rf"{_NUMBER}\s*=\s*{_NUMBER}\s*[*×]\s*{_NUMBER}\s*\+\s*{_NUMBER}")
_WORDS = re.compile(r"\b(?:" + "|".join(GAINS + LOSSES + NAMES + OBJECTS) + r")\b")


def facts(paragraph: str) -> list[str]:
    """What a paragraph states, in order: numbers, equations and boxes, as written."""
    found = (match.group().strip() for match in _FACT.finditer(paragraph))
    return [fact for fact in found if re.search(r"[0-9=\\]", fact)]


def first_wrong_step(problem: Problem, solution_text: str) -> int:
    """0-based index of the first invalid paragraph, -1 when all are valid and the answer is reached.

    A solution that stops before its boxed answer is wrong in its last paragraph; an empty one is wrong in paragraph 0.
    Total: defined for any text, never raises.
    """
    reader = _Reader(problem)
    paragraphs = split_paragraphs(solution_text)
    for index, paragraph in enumerate(paragraphs):
        if not reader.accepts(paragraph):
            return index
    return -1 if reader.answered else max(len(paragraphs) - 1, 0)


def judge(question: str, ground_truth: str, solution: str) -> int:
    """The oracle as `genrm.judge_function`: the best judge there can be. Raises ValueError for other questions."""
    del ground_truth
    return first_wrong_step(parse_question(question), solution)


class _Reader:
    """How far the facts read so far have carried the story."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.started = False
        self.operations_done = 0
        self.divided = False
        self.answered = False

    def accepts(self, paragraph: str) -> bool:
        """Follow one paragraph; False when something in it is not valid here."""
        if any(char.isdigit() and not char.isascii() for char in paragraph):
            return False
        first_operation = self.operations_done
        announced: int | None = None  # a quantity restated from the question, which the next equation must then use
        for fact in facts(paragraph):
            if re.fullmatch(_NUMBER, fact) and self.started and announced is None and not self.divided:
                announced = int(fact)
                if announced != self._next_quantity():
                    return False
            elif self._follow(fact):
                announced = None
            else:
                return False
        operations = self.problem.operations[first_operation : self.operations_done]
        known = {self.problem.name, self.problem.objects}
        for operation in operations:
            # Another verb of the same direction is a paraphrase; one of the other direction contradicts the story.
            known.update(GAINS if operation.sign > 0 else LOSSES)
        return announced is None and set(_WORDS.findall(paragraph)) <= known

    def _next_quantity(self) -> int:
        operations = self.problem.operations
        return (
            operations[self.operations_done].amount if self.operations_done < len(operations) else self.problem.box_size
        )

    def _follow(self, fact: str) -> bool:
        problem, total = self.problem, self.problem.totals[self.operations_done]
        if match := re.fullmatch(_NUMBER, fact):
            fresh, self.started = not self.started, True
            return fresh and int(match[1]) == problem.start
        if match := _STEP.fullmatch(fact):
            if self.operations_done == len(problem.operations):
                return False
            operation = problem.operations[self.operations_done]
            left, right, result = int(match[1]), int(match[3]), int(match[4])
            sign = 1 if match[2] == "+" else -1
            operands = [(total, operation.amount)] + [(operation.amount, total)] * (sign == 1)
            self.started = True
            self.operations_done += 1
            return sign == operation.sign and (left, right) in operands and result == left + sign * right
        if match := _DIVISION.fullmatch(fact):
            if self.divided or self.operations_done < len(problem.operations):
                return False
            self.divided = True
            dividend, *factors, remainder = map(int, match.groups())
            whole = factors[0] * factors[1] + remainder
            return dividend == total == whole and problem.box_size in factors and remainder < problem.box_size
        if match := _BOX.fullmatch(fact):
            fresh, self.answered = not self.answered, True
            return fresh and self.divided and match[1] == problem.answer
        return False
