"""Real megatron ranks into a real engine, for every layout of the policy: bit for bit, and in log-probabilities."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_fapo.config.root import Config
from megatron_fapo.policy.batch import TrainSample
from megatron_fapo.policy.group import PolicyDiedError, PolicyGroup
from megatron_fapo.training.cluster import Cluster, make_policy
from tests.rollout.conftest import Engine, make_prompts, run

LAYOUTS: dict[str, dict[str, int]] = {
    "alone": {},
    "TP2": {"tensor": 2},
    "PP2xVPP2": {"pipeline": 2, "virtual_pipeline": 2},
    "TP2xPP2": {"tensor": 2, "pipeline": 2},
    "DP2": {"data": 2},
}


def _config(engine: Engine, run_dir: Path, parallel: dict[str, int]) -> Config:
    return Config.model_validate(
        {
            "run_dir": str(run_dir),
            "device": "cpu",
            "policy": {
                "model_path": str(engine.checkpoints[1]),
                "parallel": parallel,
                "optimizer": {"lr": 1e-2, "warmup_steps": 0},
            },
        }
    )


async def _train_and_refit(engine: Engine, policy: PolicyGroup, config: Config, version: int) -> dict[str, float]:
    await policy.start(device="cpu", dtype="float32")
    batch = [TrainSample(p.token_ids, p.token_ids[::-1], 1.0) for p in make_prompts(4)]
    await policy.train(batch, loss="supervised")  # so that the weights are no checkpoint's
    cluster = Cluster(config, "cpu", policy, engine.pool)
    return await cluster.refit(version)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", [*LAYOUTS])
def test_the_engine_holds_what_the_policy_exports(engine: Engine, tmp_path: Path, layout: str) -> None:
    """And at last a rank fails: the others, which wait for it, are not waited for."""
    config = _config(engine, tmp_path, LAYOUTS[layout])
    policy = make_policy(config, "cpu")

    async def scenario() -> tuple[dict[str, float], list[Any], list[list[float]]]:
        try:
            metrics = await _train_and_refit(engine, policy, config, version=5)
            await policy.export(tmp_path / "hf")
            await engine.handle.export_weights.remote(str(tmp_path / "held.safetensors"))
            samples = [s async for s in engine.stream(make_prompts(6), n=2)]
            asked = [TrainSample(s.prompt.token_ids, s.token_ids) for s in samples]
            logprobs = await policy.logprobs(asked)
            with pytest.raises(PolicyDiedError, match=r"(?s)outside the model.s vocabulary.*policy-\d\.log"):
                await asyncio.wait_for(policy.logprobs([TrainSample((1, 2), (10**6,))]), 120)
            return metrics, samples, logprobs
        finally:
            await policy.shutdown()

    metrics, samples, logprobs = run(scenario())
    exported: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "hf").glob("*.safetensors"):
        exported |= load_file(file)
    held = load_file(tmp_path / "held.safetensors")
    assert held.keys() == exported.keys()
    assert [name for name in held if not torch.equal(held[name], exported[name])] == []
    started_from = load_file(engine.checkpoints[1] / "model.safetensors")
    assert not any(torch.equal(held[name], started_from[name]) for name in held if name.endswith("proj.weight"))
    assert metrics["weight_sync/bytes"] == sum(t.nbytes for t in exported.values())
    assert {s.weight_version for s in samples} == {5}
    for sample, own in zip(samples, logprobs, strict=True):
        # Two implementations in float32: what is left is the order of sums.
        torch.testing.assert_close(torch.tensor(own), torch.tensor(sample.logprobs), rtol=0, atol=5e-5)
