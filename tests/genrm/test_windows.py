"""A solution in parts: each paragraph is judged once under its own index, and no missing part makes the whole sound."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fapo.config.genrm import GenRMConfig
from megatron_fapo.data.paragraphs import split_paragraphs
from megatron_fapo.data.records import Verdict
from megatron_fapo.genrm.client import GenRMClient
from megatron_fapo.genrm.prompts import judge_messages, windows_of
from megatron_fapo.genrm.verdict import Reason, Unscored, parse_verdict
from megatron_fapo.genrm.windows import Window, combine, plan_windows
from tests.faults.fake_server import Behaviour, FakeServer, completion

TAG = re.compile(r"<paragraph_(\d+)>\n(.*?)\n</paragraph_\1>", re.DOTALL)
PARAGRAPHS = st.lists(st.text("ab", max_size=9), min_size=1, max_size=40)
SOLUTION = "\n\n".join(f"Step {number}: we add {number} to the sum." for number in range(40))
CONTEXT = 700


@settings(deadline=None)
@given(PARAGRAPHS, st.integers(0, 60), st.integers(0, 4))
def test_a_plan_covers_every_paragraph_once_in_windows_that_fit_and_overlap(
    paragraphs: list[str], budget: int, overlap: int
) -> None:
    def size(start: int, stop: int) -> int:
        return sum(map(len, paragraphs[start:stop]))

    windows = plan_windows(paragraphs, budget, overlap)
    impossible = any(size(max(0, at - overlap), at + 1) > budget for at in range(len(paragraphs)))
    assert (windows is None) == impossible
    if windows is not None:
        judged = [at for window in windows for at in range(window.fresh, window.stop)]
        assert judged == list(range(len(paragraphs)))
        assert all(size(window.start, window.stop) <= budget for window in windows)
        assert all(window.start == max(0, window.fresh - overlap) < window.stop for window in windows)
        # None could have taken one more: there are no fewer windows than these.
        assert all(size(window.start, window.stop + 1) > budget for window in windows[:-1])


def test_a_very_long_solution_is_planned_in_no_time() -> None:
    windows = plan_windows(["x" * 10] * 200_000, 1000, 2)
    assert windows is not None
    assert len(windows) == 1 + -(-(200_000 - 100) // 98)


@settings(deadline=None, max_examples=30)
@given(st.integers(700, 4000), st.integers(0, 3))
def test_the_prompts_of_a_plan_show_the_solution_and_fit(budget: int, overlap: int) -> None:
    windows = windows_of("Which sum?", "780", SOLUTION, budget, overlap)
    if windows is None:  # not even one paragraph and its overlap
        assert budget < 1600
        return
    shown: dict[int, str] = {}
    for window in windows:
        (message,) = judge_messages("Which sum?", "780", SOLUTION, "tagged", window)
        assert len(message["content"]) <= budget
        tags = {int(index): text for index, text in TAG.findall(message["content"])}
        assert list(tags) == list(range(window.start, window.stop))
        shown |= tags
    assert list(shown.values()) == split_paragraphs(SOLUTION)


def test_what_fits_is_asked_as_ever() -> None:
    whole = judge_messages("q", "2", SOLUTION, "tagged")
    size = len(whole[0]["content"])
    assert windows_of("q", "2", SOLUTION, size, 2) == [Window(0, 0, 40)]
    assert judge_messages("q", "2", SOLUTION, "tagged", Window(0, 0, 40)) == whole
    several = windows_of("q", "2", SOLUTION, size - 1, 2)
    assert several is not None
    assert len(several) == 2


def test_a_part_says_what_is_left_out_and_what_is_repeated() -> None:
    def said(window: Window) -> str:
        content = judge_messages("q", "2", SOLUTION, "tagged", window)[0]["content"]
        assert content.endswith("in \\boxed{}.")
        return content.rpartition("</paragraph_")[2].partition("Your task")[0]

    middle, first, last = said(Window(10, 12, 20)), said(Window(0, 0, 12)), said(Window(38, 38, 40))
    assert "Paragraphs 0 to 9 are left out" in middle
    assert "Paragraphs 10 to 11 are repeated" in middle
    assert "from 12 on" in middle
    assert "Paragraphs 20 to 39 are left out" in middle
    assert ("repeated" in first, "0 to" in first, "Paragraphs 12 to 39 are left out" in first) == (False, False, True)
    assert ("repeated" in last, "Paragraphs 0 to 37 are left out" in last, "not finished" in last) == (
        False,
        True,
        False,
    )


def test_the_raw_form_has_no_parts() -> None:
    with pytest.raises(ValueError, match="no indices"):
        judge_messages("q", "2", SOLUTION, "raw", Window(0, 0, 3))


def test_a_question_that_leaves_no_room_cannot_be_windowed() -> None:
    assert windows_of("q" * 5000, "2", SOLUTION, 4000, 2) is None
    assert windows_of("q", "2", "x" * 5000, 4000, 2) is None


@pytest.mark.parametrize("index", [-2, 9, 10, 11, 20, 25])
def test_an_index_that_is_not_to_be_judged_is_no_verdict(index: int) -> None:
    assert parse_verdict(f"\\boxed{{{index}}}", "stop", Window(10, 12, 20)) is Reason.GENRM_UNPARSABLE


@pytest.mark.parametrize("index", [-1, 12, 19])
def test_a_verdict_of_a_part(index: int) -> None:
    assert parse_verdict(f"\\boxed{{{index}}}", "stop", Window(10, 12, 20)) == index


PARTS = [Window(0, 0, 3), Window(2, 3, 6), Window(5, 6, 9)]


@pytest.mark.parametrize(
    ("verdicts", "whole"),
    [
        ([-1, -1, -1], -1),
        ([-1, 4, 7], 4),
        ([1, None, None], 1),
        ([-1, 4, None], 4),
        ([-1, -1, None], None),
        ([None, -1, -1], None),
        ([None, 4, 7], None),
        ([-1, None, 7], None),
    ],
)
def test_the_earliest_error_decides_and_a_missing_part_is_never_sound(
    verdicts: list[int | None], whole: int | None
) -> None:
    assert combine(PARTS, verdicts) == whole


def test_what_cannot_be_combined_is_refused() -> None:
    for windows, verdicts in (([], []), (PARTS, [-1, -1]), (PARTS, [-1, 2, -1])):
        with pytest.raises(ValueError, match=r"no windows|shorter|no verdict of"):
            combine(windows, verdicts)


# Through the client, with a judge whose context holds a part at a time.


def judge_of_parts(unreadable: int | None) -> Behaviour:
    """Names the first paragraph with WRONG in it; says nothing of the kind where it is shown paragraph `unreadable`."""

    async def behave(_server: FakeServer, _request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        content = body["messages"][0]["content"]
        if len(content) / 3 + body.get("max_tokens", 1) > CONTEXT:
            error = {"error": {"message": f"This model's maximum context length is {CONTEXT} tokens", "code": 400}}
            return web.json_response(error, status=400)
        shown = {int(index): text for index, text in TAG.findall(content)}
        wrong = min((index for index, text in shown.items() if "WRONG" in text), default=-1)
        return completion("No idea." if unreadable in shown else f"\\boxed{{{wrong}}}")

    return behave


def judged(solution: str, unreadable: int | None = None, **changes: object) -> Verdict | Unscored:
    async def main() -> Verdict | Unscored:
        settings: dict[str, Any] = {"max_tokens": 200, "temperature": 0.0, "hedge_share": 0.0} | changes
        async with FakeServer(lambda _body, _number: judge_of_parts(unreadable), CONTEXT) as server:
            client = GenRMClient([server.url], GenRMConfig(**settings))
            await client.check()
            try:
                return await client.judge("Which sum?", "780", solution)
            finally:
                await client.close()

    return asyncio.run(main())


@pytest.mark.parametrize("wrong", [[], [0], [7], [20], [39], [39, 12, 20]])
def test_an_error_is_found_wherever_it_is_under_the_index_it_has_in_the_whole(wrong: list[int]) -> None:
    parts = split_paragraphs(SOLUTION)
    for index in wrong:
        parts[index] += " WRONG"
    outcome = judged("\n\n".join(parts))
    assert isinstance(outcome, Verdict)
    assert outcome.index == min(wrong, default=-1)
    assert len({each.window for each in outcome.history}) > 3


def test_a_part_without_a_verdict_leaves_the_whole_without_one_unless_an_earlier_error_decides() -> None:
    silent = judged(SOLUTION, unreadable=20)
    assert isinstance(silent, Unscored)
    assert silent.reason is Reason.GENRM_UNPARSABLE
    decided = judged(SOLUTION.replace("Step 2:", "Step 2: WRONG"), unreadable=20)
    assert isinstance(decided, Verdict)
    assert decided.index == 2


@pytest.mark.parametrize("changes", [{"long_solutions": "unscored"}, {"prompt_form": "raw"}])
def test_what_is_too_long_and_not_judged_in_parts_is_unscored(changes: dict[str, str]) -> None:
    outcome = judged(f"{SOLUTION}\n\n{SOLUTION}", **changes)
    assert isinstance(outcome, Unscored)
    assert outcome.reason is Reason.GENRM_CONTEXT
    assert ("raw form" in outcome.detail) == ("prompt_form" in changes)


def test_a_paragraph_that_fits_no_prompt_is_unscored() -> None:
    outcome = judged(SOLUTION + "\n\n" + "x" * 3 * CONTEXT)
    assert isinstance(outcome, Unscored)
    assert outcome.reason is Reason.GENRM_CONTEXT
