"""A verdict is an integer in the last box of a complete critique; nothing else is."""

from __future__ import annotations

import pytest

from megatron_fapo.genrm.verdict import Reason, parse_verdict


@pytest.mark.parametrize(
    ("critique", "index"),
    [
        ("\\boxed{-1}", -1),
        ("first \\boxed{1}, no: \\boxed{ 2 }.", 2),
        ("\\boxed{0}", 0),
        ("\\boxed{\\boxed{1}}", 1),
        ("The solution says \\boxed{7}. My index: $\\boxed{+1}$", 1),
        ("\\boxed {1}", 1),
        ("\\boxed{−1}", -1),
        ("\\boxed{paragraph_1}", 1),
    ],
)
def test_readable(critique: str, index: int) -> None:
    assert parse_verdict(critique, "stop", 3) == index


@pytest.mark.parametrize(
    "critique",
    [
        "",
        "-1",
        "\\boxed{}",
        "\\boxed{3}",
        "\\boxed{-2}",
        "\\boxed{1",
        "\\boxed{1} and then \\boxed{",
        "\\boxed{1.0}",
        "\\boxed{0-1}",
        "\\boxed{int('1')}",
        "\\boxed{__import__('os').getpid()}",
        "\\boxed{1_0}",
        "\\boxed{٢}",
        "\\boxed{" + "1" * 5000 + "}",
        "\\boxed{" * 50_000,
    ],
)
def test_unreadable(critique: str) -> None:
    assert parse_verdict(critique, "stop", 3) is Reason.GENRM_UNPARSABLE


def test_a_cut_critique_is_no_verdict_whatever_it_says() -> None:
    assert parse_verdict("\\boxed{-1}", "length", 3) is Reason.GENRM_TRUNCATED


@pytest.mark.parametrize("finish_reason", [None, "abort", "content_filter", "error", "tool_calls"])
def test_only_a_finished_critique_counts(finish_reason: str | None) -> None:
    assert parse_verdict("\\boxed{-1}", finish_reason, 3) is Reason.GENRM_UNPARSABLE


def test_the_raw_form_has_no_upper_bound() -> None:
    assert parse_verdict("\\boxed{17}", "stop", None) == 17
    assert parse_verdict("\\boxed{-17}", "stop", None) is Reason.GENRM_UNPARSABLE
