"""Step, mismatch and evaluation metrics on groups whose figures can be counted by hand or enumerated."""

import dataclasses
import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fapo.algorithm.metrics import (
    accuracy_by_prompt,
    evaluation_metrics,
    majority_correct,
    mismatch_metrics,
    pass_at_k,
    staleness_metrics,
    step_metrics,
    token_ages,
)
from megatron_fapo.data.records import Group, Prompt, Sample, SampleKey, Score, ScoredSample, Verdict

SOUND = Verdict(index=-1, critique="", server="", latency_s=0.1, attempts=1, completion_tokens=5)
FLAWED = dataclasses.replace(SOUND, index=2)
sound = Score(reward=1.0, correct=True, prediction="4", verdict=SOUND)
flawed = Score(reward=0.0, correct=True, prediction="4", verdict=FLAWED)
wrong = Score(reward=-1.0, correct=False, prediction="5")
overlong = Score(reward=-1.5, correct=False, prediction="5", overlong=-0.5)
genrm_down = Score(reward=None, correct=True, prediction="4", unscored_reason="genrm_deadline")
verifier_down = Score(reward=None, correct=None, prediction=None, unscored_reason="verifier_timeout")
unjudged = Score(reward=1.0, correct=True, prediction="4")
outcomes = st.sampled_from([sound, flawed, wrong, overlong, genrm_down, verifier_down, unjudged])


def group(*scores: Score, prompt_id: str = "toy/0", lengths: list[int] | None = None, cut_at: int = 100) -> Group:
    prompt = Prompt(prompt_id, "toy", (), "4", "2+2?")
    samples = []
    for i, (score, length) in enumerate(zip(scores, lengths or [10] * len(scores), strict=True)):
        reason = "length" if length >= cut_at else "stop"
        tokens, logprobs = (7,) * length, (-0.5,) * length
        sample = Sample(SampleKey(prompt_id, 0, i), prompt, tokens, logprobs, "text", reason, weight_version=1)
        samples.append(ScoredSample(sample, score))
    return Group(prompt, 0, tuple(samples))


def test_step_metrics_of_a_hand_counted_rollout():
    groups = [
        group(sound, flawed, wrong, genrm_down, lengths=[10, 20, 30, 40]),
        group(sound, sound, sound, sound, lengths=[1, 2, 3, 4]),
        group(overlong, wrong, verifier_down, flawed, lengths=[100, 50, 60, 70]),
        group(genrm_down, verifier_down, lengths=[5, 100]),
    ]
    # 12 checked: 5 sound, 2 flawed, 2 right without verdict, 3 wrong; 10 scored; 7 judged
    assert step_metrics(groups) == pytest.approx(
        {
            "score/samples": 14,
            "score/unscored": 4,
            "score/unscored_share": 4 / 14,
            "score/unscored/genrm_deadline": 2,
            "score/unscored/verifier_timeout": 2,
            "score/judged": 7,
            "score/accuracy": 9 / 12,
            "score/wrong_share": 3 / 12,
            "score/flawed_positive_ratio": 2 / 7,
            "score/flawed_share": 9 / 12 * 2 / 7,
            "score/sound_share": 9 / 12 * 5 / 7,
            "score/learning_progress": (9 / 12 * 5 / 7) / (3 / 12),
            "reward/mean": (5 - 2 - 1.5) / 10,
            "reward/std": statistics.pstdev([1.0] * 5 + [0.0] * 2 + [-1.0] * 2 + [-1.5]),
            "reward/overlong_mean": -0.05,
            "reward/overlong_share": 0.1,
            "response/tokens_mean": 495 / 14,
            "response/tokens_min": 1,
            "response/tokens_p95": 100,
            "response/tokens_max": 100,
            "response/truncated_share": 2 / 14,
            "group/count": 4,
            "group/no_signal_share": 2 / 4,
            "group/unscored_share": 1 / 4,
        }
    )


@settings(deadline=None)
@given(st.lists(st.lists(outcomes, max_size=5), max_size=5))
def test_values_are_finite_and_shares_add_up(scores):
    groups = [group(*s, prompt_id=str(i)) for i, s in enumerate(scores)]
    metrics = step_metrics(groups)
    assert all(math.isfinite(v) for v in (metrics | evaluation_metrics(groups)).values())
    assert all(0 <= v <= 1 for k, v in metrics.items() if k.endswith(("_share", "_ratio", "accuracy")))
    if "score/sound_share" in metrics:
        parts = [metrics[f"score/{name}_share"] for name in ("sound", "flawed", "wrong")]
        assert sum(parts) == pytest.approx(1)


def test_genrm_failures_lower_neither_accuracy_nor_the_flawed_positive_ratio():
    healthy = step_metrics([group(*[sound] * 4, *[flawed] * 4, *[wrong] * 8)])
    struggling = step_metrics([group(*[sound] * 2, *[flawed] * 2, *[genrm_down] * 4, *[wrong] * 8)])
    for name in ("accuracy", "flawed_positive_ratio", "sound_share", "flawed_share", "wrong_share"):
        assert struggling[f"score/{name}"] == healthy[f"score/{name}"]


