"""Answers that math-verify, sympy or the normaliser cannot finish: each costs one sample at most, none the run."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from megatron_fapo.config.genrm import GenRMConfig
from megatron_fapo.config.reward import RewardConfig
from megatron_fapo.data.records import Score
from megatron_fapo.genrm.reward_loop import RewardLoop
from megatron_fapo.genrm.rules import RuleResult, math_verify_rule
from megatron_fapo.genrm.verdict import Reason, Unscored
from megatron_fapo.genrm.verifier import Verifier
from tests.genrm.samples import make_sample

TRAPS = {
    "a factorial": "1000000000!",
    "a binomial": "\\binom{10^9}{500000000}",
    "nested fractions": "\\frac{1}{" * 3000 + "2" + "}" * 3000,
    "a million digits": "9" * 1_000_000,
}
TIMEOUT_S = 2.0


def outcomes(config: RewardConfig, *pairs: tuple[str, str]) -> tuple[list[RuleResult | Unscored], int]:
    """Of (solution, ground truth) pairs, then of two plain ones; and how many workers that cost.

    The event loop is a thread's, as in a Ray actor: there signal.alarm, which math-verify relies on, does not work.
    """

    async def main() -> tuple[list[RuleResult | Unscored], int]:
        verifier = Verifier(config)
        await verifier.start()
        try:
            answers = [*await asyncio.gather(*(verifier.verify(*pair) for pair in pairs))]
            for box in ("0.5", "3"):
                answers.append(await verifier.verify(f"\\boxed{{{box}}}", "1/2"))
            return answers, verifier.replaced
        finally:
            await verifier.close()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, main()).result(120)


def test_what_math_verify_cannot_finish_costs_one_sample_each() -> None:
    config = RewardConfig(verifier_processes=2, verifier_timeout_s=TIMEOUT_S)
    (*trapped, right, wrong), _ = outcomes(config, *((f"\\boxed{{{box}}}", "7") for box in TRAPS.values()))
    reasons = {each.reason for each in trapped if isinstance(each, Unscored)}
    assert reasons <= {Reason.VERIFIER_TIMEOUT, Reason.VERIFIER_CRASH}
    assert all(each.correct is False for each in trapped if isinstance(each, RuleResult))
    assert sum(isinstance(each, Unscored) for each in trapped) >= 3
    assert (right, wrong) == (RuleResult(True, "0.5", False), RuleResult(False, "3", False))


def test_beside_the_string_rule_they_cost_no_sample_at_all() -> None:
    config = RewardConfig(verifier="recipe_string", verifier_processes=1, verifier_timeout_s=TIMEOUT_S)
    pair = (f"\\boxed{{{TRAPS['a factorial']}}}", TRAPS["a factorial"])
    (trapped, right, wrong), replaced = outcomes(config, (pair[0], "7"))
    assert trapped == RuleResult(False, pair[1], None)
    assert replaced == 1
    assert (right, wrong) == (RuleResult(False, "0.5", True), RuleResult(False, "3", False))


def test_the_normaliser_on_a_megabyte() -> None:
    config = RewardConfig(
        verifier="recipe_string", compare_rules=False, verifier_processes=2, verifier_timeout_s=TIMEOUT_S
    )
    truths = ("\\text{" * 170_000, "x" * 1_000_000, "\\boxed{" * 170_000)
    (*trapped, right, wrong), _ = outcomes(config, *(("\\boxed{2}", truth) for truth in truths))
    assert all(isinstance(each, Unscored) or not each.correct for each in trapped)
    assert (right, wrong) == (RuleResult(False, "0.5"), RuleResult(False, "3"))


def test_the_rule_itself_off_the_main_thread() -> None:
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(math_verify_rule, "\\boxed{\\frac{1}{2}}", "0.5").result(60).correct


def test_where_the_rules_differ_is_counted_and_kept_with_the_sample() -> None:
    pairs = [("0.5", "1/2"), ("(A)", "A"), ("\\text{north}", "north"), ("3", "3"), ("4", "3")]

    async def main() -> tuple[list[Score], dict[str, float]]:
        reward = RewardConfig(verifier_processes=1)
        async with RewardLoop(reward, GenRMConfig(enabled=False), [], max_response_tokens=8192) as loop:
            samples = [make_sample(f"\\boxed{{{box}}}", truth) for box, truth in pairs]
            return [await loop.score(sample) for sample in samples], loop.metrics()

    scores, metrics = asyncio.run(main())
    assert [score.correct for score in scores] == [True, True, False, True, False], "math_verify decides"
    alone = [[key for key in score.extra if key.startswith("right_by_")] for score in scores]
    by_math, by_string = ["right_by_math_verify_alone"], ["right_by_recipe_string_alone"]
    assert alone == [by_math, by_math, by_string, [], []]
    assert metrics["scoring/rule_agreement"] == 2 / 5
    assert metrics["scoring/right_by_math_verify_alone"] == 2
    assert metrics["scoring/right_by_recipe_string_alone"] == 1
