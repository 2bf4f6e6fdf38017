"""The updates of a step: log-probabilities where they are needed, then one optimizer update per mini-batch.

pi_old is the policy as it was when the step began. The first mini-batch is trained by those very weights, so that the
forward pass of its training gives their log-probabilities. Those of the others take a pass before the first update, or,
with `algorithm.old_logprobs: engine`, are the engine's while both agree.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from megatron_fapo.algorithm.metrics import mismatch_metrics, staleness_metrics, token_ages
from megatron_fapo.config.algorithm import AlgorithmConfig
from megatron_fapo.config.root import Config
from megatron_fapo.policy.batch import TrainSample, set_logprobs
from megatron_fapo.training.cluster import Cluster

if TYPE_CHECKING:
    from megatron_fapo.training.loop import Run

log = logging.getLogger(__name__)

GATED = "mismatch/token_mult_prob_error"
"""The metric that algorithm.mismatch_gate bounds."""


def engine_stands(cfg: AlgorithmConfig, newest: float | None) -> bool:
    """Whether the engine's log-probabilities may stand for the policy's.

    Args:
        newest: GATED of the newest step that measured it; None: no step has.
    """
    return cfg.old_logprobs == "engine" and newest is not None and newest <= cfg.mismatch_gate


async def update(
    config: Config, cluster: Cluster, run: Run, batches: Sequence[Sequence[TrainSample]], check: Callable[[], None]
) -> dict[str, float]:
    """One optimizer update per mini-batch; returns the means of their metrics, and how far engine and policy are apart.

    Args:
        check: raises if the run is to end; called at the last place before what may take many minutes.
    """
    assert cluster.policy is not None
    policy, cfg = cluster.policy, config.algorithm
    samples = [s for batch in batches for s in batch]
    first = samples[: len(batches[0])] if batches else []
    others = samples[len(first) :]
    stands, metrics = engine_stands(cfg, run.mismatch), {}
    if cfg.old_logprobs == "engine":
        metrics["mismatch/gated_samples"] = 0.0 if stands else float(len(others))
    with run.phase("logprobs"):
        if stands:
            others = set_logprobs(others, "old_logprobs", [s.behaviour_logprobs for s in others])
        elif others:
            if cfg.old_logprobs == "engine":
                found = "no step has measured it" if run.mismatch is None else f"it was {run.mismatch:.8g}"
                log.warning(
                    "step %d: %s is not known to be within algorithm.mismatch_gate=%g (%s): the policy's own "
                    "log-probabilities are worked out for %d samples",
                    *(run.state.step + 1, GATED, cfg.mismatch_gate, found, len(others)),
                )
            await cluster.enter("logprobs")
            others = set_logprobs(others, "old_logprobs", await policy.logprobs(others))
        samples = first + others
        if cfg.kl_coef > 0:
            if stands or not others:  # entered anew, the ledger would forget the peak of the pass before
                await cluster.enter("logprobs")
            samples = set_logprobs(samples, "reference_logprobs", await policy.logprobs(samples, reference=True))
    check()
    run.between_steps = False
    remaining = iter(samples)
    with run.phase("train"):
        await cluster.enter("train")
        updates = [await policy.train([next(remaining) for _ in batch]) for batch in batches]
    if not updates:
        return metrics
    measured = set_logprobs(first, "old_logprobs", updates[0].logprobs) + ([] if stands else others)
    metrics |= mismatch(measured, run.state.weight_version)
    return metrics | {name: sum(u.metrics[name] for u in updates) / len(updates) for name in updates[0].metrics}


def mismatch(samples: Sequence[TrainSample], version: int) -> dict[str, float]:
    """How old the tokens of these samples are, and how far the engine's log-probabilities are from those of the
    policy's `version`: of its own tokens, `mismatch/`, and of older ones, `staleness/`."""
    old, behaviour = (
        torch.from_numpy(np.concatenate([getattr(s, name) for s in samples]))
        for name in ("old_logprobs", "behaviour_logprobs")
    )
    versions = [s.versions for s in samples]
    ages = token_ages([len(s.response_ids) for s in samples], versions, version)
    older = mismatch_metrics(old, behaviour, ages > 0, "staleness")
    return mismatch_metrics(old, behaviour, ages == 0) | staleness_metrics(ages, versions) | older
