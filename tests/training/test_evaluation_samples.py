"""Each evaluation set has its own number of samples per prompt: avg@32 of one, avg@4 of another, in one run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_fapo.config.load import ConfigError, load_config
from megatron_fapo.data.records import Prompt, Sample, SampleKey, Score, ScoredSample
from megatron_fapo.training.evaluation import evaluate


class Engines:
    async def generate(self, prompts: Any, *_: Any, n: int, **__: Any) -> AsyncIterator[Sample]:
        for prompt in prompts:
            for index in range(n):
                yield Sample(SampleKey(prompt.prompt_id, 0, index), prompt, (1,), (0.0,), "1", "stop", 0)


class Scores:
    async def score_stream(self, samples: AsyncIterator[Sample], **_: Any) -> AsyncIterator[ScoredSample]:
        async for sample in samples:
            yield ScoredSample(sample, Score(1.0, True, "1"))


def test_each_set_has_its_own_k():
    overrides = ["data.eval={a: a, b: b}", "training.evaluation={samples_per_prompt: 2, samples: {a: 4}}"]
    config = load_config([], [*overrides, "genrm.judge_eval=false"], "evaluate").config
    sets = {name: tuple(Prompt(f"{name}/{i}", name, (), "1", "q", (1,)) for i in range(3)) for name in ("a", "b")}
    cluster: Any = SimpleNamespace(rollout=Engines(), reward=SimpleNamespace(begin_step=Scores))
    metrics = asyncio.run(evaluate(config, cluster, sets))
    assert (metrics["eval/a/score/samples"], metrics["eval/b/score/samples"]) == (12, 6)
    assert metrics["eval/a/avg@4"] == metrics["eval/b/avg@2"] == 1.0


def test_only_sets_that_are_evaluated_are_named():
    overrides = ["data.eval.a=a", "training.evaluation.samples.aime=32", "genrm.judge_eval=false"]
    with pytest.raises(ConfigError, match=r"samples names sets of data\.eval only"):
        load_config([], overrides, "evaluate")
    with pytest.raises(ConfigError, match=r"training\.evaluation\.samples\.a = 0"):
        load_config([], ["data.eval.a=a", "training.evaluation.samples.a=0", "genrm.judge_eval=false"], "evaluate")
