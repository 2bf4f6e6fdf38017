"""The rollout of one step: samples of all engines, scored on their way, become groups."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from megatron_fapo.config.root import Config
from megatron_fapo.data.records import Group, Sample, ScoredSample
from megatron_fapo.observe.progress import Progress
from megatron_fapo.training.ahead import Ahead
from megatron_fapo.training.cluster import Cluster
from megatron_fapo.training.step import Taken, make_groups


@dataclass(frozen=True)
class Rolled:
    """What the rollout of a step has come to."""

    groups: list[Group]
    cursor: dict[str, Any]
    """DataCursor.state_dict() after the prompts of the step."""
    scoring: dict[str, float]
    """Metrics `scoring/...` and `genrm/...`."""
    generated_at: float
    """When the last sample was generated, by time.monotonic."""


async def rollout(
    config: Config,
    cluster: Cluster,
    progress: Progress,
    ahead: Ahead[Rolled],
    step: int,
    taken: Taken,
    cursor: dict[str, Any],
) -> Rolled:
    """All samples of the step, each scored from the moment it is finished; by colocated judges, when all are."""
    assert cluster.rollout is not None
    assert cluster.reward is not None
    scoring = cluster.reward.begin_step(step)
    cfg, total = config.rollout, len(taken) * config.rollout.samples_per_prompt
    counts, generated_at = {"done": 0, "scored": 0, "unscored": 0, "tokens": 0}, time.monotonic()

    async def counted(samples: AsyncIterator[Sample]) -> AsyncIterator[Sample]:
        nonlocal generated_at
        async for sample in samples:
            counts["done"] += 1
            counts["tokens"] += len(sample.token_ids) if ahead.awaited == step else 0  # for their rate since then
            generated_at = time.monotonic()
            yield sample
        ahead.generated(step)

    stream = cluster.rollout.generate(
        [prompt for prompt, _ in taken],
        [epoch for _, epoch in taken],
        n=cfg.samples_per_prompt,
        sampling=cfg.sampling,
        max_tokens=cfg.max_response_tokens,
    )
    scored: list[ScoredSample] = []
    judged = scoring.score_stream(counted(stream), turn=cluster.judges_turn(), group_size=cfg.samples_per_prompt)
    async with contextlib.aclosing(judged) as results:
        async for each in results:
            scored.append(each)
            counts["scored" if each.score.unscored_reason is None else "unscored"] += 1
            if ahead.awaited == step:
                progress.samples(**counts, total=total)
    return Rolled(make_groups(taken, scored), cursor, scoring.metrics(), generated_at)