def test_absent_where_there_is_nothing_to_average():
    assert step_metrics([]) == {"score/samples": 0, "score/unscored": 0, "score/judged": 0}
    baseline = step_metrics([group(unjudged, wrong)])  # rule only: nobody can say what is flawed
    assert baseline["score/accuracy"] == 0.5
    missing = ("flawed_positive_ratio", "flawed_share", "sound_share", "learning_progress")
    assert not {f"score/{name}" for name in missing} & baseline.keys()
    hopeless = step_metrics([group(wrong, wrong)])
    assert (hopeless["score/sound_share"], hopeless["score/learning_progress"]) == (0.0, 0.0)


def test_learning_progress_without_a_wrong_sample_assumes_one():
    assert step_metrics([group(sound, sound, sound, flawed)])["score/learning_progress"] == 3.0
    assert step_metrics([group(sound, sound, flawed, wrong)])["score/learning_progress"] == pytest.approx(2.0)


@pytest.mark.parametrize(("n", "p95"), [(1, 1), (19, 19), (20, 19), (21, 20), (100, 95)])
def test_p95_is_the_nearest_rank(n, p95):
    metrics = step_metrics([group(*[wrong] * n, lengths=list(range(n, 0, -1)))])
    assert metrics["response/tokens_p95"] == p95


@settings(deadline=None)
@given(st.integers(1, 7), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n, data):
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    hits = [any(i < right for i in subset) for subset in itertools.combinations(range(n), k)]
    assert pass_at_k(n, right, k) == pytest.approx(statistics.fmean(hits))


def test_pass_at_k_is_the_published_estimator():
    """Chen et al. 2021: 1 - prod over i in n-c+1..n of (1 - k/i), and 1 when fewer than k samples are wrong."""
    for n, right, k in itertools.product(range(1, 9), range(9), range(1, 9)):
        if right <= n and k <= n:
            some_wrong_subset = n - right >= k
            product = math.prod(1 - k / i for i in range(n - right + 1, n + 1)) if some_wrong_subset else 0.0
            assert pass_at_k(n, right, k) == pytest.approx(1 - product)


@pytest.mark.parametrize(("n", "right", "k"), [(4, 1, 5), (4, 5, 2), (4, 1, 0)])
def test_pass_at_k_refuses_what_is_undefined(n, right, k):
    with pytest.raises(ValueError, match="undefined"):
        pass_at_k(n, right, k)


def test_majority_votes():
    other = dataclasses.replace(wrong, prediction="6")
    silent = dataclasses.replace(wrong, prediction=None)
    assert majority_correct(group(sound, sound, wrong)) == 1.0
    assert majority_correct(group(sound, wrong, wrong)) == 0.0
    assert majority_correct(group(sound, wrong, other)) == pytest.approx(1 / 3)  # a three-way tie
    assert majority_correct(group(sound, silent, silent, verifier_down)) == 1.0
    assert majority_correct(group(silent, verifier_down)) == 0.0


def test_predictions_that_are_written_differently_are_one_vote_when_the_key_says_so():
    halves = [dataclasses.replace(sound, prediction=p) for p in ("0.5", " 0.50")]
    sixes = [dataclasses.replace(wrong, prediction=p) for p in ("6", "6")]
    mixed = group(*halves, *sixes)
    assert majority_correct(mixed) == 0.0
    assert majority_correct(mixed, lambda text: str(float(text))) == 0.5  # a tie: right ones are merged no more eagerly
    metrics = evaluation_metrics([mixed], lambda text: str(float(text)))
    assert metrics["maj@4"] == 0.5


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_maj_at_k_against_counting(answers):
    """k votes, most frequent answer wins; the expectation over a fair draw among tied ones."""
    scores = [dataclasses.replace(sound if a == 0 else wrong, prediction=str(a)) for a in answers]
    most = max(answers.count(a) for a in answers)
    winners = {a for a in answers if answers.count(a) == most}
    assert majority_correct(group(*scores)) == pytest.approx((0 in winners) / len(winners))


