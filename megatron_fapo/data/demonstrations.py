"""Supervised examples that warm up the testbed's tiny policy and tiny GenRM before reinforcement learning.

The policy learns the form of a solution and bad habits with it: it slips, jumps to totals and guesses answers about as
often as `Habits` says, while the most likely next word is the right one. Sampled at temperature 1 it is therefore right
about half of the time and often for no good reason, and reinforcement learning has something to sharpen. The GenRM
learns critiques that work every paragraph out anew, set it beside what is written, and stop at the first that differs.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_fapo.data.critic import critic_row
from megatron_fapo.data.datasets import INSTRUCTION
from megatron_fapo.data.oracle import facts, first_wrong_step
from megatron_fapo.data.paragraphs import split_paragraphs
from megatron_fapo.data.solutions import (
    FLAWED_POSITIVE,
    SOUND,
    final_paragraph,
    guess_paragraph,
    jump_paragraph,
    start_paragraph,
    step_paragraph,
    write_solution,
)
from megatron_fapo.data.testbed import Problem, make_problem

_NUMBER = re.compile(r"[0-9]+")
Example = tuple[list[dict[str, str]], str]
"""(chat messages, response text)"""
PromptBuilder = Callable[[str, str, str], list[dict[str, str]]]
"""(question, ground_truth, solution) -> the chat messages that ask a GenRM for a verdict"""


@dataclass(frozen=True)
class Habits:
    """How often a demonstrated solution goes wrong, and how; all are probabilities."""

    guess: float = 0.15
    """The solution breaks off after 0 or more steps and boxes any of the possible answers."""
    jump: float = 0.30
    """The solution replaces its last steps, one or more, by an unsupported total."""
    slip: float = 0.10
    """Each computed number is off by one or two; the last remainder is any possible one."""
    jump_slip: float = 0.40
    """The total that a jump lands on is off by one or two."""
    quotient: float = 0.35
    """The quotient of the last division is off by one or two. The answer does not depend on it: a flaw that costs
    nothing, which a reward for answers alone therefore never mends."""


STUDIED_HABITS = Habits(guess=0.1, jump=0.15, slip=0.35, quotient=0.45)
"""What the GenRM studies: more slips than the policy makes, because where nearly every written result is right, a GenRM
learns to copy it in place of working it out."""


def habitual_solution(problem: Problem, rng: random.Random, habits: Habits) -> str:
    """A solution as a careless student writes it: any mixture of sound steps, slips, jumps and guesses."""

    def off_at_times(number: int, chance: float) -> int:
        return max(0, number + rng.choice((-2, -1, 1, 2))) if rng.random() < chance else max(0, number)

    operations = problem.operations
    mood = rng.random()
    guesses, jumps = mood < habits.guess, habits.guess <= mood < habits.guess + habits.jump
    done = rng.randrange(len(operations)) if guesses or jumps else len(operations)
    paragraphs, total = [start_paragraph(problem)], problem.start
    for operation in operations[:done]:
        result = off_at_times(total + operation.sign * operation.amount, habits.slip)
        paragraphs.append(step_paragraph(problem, operation, total, result))
        total = result
    if guesses:
        return "\n\n".join([*paragraphs, guess_paragraph(rng.randrange(problem.box_size))])
    if jumps:
        total = off_at_times(total + problem.totals[-1] - problem.totals[done], habits.jump_slip)
        paragraphs.append(jump_paragraph(problem, total))
    remainder = rng.randrange(problem.box_size) if rng.random() < habits.slip else total % problem.box_size
    quotient = off_at_times(total // problem.box_size, habits.quotient)
    return "\n\n".join([*paragraphs, final_paragraph(problem, total, quotient, remainder)])


def write_critique(problem: Problem, solution_text: str) -> str:
    """The critique that a GenRM should give: a line for each paragraph up to the first wrong one, then its index.

    A line sets each number of the paragraph beside the one that should stand there, `4|3!` where they differ, and says
    whether it is right; a paragraph of another form stands before what it should be as a whole. Side by side, because
    a tiny model that compared two whole equations overlooked the difference in every second one. Boxes within lines
    are written as `box 2`, so that the only `\\boxed{}` of a critique, even of one cut short, is its verdict.
    """
    wrong = first_wrong_step(problem, solution_text)
    sound = write_solution(problem, SOUND, random.Random(0)).paragraphs
    written = split_paragraphs(solution_text)
    lines = []
    for index, paragraph in enumerate(written if wrong == -1 else written[: wrong + 1]):
        ought = _stated(sound[index]) if index < len(sound) else "nothing"
        verdict = "wrong" if index == wrong else "right"
        lines.append(f"{index}: {_compared(_stated(paragraph), ought, index == wrong)}, {verdict}.\n")
    return "".join(lines) + f"\\boxed{{{wrong}}}"


def policy_sft_examples(n: int, seed: int) -> list[Example]:
    """n demonstrations for the policy, asked as datasets.prompt_row asks; a function of the arguments alone."""
    examples: list[Example] = []
    for index in range(n):
        problem = make_problem(seed, index)
        solution = habitual_solution(problem, random.Random(f"policy/{seed}/{index}"), Habits())
        examples.append(([{"role": "user", "content": f"{problem.question}\n\n{INSTRUCTION}"}], solution))
    return examples


def genrm_sft_examples(n: int, seed: int, prompt_builder: PromptBuilder) -> list[Example]:
    """n critiques of solutions: a quarter sound, a quarter with a planted error and the right answer, half habitual."""
    examples: list[Example] = []
    for index in range(n):
        problem = make_problem(seed, index)
        rng = random.Random(f"genrm/{seed}/{index}")
        kind = rng.choice((SOUND, FLAWED_POSITIVE, None, None))
        if kind is None:
            solution = habitual_solution(problem, rng, STUDIED_HABITS)
        else:
            solution = write_solution(problem, kind, rng).text
        messages = prompt_builder(problem.question, problem.answer, solution)
        examples.append((messages, write_critique(problem, solution)))
    return examples


def critic_rows(n: int, seed: int, prompt_builder: PromptBuilder) -> Iterator[dict[str, Any]]:
    """n rows in FAPO-Critic's schema: right answers only, half of them sound, the others flawed by habit or by plan."""
    seen: set[tuple[str, str]] = set()
    for index in itertools.count():
        if len(seen) == n:
            return
        problem = make_problem(seed, index)
        rng = random.Random(f"critic/{seed}/{index}")
        solution = write_solution(problem, SOUND if index % 2 else FLAWED_POSITIVE, rng).text
        for _ in range(8 if index % 2 == 0 and rng.random() < 0.5 else 0):
            habitual = habitual_solution(problem, rng, STUDIED_HABITS)
            if habitual.endswith(f"{{{problem.answer}}}.") and first_wrong_step(problem, habitual) != -1:
                solution = habitual
                break
        # The domain is small: problems come twice, and a critic's dataset refuses a prompt that does.
        if (problem.question, solution) in seen:
            continue
        seen.add((problem.question, solution))
        yield critic_row(
            "fapo_critic",
            prompt_builder(problem.question, problem.answer, solution),
            first_wrong_step(problem, solution),
            len(split_paragraphs(solution)),
            question_index=index,
            split="train",
            index=index,
        )


def _compared(stated: str, ought: str, wrong: bool) -> str:
    if _NUMBER.sub("#", stated) != _NUMBER.sub("#", ought):
        return f"{stated}, should be {ought}"
    wanted = iter(_NUMBER.findall(ought))

    def pair(match: re.Match[str]) -> str:
        number = next(wanted)
        return f"{match[0]}|{number}" + "!" * (wrong and number != match[0])

    return _NUMBER.sub(pair, stated)


def _stated(paragraph: str) -> str:
    """The numbers of a paragraph without its words: its equations and boxes, or else its bare numbers."""
    found = facts(paragraph)
    found = [fact for fact in found if not fact.isdigit()] or found
    return ", ".join(found).replace("\\boxed{", "box ").replace("}", "") or "nothing"
