"""Critic metrics on judgements counted by hand, against brute force, and their errors against resampling."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fapo.algorithm.judgements import (
    Judgement,
    judgement_metrics,
    judgement_stderrs,
    majority_judgement,
    ratio_stderr,
)
from megatron_fapo.algorithm.metrics import critic_evaluation_metrics, step_metrics
from megatron_fapo.data.records import Group, Prompt, Sample, SampleKey, Score, ScoredSample

STEPS = 5


def judgement(predicted: int | None, label: int, subset: str = "math", tokens: int = 10) -> Judgement:
    return Judgement(predicted, label, STEPS, subset, tokens)


anything = st.builds(
    judgement,
    st.sampled_from([None, -1, 0, 1, 2, 3, 4]),
    st.sampled_from([-1, 0, 1, 2, 3, 4]),
    st.sampled_from(["gsm8k", "math"]),
    st.integers(1, 50),
)


def test_metrics_of_a_hand_counted_set():
    judged = [
        judgement(2, 2, "gsm8k", 30),  # found and placed
        judgement(4, 2, "gsm8k"),  # found, 2 of 5 paragraphs off
        judgement(-1, 1, "gsm8k"),  # missed
        judgement(None, 0, "gsm8k"),  # missed: an answer nobody can read calls nothing flawed
        judgement(-1, -1, "gsm8k"),
        judgement(3, -1, "gsm8k"),  # a false alarm
        judgement(None, -1, "gsm8k"),  # wrong, and no false alarm
        judgement(0, 0, "math"),
        judgement(-1, -1, "math", 70),
        judgement(-1, -1, "math"),
    ]
    gsm8k = 2 * 1 / 4 * 1 / 3 / (1 / 4 + 1 / 3)
    assert judgement_metrics(judged) == pytest.approx(
        {
            "confusion/flawed_as_flawed": 3,
            "confusion/flawed_as_sound": 1,
            "confusion/flawed_as_unparsable": 1,
            "confusion/sound_as_flawed": 1,
            "confusion/sound_as_sound": 3,
            "confusion/sound_as_unparsable": 1,
            "precision": 3 / 4,
            "recall": 3 / 5,
            "f1": 2 / (4 / 3 + 5 / 3),
            "accuracy": 6 / 10,
            "exact_accuracy": 5 / 10,
            "localisation_error": (0 + 2 / 5 + 0) / 3,
            "localisation_exact": 2 / 3,
            "err_loc_acc": 2 / 5,
            "corr_acc": 3 / 5,
            "unparsable_share": 2 / 10,
            "response/tokens_mean": 18,
            "gsm8k/err_loc_acc": 1 / 4,
            "gsm8k/corr_acc": 1 / 3,
            "gsm8k/processbench_f1": gsm8k,
            "math/err_loc_acc": 1,
            "math/corr_acc": 1,
            "math/processbench_f1": 1,
            "processbench_f1": (gsm8k + 1) / 2,
            "processbench_f1_pooled": 2 * 2 / 5 * 3 / 5 / (2 / 5 + 3 / 5),
        }
    )


@settings(deadline=None)
@given(st.lists(anything, max_size=12))
def test_against_the_definitions_by_brute_force(judged):
    """Equation 6 and ProcessBench's formulas written out on sets, with unparsable answers as the docstring says."""
    metrics = judgement_metrics(judged)
    called = {i for i, j in enumerate(judged) if j.predicted is not None and j.predicted != -1}
    flawed = {i for i, j in enumerate(judged) if j.label != -1}
    both = called & flawed

    def check(name, hits, among):
        assert (name in metrics) == bool(among)
        if among:
            assert metrics[name] == pytest.approx(len(hits) / len(among))

    check("precision", both, called)
    check("recall", both, flawed)
    check("localisation_exact", {i for i in both if judged[i].predicted == judged[i].label}, both)
    if both:
        assert metrics["f1"] == pytest.approx(2 / (1 / metrics["precision"] + 1 / metrics["recall"]))
    else:
        assert metrics.get("f1", 0.0) == 0.0
    assert ("f1" in metrics) == bool(flawed)
    scores = []
    for subset in ("gsm8k", "math"):
        error = [j.predicted == j.label for j in judged if j.subset == subset and j.label != -1]
        correct = [j.predicted == j.label for j in judged if j.subset == subset and j.label == -1]
        if error and correct:
            a, b = statistics.fmean(error), statistics.fmean(correct)
            scores.append(2 * a * b / (a + b) if a + b else 0.0)
    assert ("processbench_f1" in metrics) == bool(scores)
    if scores:
        assert metrics["processbench_f1"] == pytest.approx(statistics.fmean(scores))
    assert sum(value for name, value in metrics.items() if name.startswith("confusion/")) == len(judged)
    assert all(math.isfinite(value) for value in metrics.values())


@settings(deadline=None)
@given(st.lists(anything, min_size=1, max_size=12), st.data())
def test_an_unparsable_answer_never_pays(judged, data):
    """Silence in place of a wrong answer gains nothing but the precision and placing of what is left."""
    index = data.draw(st.integers(0, len(judged) - 1))
    silent = list(judged)
    silent[index] = judgement(None, judged[index].label, judged[index].subset, judged[index].tokens)
    before, after = judgement_metrics(judged), judgement_metrics(silent)
    for name in ("recall", "exact_accuracy", "accuracy", "err_loc_acc", "corr_acc", "processbench_f1"):
        assert after.get(name, 0) <= before.get(name, 0) + 1e-12
    if judged[index].label != -1:
        assert after["f1"] <= before["f1"] + 1e-12


