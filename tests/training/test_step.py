"""From scored samples to mini-batches."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from megatron_fapo.config.algorithm import AlgorithmConfig
from megatron_fapo.config.root import Config
from megatron_fapo.data.records import Prompt, Sample, SampleKey, Score, ScoredSample
from megatron_fapo.training.step import make_groups, mini_batches, training_samples

REWARDS = {"a": [1.0, 0.0, -1.0], "b": [1.0, 1.0, 1.0], "c": [None, 1.0, -1.0]}


def _scored(prompt: Prompt, index: int, reward: float | None) -> ScoredSample:
    key = SampleKey(prompt.prompt_id, 0, index)
    sample = Sample(key, prompt, (7, index), (-0.5, -0.25), "text", "stop", 0)
    reason = "genrm_deadline" if reward is None else None
    return ScoredSample(sample, Score(reward, True, "1", unscored_reason=reason))


def _prompts() -> list[Prompt]:
    return [Prompt(name, "testbed", (), "1", "question", (1, 2)) for name in REWARDS]


def _arrivals() -> list[ScoredSample]:
    scored = [_scored(p, i, r) for p in _prompts() for i, r in enumerate(REWARDS[p.prompt_id])]
    random.Random(0).shuffle(scored)
    return scored


def test_groups_do_not_depend_on_what_finished_first() -> None:
    taken = [(p, 0) for p in _prompts()]
    groups = make_groups(taken, _arrivals())
    assert [g.prompt.prompt_id for g in groups] == ["a", "b", "c"]
    assert [[s.score.reward for s in g.samples] for g in groups] == [*REWARDS.values()]


def test_a_sample_counts_once() -> None:
    taken = [(p, 0) for p in _prompts()]
    arrivals = _arrivals()
    with pytest.raises(ValueError, match="came twice"):
        make_groups(taken, [*arrivals, arrivals[0]])
    stranger = replace(arrivals[0].sample, key=SampleKey("d", 0, 0))
    with pytest.raises(ValueError, match="was not asked for"):
        make_groups(taken, [ScoredSample(stranger, arrivals[0].score)])


def test_unscored_samples_are_not_trained_on() -> None:
    groups = make_groups([(p, 0) for p in _prompts()], _arrivals())
    a, b, c = training_samples(groups, Config())
    assert [s.advantage for s in a] == pytest.approx([1.0, 0.0, -1.0], abs=1e-5)
    assert [s.advantage for s in b] == [0.0, 0.0, 0.0]
    assert [s.response_ids.tolist() for s in c] == [[7, 1], [7, 2]]
    assert sum(s.advantage for s in c) == pytest.approx(0.0)


def test_uniform_groups_can_be_left_out() -> None:
    groups = make_groups([(p, 0) for p in _prompts()], _arrivals())
    config = Config(algorithm=AlgorithmConfig(drop_uniform_groups=True))
    assert [len(g) for g in training_samples(groups, config)] == [3, 0, 2]


def test_mini_batches_are_consecutive_groups_and_empty_ones_go() -> None:
    groups = training_samples(make_groups([(p, 0) for p in _prompts()], _arrivals()), Config())
    assert mini_batches(groups, 2) == [groups[0] + groups[1], groups[2]]
    assert mini_batches([[], [], groups[0]], 2) == [groups[0]]
