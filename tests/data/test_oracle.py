from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fapo.data import solutions
from megatron_fapo.data.oracle import first_wrong_step
from megatron_fapo.data.paragraphs import split_paragraphs
from megatron_fapo.data.solutions import FLAWED_POSITIVE, SOUND, WRONG, write_solution
from megatron_fapo.data.testbed import make_problem, parse_question

SEEDS = st.integers(0, 10**9)


def problem_and_sound(seed: int, steps: int = 4):
    problem = make_problem(seed, 0, 1, steps)
    return problem, write_solution(problem, SOUND, random.Random(seed)).text


def judged(text: str, question: str | None = None) -> int:
    """Verdict on a solution of one fixed problem: 7 + 5 - 4 = 8, boxes of 3, 2 left over."""
    story = "Mia has 7 figs. Mia finds 5. Mia sells 4. Mia packs the figs into boxes of 3. How many figs are left over?"
    return first_wrong_step(parse_question(question or story), text)


SOUND_TEXT = (
    "Mia has 7 figs.\n\nMia finds 5: 7 + 5 = 12.\n\nMia sells 4: 12 - 4 = 8.\n\n"
    "Boxes of 3: 8 = 2 * 3 + 2, so \\boxed{2}."
)


@settings(max_examples=150, deadline=None)
@given(seed=SEEDS)
def test_sound_solutions_are_sound(seed):
    problem, text = problem_and_sound(seed)
    assert first_wrong_step(problem, text) == -1
    assert text.endswith(f"\\boxed{{{problem.answer}}}.")


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
def test_every_planted_error_is_found_at_its_index(seed):
    problem = make_problem(seed, 1, 1, 4)
    planted = [solution for family in solutions._FAMILIES for solution in family(problem)]
    assert len(planted) > 20
    for solution in planted:
        assert first_wrong_step(problem, solution.text) == solution.first_wrong, solution.text


@settings(max_examples=150, deadline=None)
@given(seed=SEEDS, kind=st.sampled_from([FLAWED_POSITIVE, WRONG]))
def test_kinds_end_as_they_say(seed, kind):
    problem = make_problem(seed, 2)
    solution = write_solution(problem, kind, random.Random(seed))
    assert (solution.answer == problem.answer) == (kind == FLAWED_POSITIVE)
    assert f"\\boxed{{{solution.answer}}}" in solution.paragraphs[-1]
    assert first_wrong_step(problem, solution.text) == solution.first_wrong != -1


@settings(max_examples=150, deadline=None)
@given(seed=SEEDS, data=st.data())
def test_corrupting_any_number_or_operator_is_caught_in_its_paragraph(seed, data):
    problem, text = problem_and_sound(seed)
    spot = data.draw(st.sampled_from(list(re.finditer(r"[0-9]+|(?<= )[-+*=](?= )", text))))
    replacements = [c for c in "+-*=" if c != spot.group()]
    if spot.group().isdigit():
        replacements = [str(n) for n in range(60) if n != int(spot.group())]
    corrupted = text[: spot.start()] + data.draw(st.sampled_from(replacements)) + text[spot.end() :]
    assert first_wrong_step(problem, corrupted) == text[: spot.start()].count("\n\n")


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS, data=st.data())
def test_missing_repeated_and_swapped_paragraphs_are_caught(seed, data):
    problem, text = problem_and_sound(seed)
    paragraphs = text.split("\n\n")
    # A start that is not restated is supported by the first equation, so only steps and the end are needed.
    i = data.draw(st.integers(1, len(paragraphs) - 1))
    assert first_wrong_step(problem, "\n\n".join(paragraphs[:i] + paragraphs[i + 1 :])) != -1
    assert first_wrong_step(problem, "\n\n".join([*paragraphs[: i + 1], *paragraphs[i:]])) != -1
    if i > 1 and problem.operations[i - 2 : i - 1] != problem.operations[i - 1 : i]:
        swapped = [*paragraphs[: i - 1], paragraphs[i], paragraphs[i - 1], *paragraphs[i + 1 :]]
        assert first_wrong_step(problem, "\n\n".join(swapped)) == i - 1


ALPHABET = st.one_of(
    st.characters(),
    st.sampled_from(
        ["\n\n", "\\boxed{", "\\boxed{2}", "}", " = ", " + ", "7", "12", "Mia ", "figs", "finds ", "٣", "²"]
    ),
)