def test_what_a_critic_that_only_says_one_thing_gets():
    truth = [-1] * 7 + [0, 1, 2]
    always = judgement_metrics([judgement(0, label) for label in truth])
    assert (always["precision"], always["recall"]) == pytest.approx((0.3, 1.0))
    assert always["f1"] == pytest.approx(2 * 0.3 / 1.3)
    never = judgement_metrics([judgement(-1, label) for label in truth])
    assert never["f1"] == 0.0
    assert not {"precision", "localisation_error", "localisation_exact"} & never.keys()
    babble = judgement_metrics([judgement(None, label) for label in truth])
    assert (babble["f1"], babble["corr_acc"], babble["err_loc_acc"], babble["processbench_f1"]) == (0, 0, 0, 0)
    sound_only = judgement_metrics([judgement(3, -1)])
    assert sound_only["precision"] == 0.0
    assert not {"recall", "f1", "err_loc_acc", "processbench_f1"} & sound_only.keys()
    assert judgement_metrics([]) == {name: 0 for name in never if name.startswith("confusion/")}


def test_votes():
    def vote(*predictions):
        return majority_judgement([judgement(p, 2) for p in predictions]).predicted

    assert vote(-1, 2, 2) == 2
    assert vote(None, None, None, 3) == 3  # the unreadable do not vote
    assert vote(None, None) is None
    assert vote(-1, 2, 2, -1) == -1  # tied: sampled first
    assert vote(2, -1, -1, 2) == 2
    assert vote(None, 4, 1) == 4
    assert majority_judgement([judgement(1, 2), judgement(1, 2)]).tokens == 20
    with pytest.raises(ValueError, match="at least one"):
        majority_judgement([])


def test_ratio_errors_are_those_of_resampling_prompts():
    """The bootstrap over prompts, 400 times, against the closed form."""
    rng = random.Random(0)
    prompts = []
    for _ in range(60):
        label, skill = rng.choice([-1, -1, 1, 3]), rng.choice([0.1, 0.9])
        answers = [label if rng.random() < skill else rng.choice([None, -1, 0, 2]) for _ in range(4)]
        prompts.append([judgement(a, label, "math", rng.randint(5, 50)) for a in answers])
    closed = judgement_stderrs(prompts)
    draws: dict[str, list[float]] = {}
    for _ in range(400):
        resampled = [j for prompt in rng.choices(prompts, k=len(prompts)) for j in prompt]
        for name, value in judgement_metrics(resampled).items():
            draws.setdefault(name, []).append(value)
    for name in (
        "precision",
        "recall",
        "f1",
        "exact_accuracy",
        "localisation_error",
        "processbench_f1",
        "response/tokens_mean",
    ):
        assert closed[f"{name}_stderr"] == pytest.approx(statistics.stdev(draws[name]), rel=0.15), name
    independent = judgement_stderrs([[j] for prompt in prompts for j in prompt])
    assert closed["recall_stderr"] > 1.2 * independent["recall_stderr"]  # answers to one prompt are alike


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_the_error_of_a_mean_is_the_textbook_one(values):
    expected = statistics.stdev(values) / math.sqrt(len(values))
    found = ratio_stderr([(value, 1.0) for value in values])
    assert (found or 0.0) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("units", [[], [(1, 2)], [(1, 2), (0, 0)], [(1, 1), (2, 2)], [(0, 3), (0, 1)]])
def test_no_spread_is_no_error_and_not_certainty(units):
    assert ratio_stderr(units) is None


def group(label: int, predictions: list[int | None], source: str = "ProcessBench/math") -> Group:
    prompt = Prompt(f"{source}/{label}", source, (), str(label), "", (), {"total_steps": STEPS})
    samples = []
    for i, predicted in enumerate(predictions):
        sample = Sample(SampleKey(prompt.prompt_id, 0, i), prompt, (7,) * (i + 1), (-0.5,) * (i + 1), "t", "stop", 0)
        right = predicted is not None and (predicted == -1) == (label == -1)
        text = None if predicted is None else str(predicted)
        samples.append(ScoredSample(sample, Score(1.0 if right else -1.0, right, text)))
    return Group(prompt, 0, tuple(samples))


def test_a_critics_step_says_how_it_judged_and_nothing_of_a_policy():
    metrics = step_metrics([group(2, [2, 3, None]), group(-1, [-1, 0, -1])], "critic")
    expected = {
        "score/accuracy": 4 / 6,
        "critic/precision": 2 / 3,
        "critic/recall": 2 / 3,
        "critic/localisation_error": 0.1,
        "critic/unparsable_share": 1 / 6,
        "critic/processbench_f1": 2 * (1 / 3) * (2 / 3),
        "response/tokens_mean": 2,
        "group/count": 2,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert not {"score/judged", "score/wrong_share", "score/flawed_share", "score/learning_progress"} & metrics.keys()


def test_an_evaluation_has_single_answers_their_vote_and_errors():
    groups = [group(2, [2, -1, 2]), group(1, [-1, None, None], "ProcessBench/gsm8k"), group(-1, [0, -1, -1])]
    metrics = critic_evaluation_metrics(groups)
    expected = {
        "recall": 2 / 6,
        "precision": 2 / 3,
        "math/err_loc_acc": 2 / 3,
        "gsm8k/err_loc_acc": 0.0,
        "recall_stderr": math.sqrt(2 * 2 * 1**2) / 6,
        "maj@3/recall": 1 / 2,
        "maj@3/precision": 1.0,
        "maj@3/corr_acc": 1.0,
        "maj@3/response/tokens_mean": 6,
        "response/tokens_mean": 2,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert not any("@" in name for name in critic_evaluation_metrics([group(2, [2])]))
    for permuted in itertools.permutations(groups):
        assert critic_evaluation_metrics(permuted) == pytest.approx(metrics)
