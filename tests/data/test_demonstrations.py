from __future__ import annotations

import random
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fapo.data.demonstrations import (
    Habits,
    critic_rows,
    genrm_sft_examples,
    habitual_solution,
    policy_sft_examples,
    write_critique,
)
from megatron_fapo.data.oracle import first_wrong_step
from megatron_fapo.data.paragraphs import split_paragraphs
from megatron_fapo.data.solutions import FLAWED_POSITIVE, SOUND, WRONG, write_solution
from megatron_fapo.data.testbed import make_problem, parse_question


def ask(question: str, ground_truth: str, solution: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{question}\n@@{ground_truth}\n@@{solution}"}]


def boxed(text: str) -> str:
    return text.rpartition("\\boxed{")[2].partition("}")[0]


def test_policy_demonstrations_leave_room_for_reinforcement_learning():
    examples = policy_sft_examples(2000, seed=1)
    right = flawed = 0
    for messages, solution in examples:
        problem = parse_question(messages[0]["content"].partition("\n\n")[0])
        if boxed(solution) == problem.answer:
            right += 1
            flawed += first_wrong_step(problem, solution) != -1
    assert 0.45 < right / len(examples) < 0.7
    assert 0.45 < flawed / right < 0.7


def test_without_bad_habits_demonstrations_are_sound():
    for index in range(200):
        problem = make_problem(3, index)
        text = habitual_solution(problem, random.Random(index), Habits(0, 0, 0, 0, 0))
        assert text == write_solution(problem, SOUND, random.Random(0)).text


def test_a_wrong_quotient_costs_no_answer():
    careless = Habits(guess=0, jump=0, slip=0, jump_slip=0, quotient=1.0)
    for index in range(100):
        problem = make_problem(4, index)
        text = habitual_solution(problem, random.Random(index), careless)
        assert boxed(text) == problem.answer
        # A quotient of 0 stays 0 when it would fall below.
        assert first_wrong_step(problem, text) in {len(problem.operations) + 1, -1}


def test_critic_rows_are_right_answers_half_of_them_flawed_with_the_oracles_label():
    rows = list(critic_rows(400, 7, ask))
    labels = [row["reward_model"]["ground_truth"] for row in rows]
    assert 0.48 < sum(label == -1 for label in labels) / len(labels) < 0.52
    places = set()
    for row, label in zip(rows, labels, strict=True):
        question, ground_truth, solution = row["prompt"][0]["content"].split("\n@@")
        assert boxed(solution) == ground_truth == parse_question(question).answer
        assert label == first_wrong_step(parse_question(question), solution)
        assert row["extra_info"]["total_steps"] == len(split_paragraphs(solution))
        places.add(label)
    assert places >= {-1, 1, 2, 3}
    assert rows[:50] == list(critic_rows(50, 7, ask))


def test_critic_rows_never_repeat_a_prompt():
    prompts = [row["prompt"][0]["content"] for row in critic_rows(3000, 12, ask)]
    assert len({*prompts}) == len(prompts) == 3000


def test_examples_depend_on_their_arguments_only():
    assert policy_sft_examples(50, seed=1) == policy_sft_examples(60, seed=1)[:50]
    assert policy_sft_examples(50, seed=1) != policy_sft_examples(50, seed=2)
    assert genrm_sft_examples(50, 1, ask) == genrm_sft_examples(60, 1, ask)[:50]


def test_critiques_teach_the_oracles_verdict_and_classes_are_balanced():
    examples = genrm_sft_examples(600, 5, ask)
    flawed = 0
    for messages, critique in examples:
        question, ground_truth, solution = messages[0]["content"].split("\n@@")
        problem = parse_question(question)
        assert ground_truth == problem.answer
        verdict = first_wrong_step(problem, solution)
        flawed += verdict != -1
        assert boxed(critique) == str(verdict)
        assert critique.count("\\boxed{") == 1
    assert 0.4 < flawed / len(examples) < 0.7


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**9), kind=st.sampled_from([SOUND, FLAWED_POSITIVE, WRONG]))
def test_a_critique_checks_each_paragraph_and_stops_at_the_first_wrong_one(seed, kind):
    problem = make_problem(seed, 0)
    solution = write_solution(problem, kind, random.Random(seed))
    *lines, verdict = write_critique(problem, solution.text).split("\n")
    assert verdict == f"\\boxed{{{solution.first_wrong}}}"
    judged = len(solution.paragraphs) if solution.first_wrong == -1 else solution.first_wrong + 1
    assert [line.partition(":")[0] for line in lines] == [str(i) for i in range(judged)]
    for index, line in enumerate(lines):
        # What the line says of equality is what it shows: the verdict can be learned from the line alone.
        differs = any(a != b for a, b in re.findall(r"(\d+)\|(\d+)", line)) or ", should be " in line
        assert differs == ("!" in line or ", should be " in line) == line.endswith("wrong.")
        assert differs == (index == solution.first_wrong)


def test_a_critique_in_words():
    problem = parse_question(
        "Mia has 7 figs. Mia finds 5. Mia packs the figs into boxes of 3. How many figs are left over?"
    )
    text = "Mia has 7 figs.\n\nMia finds 5: 7 + 5 = 12.\n\nBoxes of 3: 12 = 4 * 3 + 1, so \\boxed{0}."
    assert write_critique(problem, text) == (
        "0: 7|7, right.\n1: 7|7 + 5|5 = 12|12, right.\n2: 12|12 = 4|4 * 3|3 + 1|0!, box 0|0, wrong.\n\\boxed{2}"
    )
    jump = "Mia has 7 figs.\n\nThat makes 12 figs.\n\nBoxes of 3: 12 = 4 * 3 + 0, so \\boxed{0}."
    assert write_critique(problem, jump).splitlines()[1] == "1: 12, should be 7 + 5 = 12, wrong."


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**9), text=st.text(max_size=80))
def test_critiques_of_any_text_end_with_the_oracles_verdict(seed, text):
    problem = make_problem(seed, 0)
    for candidate in (text, text + "\n\n" + write_solution(problem, SOUND, random.Random(0)).text):
        critique = write_critique(problem, candidate)
        assert boxed(critique) == str(first_wrong_step(problem, candidate))
        assert critique.count("\n") <= max(len(split_paragraphs(candidate)), 1)
