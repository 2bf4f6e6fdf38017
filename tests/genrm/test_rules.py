"""The two rules on their own, in this process."""

from __future__ import annotations

import pytest

from megatron_fapo.genrm.rules import (
    RuleResult,
    last_boxed,
    math_verify_rule,
    normalize_final_answer,
    recipe_string_rule,
)


def test_the_last_box_with_its_braces() -> None:
    assert last_boxed("\\boxed{1} then \\boxed{\\frac{1}{2}}.") == "\\frac{1}{2}"
    assert last_boxed("\\boxed{1} then \\boxed{2") is None
    assert last_boxed("\\fbox{1} \\boxed 2") is None


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("x = 5", "5"),
        ("1,234", "1234"),
        ("(1,2)", "(1,2)"),
        ("\\$12.50", "12.50"),
        ("12 \\text{ meters}", "12"),
        ("\\frac12", "\\frac{1}{2}"),
        ("\\sqrt3", "\\sqrt{3}"),
        ("so $7$ it is", "7"),
        ("90^\\circ", "90"),
        ("\\textbf{B}", "B"),
        ("a 3", "3"),
        ("\\text{m}5", "5"),
        ("3\\text{\n}", "3"),
    ],
)
def test_normalisation(answer: str, normal: str) -> None:
    assert normalize_final_answer(answer) == normal


def test_the_recipe_rule_reads_the_last_300_characters() -> None:
    assert recipe_string_rule("so \\boxed{1,234}" + "." * 200, "1234") == RuleResult(True, "1234")
    assert recipe_string_rule("so \\boxed{1234}" + "." * 300, "1234") == RuleResult(False, "[INVALID]")
    assert recipe_string_rule("so \\boxed{0.5}", "\\frac{1}{2}") == RuleResult(False, "0.5")
    assert recipe_string_rule("so \\boxed{12", "12") == RuleResult(False, "[INVALID]")


@pytest.mark.parametrize(
    ("box", "truth", "right"),
    [
        ("18", "18", True),
        ("18.0", "18", True),
        ("18.", "18", True),
        ("\\$1,000", "1000", True),
        ("18\\text{ dollars}", "18", True),
        ("0.5", "\\frac{1}{2}", True),
        ("x=5", "5", True),
        ("\\sqrt{18}", "3\\sqrt{2}", True),
        ("\\text{A}", "A", True),
        ("(1,2)", "(1,2)", True),
        ("(1,2)", "[1,2]", False),
        ("17", "18", False),
        ("", "18", False),
        ("", "", False),
        ("\\frac{", "18", False),
        ("18 or 19", "18", False),
    ],
)
def test_math_verify_compares_the_box_as_mathematics(box: str, truth: str, right: bool) -> None:
    assert math_verify_rule(f"We get \\boxed{{{box}}}.", truth).correct is right


def test_math_verify_reads_nothing_but_the_last_box() -> None:
    assert math_verify_rule("The answer is $18$.", "18") == RuleResult(False, None)
    assert math_verify_rule("\\boxed{18}, no, \\boxed{19}", "18") == RuleResult(False, "19")
    assert math_verify_rule("\\boxed{19}, and the answer is $18$", "18") == RuleResult(False, "19")
