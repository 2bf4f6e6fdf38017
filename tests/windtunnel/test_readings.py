"""Counts against hand-worked samples, intervals against what they must cover, theory against advantages."""

from __future__ import annotations

import dataclasses
import json
import random
from statistics import fmean, stdev

import pytest

from megatron_fapo.algorithm.judgements import ratios
from megatron_fapo.data.demonstrations import Habits, habitual_solution
from megatron_fapo.data.oracle import first_wrong_step
from megatron_fapo.data.testbed import make_problem
from megatron_fapo.windtunnel.arms import ARMS, QUICK, choose
from megatron_fapo.windtunnel.readings import critic_terms, flips, judged, policy_terms
from megatron_fapo.windtunnel.report import write_report
from megatron_fapo.windtunnel.summary import read, student, summarise

BY_NAME = {arm.name: arm for arm in ARMS}


def samples(seed: int, habits: Habits, penalty: float, prompts: int = 12, n: int = 8) -> list[dict]:
    """Recorded samples of a policy with such habits, judged by the oracle and rewarded with `penalty`."""
    rng, found = random.Random(seed), []
    for index in range(prompts):
        problem = make_problem(seed, index)
        for k in range(n):
            text = habitual_solution(problem, rng, habits)
            correct = text.endswith(f"{{{problem.answer}}}.")
            wrong_step = first_wrong_step(problem, text)
            verdict = {"index": wrong_step} if correct else None
            reward = (1.0 - penalty * (wrong_step != -1)) if correct else -1.0
            found.append(
                {
                    "prompt_id": f"testbed/{index}", "epoch": 0, "sample_index": k, "question": problem.question,
                    "text": text, "correct": correct, "verdict": verdict, "reward": reward, "overlong": 0.0,
                    "response_tokens": len(text),
                }
            )  # fmt: skip
    return found


def values_of(terms, rows):
    return {name: value for name, (value, _) in ratios([[terms(row) for row in rows]]).items()}


def test_policy_counts_by_hand():
    problem = make_problem(0, 0)
    rows = judged(samples(0, Habits(), 1.0, prompts=1, n=3))
    base = rows[0] | {"verdict": None, "reward": 1.0, "correct": True, "oracle": -1, "response_tokens": 10}
    found = base | {"oracle": 2, "verdict": {"index": 2}}
    elsewhere = base | {"oracle": 2, "verdict": {"index": 1}}
    missed = base | {"oracle": 0, "verdict": {"index": -1}}
    invented = base | {"oracle": -1, "verdict": {"index": 0}}
    wrong = base | {"correct": False, "oracle": None}
    unscored = base | {"correct": None, "oracle": None, "reward": None}
    values = values_of(policy_terms, [base, found, elsewhere, missed, invented, wrong, unscored])
    assert values["accuracy"] == 5 / 6
    assert values["flawed_ratio"] == 3 / 5
    assert values["rho"] == 2.0
    assert (values["judge_missed"], values["judge_invented"], values["judge_located"]) == (1 / 3, 1.0, 1 / 2)
    assert values["missed_of_right"] == 1 / 4
    assert values["unscored_share"] == 1 / 7
    assert problem.question == base["question"]


def test_critic_counts_by_hand():
    def row(predicted, label, total=4):
        right = predicted is not None and (predicted == -1) == (label == -1)
        prediction = None if predicted is None else str(predicted)
        return {
            "prediction": prediction, "ground_truth": str(label), "extra": {"total_steps": total}, "correct": right,
            "response_tokens": 5,
        }  # fmt: skip

    rows = [row(1, 1), row(3, 1), row(-1, 2), row(None, 2), row(0, -1), row(-1, -1)]
    values = values_of(critic_terms, rows)
    assert values["precision"] == 2 / 3
    assert values["recall"] == 2 / 4
    assert values["f1"] == pytest.approx(2 / (3 / 2 + 4 / 2))
    assert (values["localisation_exact"], values["localisation_error"]) == (0.5, 0.25)
    assert (values["accuracy"], values["unparsable_share"]) == (3 / 6, 1 / 6)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 4 / 3, 2.0])
def test_flawed_advantages_flip_where_theory_says(penalty):
    rows = judged(samples(3, Habits(guess=0.2, slip=0.2), penalty, prompts=60))
    found = flips(rows)
    assert len(found) > 30
    arm = next(a for a in ARMS if a.flawed_penalty == penalty)
    theory = read(arm, 1, {1: rows})
    summary = summarise([theory])["arms"][arm.name]["theory"]
    assert summary["groups"] == len(found) == summary["groups_that_agree"]
    low, high = summary["largest_rho_with_positive_advantage"], summary["smallest_rho_with_negative_advantage"]
    assert low is None or low < 2 / penalty - 1
    assert high is None or high > 2 / penalty - 1


def test_a_penalty_that_was_not_applied_is_noticed():
    rows = samples(3, Habits(), 0.0, prompts=60)
    theory = summarise([read(BY_NAME["fapo_oracle"], 1, {1: rows})])
    assert (
        theory["arms"]["fapo_oracle"]["theory"]["groups_that_agree"] < theory["arms"]["fapo_oracle"]["theory"]["groups"]
    )
    assert [c["holds"] for c in theory["claims"]] == ["no"]