@settings(max_examples=300, deadline=None)
@given(seed=SEEDS, text=st.lists(ALPHABET, max_size=40).map("".join))
def test_any_text_is_judged_without_raising(seed, text):
    problem, sound = problem_and_sound(seed)
    for candidate in (text, sound[:30] + text, sound + text, text + sound):
        index = first_wrong_step(problem, candidate)
        assert -1 <= index < max(len(split_paragraphs(candidate)), 1)


@pytest.mark.parametrize("text", ["7" * 10_000, "0" * 100_000, "7 + " * 20_000, "\\boxed{" * 20_000, "\n\n" * 50_000])
def test_pathological_texts_are_judged_quickly(text):
    assert judged(text) == 0


@pytest.mark.parametrize(
    ("text", "index"),
    [
        (SOUND_TEXT, -1),
        ("", 0),
        ("no idea", 0),
        # other wording, merged and missing paragraphs that are still valid
        ("We begin with 7.\n\n5 + 7 = 12 now.\n\nThen 12 - 4 = 8.\n\n8 = 3 * 2 + 2.\n\n\\boxed{2}", -1),
        ("7 + 5 = 12\n\n12 - 4 = 8\n\n8 = 2 * 3 + 2 \\boxed{2}", -1),
        ("Mia has 7 figs. Mia finds 5: 7 + 5 = 12. Mia sells 4: 12 - 4 = 8.\n\n8 = 2 * 3 + 2, so \\boxed{2}", -1),
        # unsupported: nothing written leads there, though the numbers are right
        ("\\boxed{2}", 0),
        ("Mia has 7 figs.\n\nThat makes 8 figs.\n\nBoxes of 3: 8 = 2 * 3 + 2, so \\boxed{2}.", 1),
        ("Mia has 7 figs.\n\nBoxes of 3: 8 = 2 * 3 + 2, so \\boxed{2}.", 1),
        (SOUND_TEXT.replace("Boxes of 3: 8 = 2 * 3 + 2, so ", "Obviously "), 3),
        # contradictory or repeated ends
        (SOUND_TEXT.replace("{2}", "{1}"), 3),
        (SOUND_TEXT + " No, \\boxed{2}.", 3),
        (SOUND_TEXT + "\n\n\\boxed{1}", 4),
        (SOUND_TEXT + "\n\nMia has 7 figs.", 4),
        (SOUND_TEXT.replace("\\boxed{2}", "\\boxed 2"), 3),
        (SOUND_TEXT.replace("\\boxed{2}", "\\boxed{2"), 3),
        # stops short
        (SOUND_TEXT.rpartition("\n\n")[0], 2),
        (SOUND_TEXT.replace(", so \\boxed{2}", ""), 3),
        # words of the testbed that contradict the story
        (SOUND_TEXT.replace("Mia finds", "Tom finds"), 1),
        (SOUND_TEXT.replace("Mia finds", "Mia sells"), 1),
        (SOUND_TEXT.replace("Mia finds", "Mia buys"), -1),
        (SOUND_TEXT.replace("figs", "nuts"), 0),
        # right sum, wrong operation or wrong carried quantity
        (SOUND_TEXT.replace("7 + 5 = 12", "12 + 0 = 12"), 1),
        (SOUND_TEXT.replace("12 - 4 = 8", "4 + 4 = 8"), 2),
        (SOUND_TEXT.replace("12 - 4 = 8", "4 - 12 = 8"), 2),
        (SOUND_TEXT.replace("2 * 3 + 2", "1 * 3 + 5"), 3),
        (SOUND_TEXT.replace("2 * 3 + 2", "2 * 4 + 0"), 3),
        (SOUND_TEXT.replace("finds 5", "finds 6"), 1),
        (SOUND_TEXT.replace("7 + 5 = 12", "7 + 5 + 0 = 12"), 1),
        (SOUND_TEXT.replace("= 12.", "= 12.5."), 1),
    ],
)
def test_judgements_by_hand(text, index):
    assert judged(text) == index


def test_paragraphs_are_blocks_between_blank_lines():
    assert split_paragraphs("\n\n a\nb \n\n\n\nc\n\n \n\n") == ["a\nb", "c"]
