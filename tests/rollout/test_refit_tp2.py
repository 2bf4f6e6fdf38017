"""A mixture of experts from ranks with expert parallelism into an engine of two workers, by our path and by vLLM's."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.refits.reference import Native, ReferenceEngine, ReferencePolicy, whole_model
from megatron_fapo.config.rollout import SamplingConfig
from megatron_fapo.config.root import Config
from megatron_fapo.data.tokenizer import build_testbed_tokenizer
from megatron_fapo.policy.batch import TrainSample
from megatron_fapo.rollout.environment import vllm_environment
from megatron_fapo.rollout.pool import RolloutPool
from megatron_fapo.training.cluster import Cluster, make_policy
from tests.policy.models import write_model
from tests.rollout.conftest import make_prompts, run
from tests.weight_sync.vllm_ranks import contents


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def _digests(worker: Any) -> dict[str, str]:
    """Of everything that a worker's kernels compute with."""
    return {name: digest(tensor) for name, tensor in contents(worker.model_runner.get_model()).items()}


class GatheringPolicy(ReferencePolicy):
    """A policy rank that tells what it gathers."""

    def gathered(self) -> dict[str, str]:
        return {name: digest(tensor) for name, tensor in whole_model(self._up, self.native_stages)}


async def _samples(pool: RolloutPool) -> dict[Any, tuple[Any, Any]]:
    prompts = make_prompts(4)
    options: dict[str, Any] = {"n": 2, "sampling": SamplingConfig(), "max_tokens": 24}
    return {s.key: (s.token_ids, s.logprobs) async for s in pool.generate(prompts, [0] * 4, **options)}


@pytest.mark.timeout(300)
def test_ep2_into_tp2_equals_vllm_s_own_load_of_the_export(
    local_ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_fapo.training.cluster.PolicyActor", GatheringPolicy)
    write_model(tmp_path / "model", "qwen3_moe", tied=False)
    build_testbed_tokenizer(tmp_path / "model")
    config = Config.model_validate(
        {
            "run_dir": str(tmp_path / "run"),
            "device": "cpu",
            "policy": {
                "model_path": str(tmp_path / "model"),
                "parallel": {"tensor": 2, "expert": 2, "expert_tensor": 1, "sequence_parallel": True},
                "optimizer": {"lr": 1e-2, "warmup_steps": 0},
            },
            "rollout": {"tensor_parallel": 2, "cpu_kv_cache_gb": 0.05},
        }
    )
    policy = make_policy(config, "cpu")
    actor = local_ray.remote(ReferenceEngine).options(num_cpus=0, runtime_env={"env_vars": vllm_environment("cpu")})
    engine = actor.remote(
        str(tmp_path / "model"), config.rollout, device="cpu", dtype="float32", max_model_len=128, seed=3,
        log_path=str(tmp_path / "rollout-0.log"),
    )  # fmt: skip
    pool = RolloutPool([engine], [str(tmp_path / "rollout-0.log")])

    async def scenario() -> None:
        try:
            await policy.start(device="cpu", dtype="float32")
            await pool.start()
            cluster = Cluster(config, "cpu", policy, pool)
            first = await _samples(pool), await engine.on_workers.remote(_digests)
            seen = []
            for version, link in ((1, "map"), (2, "message")):
                batch = [TrainSample(p.token_ids, p.token_ids[::-1], 1.0) for p in make_prompts(4)]
                await policy.train(batch, loss="supervised")
                cluster.refits = None
                cluster.config = config.model_copy(
                    update={"weight_sync": config.weight_sync.model_copy(update={"node_link": link})}
                )
                metrics = await cluster.refit(version)
                assert metrics["weight_sync/bytes"] == metrics["weight_sync/node_bytes"] > 0
                ours = await _samples(pool), await engine.on_workers.remote(_digests)
                native = Native(cluster, "reload", tmp_path / "export")
                await native.open()
                await native.refit(version)
                assert (await _samples(pool), await engine.on_workers.remote(_digests)) == ours, link
                seen.append(ours)
            assert len({worker["model.norm.weight"] for _, workers in (first, *seen) for worker in workers}) == 3
            assert len({str(samples) for samples, _ in (first, *seen)}) == 3
            # The gather of the reference path, against the export that was just read.
            files = (tmp_path / "export").glob("*.safetensors")
            exported = {name: digest(tensor) for file in files for name, tensor in load_file(file).items()}
            for gathered in await asyncio.gather(*(actor.gathered.remote() for actor in policy._actors)):
                assert gathered == exported
        finally:
            await pool.shutdown()
            await policy.shutdown()

    run(scenario())