def test_groups_that_theory_does_not_speak_of_are_left_out():
    rows = judged(samples(5, Habits(), 1.0, prompts=30))
    whole = len(flips(rows))
    assert len(flips([r | {"overlong": -0.1} for r in rows])) == 0
    assert len(flips([r | {"reward": None} if r["sample_index"] == 0 else r for r in rows])) == 0
    assert 0 < whole < 30


def test_student_interval_of_three_values():
    low, high = student([1.0, 2.0, 4.0])
    half = 4.303 * stdev([1.0, 2.0, 4.0]) / 3**0.5
    assert (low, high) == pytest.approx((7 / 3 - half, 7 / 3 + half))


def test_the_interval_of_one_seed_is_over_prompts():
    """Prompts that are all right or all wrong carry one bit each, however many samples they have."""
    rows = samples(1, Habits(), 0.0, prompts=100)
    rows = [row | {"correct": int(row["prompt_id"][8:]) % 2 == 0} for row in rows]
    summary = summarise([read(BY_NAME["baseline"], 1, {1: rows})])["arms"]["baseline"]
    low, high = summary["accuracy_interval"]
    assert high - low == pytest.approx(2 * 1.96 * (0.25 / 99) ** 0.5)  # 800 single samples would give a third of it
    assert summary["unscored_share_interval"] is None, "all prompts agree: no spread to tell an error from"


def test_summary_pairs_arms_by_seed_and_states_the_claims(tmp_path):
    careless, careful = Habits(quotient=0.5), Habits(guess=0, jump=0, slip=0.02, quotient=0.02)
    readings = []
    for seed in (1, 2, 3):
        for name, habits, penalty in (("baseline", careless, 0.0), ("fapo_oracle", careful, 1.0)):
            steps = {step: samples(100 * seed + step, habits, penalty) for step in range(1, 9)}
            readings.append(read(BY_NAME[name], seed, steps))
    summary = summarise(readings)
    base, fapo = summary["arms"]["baseline"], summary["arms"]["fapo_oracle"]
    last = samples(107, careless, 0.0) + samples(108, careless, 0.0)
    right = [s for s in judged(last) if s["correct"]]
    assert base["per_seed"]["1"]["flawed_ratio"] == fmean(s["oracle"] != -1 for s in right)
    assert fapo["against"]["arm"] == "baseline"
    gaps = [fapo["per_seed"][k]["accuracy"] - base["per_seed"][k]["accuracy"] for k in "123"]
    assert fapo["against"]["accuracy"]["difference"] == pytest.approx(fmean(gaps))
    assert fapo["against"]["accuracy"]["interval"] == pytest.approx(student(gaps))
    assert [c["holds"] for c in summary["claims"]] == ["yes", "yes", "undecided"]
    json.dumps(summary, allow_nan=False)

    text = write_report(summary | {"seeds": [1, 2, 3]}, readings, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert f"{base['accuracy']:.3f}" in text
    assert f"{base['accuracy']:.3f}" in page
    assert page.count("<svg") >= 4

    plain = [r for r in readings if r.arm.name == "baseline"]
    same = [dataclasses.replace(r, arm=BY_NAME["fapo_oracle"]) for r in plain]
    worse = summarise(plain + same)
    assert [c["holds"] for c in worse["claims"]] == ["no", "yes", "undecided"]


def test_arms_by_name():
    assert [arm.name for arm in choose(None, quick=True)] == list(QUICK)
    assert [arm.name for arm in choose(["fapo_genrm", "baseline"], quick=False)] == ["baseline", "fapo_genrm"]
    with pytest.raises(ValueError, match="no arm fapo: the arms are baseline"):
        choose(["fapo"], quick=False)


def test_claims_are_undecided_where_runs_cannot_tell():
    one = [read(BY_NAME[name], 1, {1: samples(1, Habits(), 1.0)}) for name in ("baseline", "fapo_oracle")]
    summary = summarise(one)
    assert summary["claims"][0]["holds"] == "undecided", "one seed has no interval"
    mild = read(BY_NAME["lambda_0.5"], 1, {1: samples(2, Habits(guess=0.6), 0.5)})
    theory = summarise([mild])
    assert theory["arms"]["lambda_0.5"]["theory"]["smallest_rho_with_negative_advantage"] is None
    assert theory["claims"][0]["holds"] == "undecided", "agreement on one side of a flip shows no flip"


def test_an_arm_that_collapsed_is_shown_with_its_claims(tmp_path):
    readings = []
    for seed in (1, 2):
        readings.append(read(BY_NAME["baseline"], seed, {1: samples(seed, Habits(), 0.0)}))
        rows = samples(seed, Habits(), 1.0)
        if seed == 2:
            rows = [row | {"correct": False, "verdict": None, "reward": -1.0} for row in rows]
        readings.append(read(BY_NAME["fapo_oracle"], seed, {1: rows}))
    summary = summarise(readings)
    assert "flawed_ratio" not in summary["arms"]["fapo_oracle"]
    assert [claim["holds"] for claim in summary["claims"]][:2] == ["undecided", "undecided"]
    text = write_report(summary | {"seeds": [1, 2]}, readings, tmp_path / "report.html")
    assert "fapo_oracle" in text.split("Policies")[1]