def test_evaluation_metrics_of_a_hand_counted_set():
    groups = [
        group(sound, sound, wrong, wrong, prompt_id="a"),
        group(flawed, flawed, flawed, wrong, prompt_id="b"),
        group(wrong, wrong, verifier_down, verifier_down, prompt_id="c"),
        group(verifier_down, verifier_down, verifier_down, verifier_down, prompt_id="d"),
    ]
    metrics = evaluation_metrics(groups)
    assert accuracy_by_prompt(groups) == {"a": 0.5, "b": 0.75, "c": 0.0}
    expected = {
        "avg@4": 1.25 / 3,
        "avg@4_stderr": statistics.stdev([0.5, 0.75, 0.0]) / math.sqrt(3),
        "maj@4": (0.5 + 1 + 0) / 3,
        "pass@2": (1 - 1 / 6 + 1 + 0) / 3,
        "pass@4": 1.0,  # prompt c has only two checked samples
        "score/flawed_positive_ratio": 3 / 5,
        # residuals flawed - ratio x judged of the prompts with a judged sample: 0 - 0.6 x 2 and 3 - 0.6 x 3
        "score/flawed_positive_ratio_stderr": math.sqrt(2 / 1 * (1.2**2 + 1.2**2)) / 5,
        "response/tokens_mean": 10,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert evaluation_metrics([]) == {"score/samples": 0, "score/unscored": 0, "score/judged": 0}
    assert evaluation_metrics([group(sound)]).items() >= {"avg@1": 1.0, "maj@1": 1.0, "pass@1": 1.0}.items()


def test_mismatch_metrics_against_the_formulas():
    torch.manual_seed(0)
    behaviour = -torch.rand(3, 8, dtype=torch.float64)
    old = behaviour + 0.1 * torch.randn(3, 8, dtype=torch.float64)
    mask = torch.rand(3, 8) < 0.6
    pairs = [(old[i].item(), behaviour[i].item()) for i in map(tuple, mask.nonzero().tolist())]
    old[~mask], behaviour[~mask] = math.nan, -math.inf
    gaps = [o - b for o, b in pairs]
    old_probs, behaviour_probs = [math.exp(o) for o, _ in pairs], [math.exp(b) for _, b in pairs]
    assert mismatch_metrics(old, behaviour, mask) == pytest.approx(
        {
            "mismatch/abs_mean": statistics.fmean(map(abs, gaps)),
            "mismatch/abs_max": max(map(abs, gaps)),
            "mismatch/kl_k1": -statistics.fmean(gaps),
            "mismatch/kl_k3": statistics.fmean(math.exp(g) - 1 - g for g in gaps),
            "mismatch/token_mult_prob_error": statistics.fmean(math.exp(abs(g)) for g in gaps),
            "mismatch/prob_correlation": statistics.correlation(old_probs, behaviour_probs),
        }
    )


def test_mismatch_estimators_find_the_true_kl():
    """Tokens drawn from the engine's distribution: both estimators approach KL(behaviour || policy)."""
    torch.manual_seed(1)
    behaviour, policy = torch.randn(2, 12, dtype=torch.float64).mul(0.3).log_softmax(dim=-1)
    true_kl = (behaviour.exp() * (behaviour - policy)).sum().item()
    tokens = torch.multinomial(behaviour.exp(), 200_000, replacement=True)
    metrics = mismatch_metrics(policy[tokens], behaviour[tokens], torch.ones_like(tokens, dtype=torch.bool))
    assert metrics["mismatch/kl_k1"] == pytest.approx(true_kl, rel=0.05)
    assert metrics["mismatch/kl_k3"] == pytest.approx(true_kl, rel=0.05)


def test_the_age_of_tokens_by_hand():
    versions = [((0, 3),), ((0, 2), (3, 3)), ((0, 1), (1, 2), (2, 4))]
    ages = token_ages([2, 5, 3], versions, version=4)
    assert ages.tolist() == [1, 1, 2, 2, 2, 1, 1, 3, 2, 0]
    assert staleness_metrics(ages, versions) == pytest.approx(
        {
            "staleness/mean": 1.5,
            "staleness/max": 3,
            "staleness/share_0": 0.1,
            "staleness/share_1": 0.4,
            "staleness/share_2": 0.4,
            "staleness/share_3": 0.1,
            "staleness/crossed_share": 2 / 3,
        }
    )
    # A sample that ended as the new weights came has none of their tokens, and an empty one has none at all.
    assert token_ages([2, 0], [((0, 1), (2, 2)), ((0, 1),)], version=2).tolist() == [1, 1]
    assert staleness_metrics(token_ages([], [], 1), []) == {}


def test_mismatch_of_equal_and_of_no_tokens():
    logprobs = torch.tensor([-0.1, -2.0, -0.7])
    same = mismatch_metrics(logprobs, logprobs, torch.ones(3, dtype=torch.bool))
    assert same == pytest.approx(
        {
            "mismatch/abs_mean": 0,
            "mismatch/abs_max": 0,
            "mismatch/kl_k1": 0,
            "mismatch/kl_k3": 0,
            "mismatch/token_mult_prob_error": 1,
            "mismatch/prob_correlation": 1,
        }
    )
    assert mismatch_metrics(logprobs, logprobs, torch.zeros(3, dtype=torch.bool)) == {}
    greedy = torch.zeros(3)
    assert "mismatch/prob_correlation" not in mismatch_metrics(greedy, greedy, torch.ones(3, dtype=torch.bool))
