from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fapo.data.testbed import MAX_TOTAL, make_problem, parse_question


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**9), index=st.integers(0, 10**9), steps=st.integers(1, 6))
def test_the_question_alone_tells_the_problem(seed, index, steps):
    problem = make_problem(seed, index, steps, steps)
    assert parse_question(problem.question) == problem
    assert len(problem.operations) == steps
    assert all(0 <= total <= MAX_TOTAL for total in problem.totals)
    assert int(problem.answer) in range(problem.box_size)


def test_problems_depend_on_seed_and_index_only():
    texts = [make_problem(seed, index).question for seed in range(3) for index in range(100)]
    assert texts == [make_problem(seed, index).question for seed in range(3) for index in range(100)]
    assert len(set(texts)) == len(texts)
    # The very text, so that a change of the generator cannot pass unseen: it would change every dataset and seed.
    assert make_problem(0, 0).question == (
        "Eva has 3 stamps. Eva trades 3. Eva gets 2. Eva sells 2. Eva packs the stamps into boxes of 3. "
        "How many stamps are left over?"
    )


def test_answers_are_nearly_uniform_so_that_guessing_pays():
    problems = [make_problem(0, index) for index in range(2000)]
    for size in (3, 4):
        answers = [problem.answer for problem in problems if problem.box_size == size]
        shares = [answers.count(str(answer)) / len(answers) for answer in range(size)]
        assert all(0.5 / size < share < 1.6 / size for share in shares), shares


@pytest.mark.parametrize(
    "text",
    [
        "",
        "How many?",
        make_problem(0, 0).question + " Why?",
        make_problem(0, 0).question.replace("boxes of 3", "boxes of 0"),
        make_problem(0, 0).question.replace("Eva gets", "Tom gets"),
    ],
)
def test_other_questions_are_refused(text):
    with pytest.raises(ValueError, match="not a testbed question"):
        parse_question(text)


@pytest.mark.parametrize(("low", "high"), [(0, 2), (3, 2)])
def test_impossible_step_bounds_are_refused(low, high):
    with pytest.raises(ValueError, match="min_steps <= max_steps"):
        make_problem(0, 0, low, high)
