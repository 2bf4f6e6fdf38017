"""Refits of a real engine while it generates: every token comes from the weights that its sample says."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_fapo.config.weight_sync import WeightSyncConfig
from megatron_fapo.data.records import Sample
from megatron_fapo.training.refit import Refits
from megatron_fapo.weight_sync.protocol import RefitError, StaleEngineError
from tests.rollout.conftest import Engine, make_prompts, run
from tests.rollout.test_refit import Rank, Ranks


class Refitter:
    """Puts one of the engine's two checkpoints into it, whatever it does meanwhile."""

    def __init__(self, engine: Engine, rank: Any) -> None:
        self.engine, self.rank = engine, rank
        self.refits = Refits(Ranks([rank]), engine.pool, WeightSyncConfig(in_flight=True, timeout_s=60))

    async def refit(self, which: int, version: int) -> None:
        await self.rank.hold.remote(self.engine.checkpoints[which], 0, 1)
        await self.refits.refit(version)


@pytest.fixture
def refitter(engine: Engine, local_ray: Any) -> Iterator[Refitter]:
    rank = local_ray.remote(Rank).options(num_cpus=0).remote()
    refitter = Refitter(engine, rank)
    run(refitter.refit(0, 0))
    yield refitter
    run(refitter.refit(0, 0))
    local_ray.kill(rank)


def difference(model: Any, sample: Sample, first: int, last: int) -> float:
    """Largest difference of log-probabilities of tokens first to last, the model having read all before."""
    tokens = torch.tensor([sample.prompt.token_ids + sample.token_ids])
    with torch.no_grad():
        logits = model(tokens).logits[0, len(sample.prompt.token_ids) - 1 : -1]
    logprobs = torch.log_softmax(logits, -1).gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
    return float((logprobs - torch.tensor(sample.logprobs))[first:last].abs().max())


def test_every_token_is_of_the_version_that_its_sample_says(engine: Engine, refitter: Refitter) -> None:
    """Also after a refit that failed under it; and of more samples than vLLM takes tokens of at a time."""
    from transformers import AutoModelForCausalLM

    async def main() -> list[Sample]:
        stream = engine.stream(make_prompts(14), n=10, max_tokens=160)
        samples = [await anext(stream)]
        await engine.handle.break_at.remote("refit_finish")
        with pytest.raises(RefitError, match="broke"):
            await refitter.refit(1, 7)
        with pytest.raises(StaleEngineError):
            await engine.pool.versions()
        await engine.handle.break_at.remote("")
        await refitter.refit(1, 7)
        await asyncio.sleep(0.3)
        await refitter.refit(0, 8)
        return samples + [sample async for sample in stream]

    samples = run(main())
    checkpoints = {0: engine.checkpoints[0], 7: engine.checkpoints[1], 8: engine.checkpoints[0]}
    models = {v: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for v, path in checkpoints.items()}
    assert len({sample.key for sample in samples}) == 140
    histories = {tuple(version for _, version in sample.later_versions) for sample in samples}
    assert {(), (7, 8)} <= histories <= {(), (7,), (7, 8)}
    apart = []
    for sample in samples:
        starts = [(0, sample.weight_version), *sample.later_versions]
        ends = [first for first, _ in sample.later_versions] + [len(sample.token_ids)]
        for (first, version), last in zip(starts, ends, strict=True):
            assert first < last, "a version of no token"
            assert difference(models[version], sample, first, last) < 5e-5
        if len(starts) == 3:  # of a single token they may agree by chance
            apart.append(difference(models[0], sample, starts[1][0], ends[1]))
    assert max(apart) > 1e-2, "the versions do not differ"


def test_samples_go_on_with_their_own_random_numbers(engine: Engine, refitter: Refitter) -> None:
    """A refit to equal weights changes no token."""

    async def main() -> list[Sample]:
        stream = engine.stream(make_prompts(12))
        samples = [await anext(stream)]
        await refitter.refit(0, 1)
        return samples + [sample async for sample in stream]

    samples = run(main())
    assert sum(bool(sample.later_versions) for sample in samples) > 24
    assert {s.key: s.token_ids for s in samples} == {s.key: s.token_ids for s in engine.first_run.values()}
