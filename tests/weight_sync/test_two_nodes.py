"""Two Ray nodes on this machine, which count as different: policy ranks and an engine on one, an engine on the other.

Late in this folder, because it ends the Ray that the others share.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster as RayCluster
from safetensors.torch import load_file

from megatron_fapo.config.root import Config
from megatron_fapo.data.tokenizer import init_tiny_model
from megatron_fapo.policy.batch import TrainSample
from megatron_fapo.rollout.engine import EngineDiedError
from megatron_fapo.training.cluster import Cluster, launch
from megatron_fapo.weight_sync.exchange import abort
from megatron_fapo.weight_sync.protocol import RefitError, StaleEngineError
from tests.rollout.conftest import make_prompts


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[RayCluster]:
    """A train and rollout node, and a rollout node; the driver is on the first."""
    ray.shutdown()
    cluster = RayCluster()
    for index, roles in enumerate((("train", "rollout"), ("rollout",))):
        resources = dict.fromkeys(roles, 1000) | {f"fapo_node_{index}": 1}
        cluster.add_node(num_cpus=1, resources=resources, object_store_memory=100 * 2**20, include_dashboard=False)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def make_config(tmp_path: Path, **cluster: Any) -> Config:
    return Config.model_validate(
        {
            "run_dir": str(tmp_path / "run"),
            "device": "cpu",
            "policy": {
                "model_path": str(tmp_path / "model"),
                "parallel": {"pipeline": 2},
                "optimizer": {"lr": 1e-2, "warmup_steps": 0},
            },
            "data": {"max_prompt_tokens": 64},
            "rollout": {"replicas": 2, "max_response_tokens": 64, "cpu_kv_cache_gb": 0.05},
            "genrm": {"enabled": False},
            "weight_sync": {"bucket_mb": 1, "verify_every": 1},
            "cluster": cluster,
        }
    )


class Trial:
    """A started cluster, its refits, and what each engine then computes with."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        assert cluster.policy is not None
        assert cluster.rollout is not None
        self.policy, self.pool, self.directory = cluster.policy, cluster.rollout, directory
        self._open_group = self.policy.open_group
        self.policy.open_group = self.open_group  # type: ignore[method-assign]

    async def open_group(self, rank: int) -> tuple[str, int]:
        self.store = await self._open_group(rank)
        return self.store

    async def train(self) -> None:
        """So that the weights are no checkpoint's, and not those of the last refit."""
        batch = [TrainSample(p.token_ids, p.token_ids[::-1], 1.0) for p in make_prompts(4)]
        await self.policy.train(batch, loss="supervised")

    async def exported(self) -> dict[str, torch.Tensor]:
        await self.policy.export(self.directory / "hf")
        files = (self.directory / "hf").glob("*.safetensors")
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    async def held(self) -> list[dict[str, torch.Tensor]]:
        paths = [self.directory / f"held-{index}" for index in range(2)]
        pairs = zip(self.pool._engines, paths, strict=True)
        await asyncio.gather(*(engine.export_weights.remote(str(path)) for engine, path in pairs))
        return [load_file(path) for path in paths]


@pytest.mark.timeout(300)
def test_weights_cross_nodes_bit_for_bit_and_a_failed_exchange_is_made_up_for(
    two_nodes: RayCluster, tmp_path: Path
) -> None:
    init_tiny_model(tmp_path / "model", 0)
    config = make_config(tmp_path, train_nodes=1, rollout_nodes=1)

    async def scenario() -> None:
        async with launch(config) as cluster:
            trial = Trial(cluster, tmp_path)
            assert [process.node.index for process in trial.pool._processes] == [0, 1]
            await trial.train()
            metrics = await cluster.refit(1)
            sent = await trial.exported()
            nbytes = sum(t.nbytes for t in sent.values())
            links = {link: metrics[f"weight_sync/{link}_bytes"] for link in ("local", "node", "network")}
            assert links == {"local": 0, "node": nbytes, "network": nbytes}
            for held in await trial.held():
                assert held.keys() == sent.keys()
                assert [name for name in held if not torch.equal(held[name], sent[name])] == []

            await trial.train()
            await asyncio.to_thread(abort, trial.store)  # as a member that breaks does
            with pytest.raises(RefitError, match="gave an earlier refit up"):
                await cluster.refit(2)
            with pytest.raises(StaleEngineError):
                await trial.pool.versions()
            await cluster.refit(2)
            assert await trial.pool.versions() == [2, 2]
            again = await trial.exported()
            assert not torch.equal(again["model.norm.weight"], sent["model.norm.weight"])
            for held in await trial.held():
                assert [name for name in held if not torch.equal(held[name], again[name])] == []

            two_nodes.remove_node(next(iter(two_nodes.worker_nodes)), allow_graceful=False)

            async def refit_until_it_shows() -> None:
                for version in range(3, 100):  # the engine outlives its node's raylet by moments, enough for a refit
                    await cluster.refit(version)
                    await asyncio.sleep(0.5)

            with pytest.raises(EngineDiedError, match=r"rollout-1 on node .*: its node is gone") as death:
                await refit_until_it_shows()
            assert death.value.lost
            assert (death.value.process.rank, death.value.process.node.index) == (1, 1)

    asyncio.run(scenario())
