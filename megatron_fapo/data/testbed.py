"""The testbed's problems and written solutions: small arithmetic stories whose every written step can be judged.

A story starts with a number of things, gains and loses some, and packs the rest into boxes of 3 or 4; the question is
how many are left over. There are only `box_size` possible answers, so guessing, skipping and slipping land on the right
one often: right answers with wrong steps (flawed positives) are common, as in real reinforcement learning.

    Mia has 7 figs. Mia sells 4. Mia finds 5. Mia packs the figs into boxes of 3. How many figs are left over?

A sound solution has one paragraph per fact, separated by blank lines, and boxes its answer:

    Mia has 7 figs.
    Mia sells 4: 7 - 4 = 3.
    Mia finds 5: 3 + 5 = 8.
    Boxes of 3: 8 = 2 * 3 + 2, so \\boxed{2}.

Everything is a function of (seed, index): same arguments, same text, on every machine.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cached_property

NAMES = ("Mia", "Tom", "Ana", "Ben", "Eva", "Leo", "Ida", "Max")
OBJECTS = ("figs", "nuts", "pears", "plums", "coins", "shells", "stamps", "marbles")
GAINS = ("finds", "buys", "gets", "picks")
LOSSES = ("loses", "sells", "drops", "trades")
BOX_SIZES = (3, 4)
MAX_AMOUNT = 6
MAX_TOTAL = 9
"""Running totals stay in 0..MAX_TOTAL: few enough sums for a model of under a million parameters to learn them all in
a minute. Sums are what it learns last; with two-digit totals it takes three times as long."""


@dataclass(frozen=True)
class Operation:
    """One sentence of the story: `verb` adds (sign +1) or takes away (sign -1) `amount`."""

    verb: str
    amount: int

    @property
    def sign(self) -> int:
        return 1 if self.verb in GAINS else -1


@dataclass(frozen=True)
class Problem:
    """One story. All numbers are small non-negative integers; `totals` has len(operations) + 1 entries."""

    name: str
    objects: str
    start: int
    operations: tuple[Operation, ...]
    box_size: int

    @cached_property
    def totals(self) -> tuple[int, ...]:
        totals = [self.start]
        for operation in self.operations:
            totals.append(totals[-1] + operation.sign * operation.amount)
        return tuple(totals)

    @property
    def answer(self) -> str:
        return str(self.totals[-1] % self.box_size)

    @cached_property
    def question(self) -> str:
        sentences = [f"{self.name} has {self.start} {self.objects}."]
        sentences += [f"{self.name} {operation.verb} {operation.amount}." for operation in self.operations]
        sentences += [
            f"{self.name} packs the {self.objects} into boxes of {self.box_size}.",
            f"How many {self.objects} are left over?",
        ]
        return " ".join(sentences)


_NAME, _OBJECTS = "|".join(NAMES), "|".join(OBJECTS)
_VERBS = "|".join(GAINS + LOSSES)
_QUESTION = re.compile(
    rf"({_NAME}) has ([0-9]{{1,6}}) ({_OBJECTS})\.((?: \1 (?:{_VERBS}) [0-9]{{1,6}}\.)+)"
    rf" \1 packs the \3 into boxes of ([1-9][0-9]{{0,5}})\. How many \3 are left over\?"
)


def parse_question(question: str) -> Problem:
    """The Problem that a question tells, from its text alone.

    Raises ValueError when the text is not a testbed question.
    """
    match = _QUESTION.fullmatch(question.strip())
    if match is None:
        raise ValueError(f"not a testbed question: {question[:120]!r}; expected the form of testbed.Problem.question")
    name, start, objects, sentences, box_size = match.groups()
    operations = tuple(
        Operation(verb, int(amount)) for verb, amount in re.findall(rf"({_VERBS}) ([0-9]+)\.", sentences)
    )
    return Problem(name, objects, int(start), operations, int(box_size))


def make_problem(seed: int, index: int, min_steps: int = 2, max_steps: int = 3) -> Problem:
    """Problem number `index` of stream `seed`, with min_steps..max_steps gains and losses (both ends included).

    Raises ValueError when the bounds are not 1 <= min_steps <= max_steps.
    """
    if not 1 <= min_steps <= max_steps:
        raise ValueError(f"steps must satisfy 1 <= min_steps <= max_steps, got {min_steps} and {max_steps}")
    rng = random.Random(f"testbed/{seed}/{index}")
    start = rng.randint(2, 9)
    total, operations = start, []
    for _ in range(rng.randint(min_steps, max_steps)):
        room = {GAINS: min(MAX_AMOUNT, MAX_TOTAL - total), LOSSES: min(MAX_AMOUNT, total)}
        verbs = rng.choice([kind for kind, most in room.items() if most > 0])
        operation = Operation(rng.choice(verbs), rng.randint(1, room[verbs]))
        total += operation.sign * operation.amount
        operations.append(operation)
    return Problem(rng.choice(NAMES), rng.choice(OBJECTS), start, tuple(operations), rng.choice(BOX_SIZES))
