"""Two Ray nodes on this machine, which count as different: policy ranks and an engine on one, an engine on the other.

Late in this folder, because it ends the Ray that the others share.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.cluster_utils import Cluster as RayCluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from safetensors.torch import load_file

from megatron_fapo.config.root import Config
from megatron_fapo.data.tokenizer import init_tiny_model
from megatron_fapo.policy.batch import TrainSample
from megatron_fapo.rollout.engine import EngineDiedError
from megatron_fapo.rollout.pool import RolloutPool
from megatron_fapo.training.cluster import Cluster, launch
from megatron_fapo.training.placement import nodes_of
from megatron_fapo.weight_sync.protocol import Bucket, RefitError, StaleEngineError
from megatron_fapo.weight_sync.sender import WeightSender
from tests.rollout.conftest import make_prompts


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[RayCluster]:
    """A train and rollout node, and a rollout node; the driver is on the first."""
    ray.shutdown()
    monkeypatch.setenv("RAY_free_objects_batch_size", "1")  # as launch/ray_node.py
    cluster = RayCluster()
    for index, roles in enumerate((("train", "rollout"), ("rollout",))):
        resources = dict.fromkeys(roles, 1000) | {f"fapo_node_{index}": 1}
        cluster.add_node(num_cpus=1, resources=resources, object_store_memory=100 * 2**20, include_dashboard=False)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def plasma_mib() -> float:
    """What the object stores of all nodes hold."""
    from ray._private.internal_api import memory_summary

    text = memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)
    return sum(map(float, re.findall(r"Plasma memory usage (\d+) MiB", text)))


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
        self.cluster, self.policy, self.pool, self.directory = cluster, cluster.policy, cluster.rollout, directory

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

    async def refit(self, version: int, alter: Callable[[Bucket], Bucket] | None = None) -> dict[str, float]:
        """A refit whose buckets are altered on their way."""
        original = self.policy._next_bucket

        async def altered(index: int) -> Bucket | None:
            bucket: Bucket | None = await original(index)
            return bucket if alter is None or bucket is None else alter(bucket)

        self.policy._next_bucket = altered  # type: ignore[method-assign]
        try:
            return await self.cluster.refit(version)
        finally:
            self.policy._next_bucket = original  # type: ignore[method-assign]


def damaged(bucket: Bucket) -> Bucket:
    data = np.array(ray.get(bucket.payload))
    data[bucket.entries[-1].offset + 3] ^= 1
    return replace(bucket, payload=ray.put(data))


@ray.remote(num_cpus=0)
class Owner:
    """As a policy rank that puts its bucket and is gone before an engine has it."""

    def put(self, data: Any) -> list[Any]:
        return [ray.put(data)]


def lost(bucket: Bucket) -> Bucket:
    owner = Owner.remote()
    (payload,) = ray.get(owner.put.remote(ray.get(bucket.payload)))
    ray.kill(owner)
    return replace(bucket, payload=payload)


def too_short(bucket: Bucket) -> Bucket:
    return replace(bucket, payload=ray.put(np.array(ray.get(bucket.payload)[:-256])))


class Rank:
    """A policy rank without megatron: 10 buckets of 8 MiB."""

    def __init__(self) -> None:
        self.sender = WeightSender(8, publish=ray.put)

    def open(self) -> None:
        self.sender.open(((f"t{i}", torch.full((1 << 21,), float(i))) for i in range(10)), owner=True, verify=False)

    def next(self) -> Bucket | None:
        return self.sender.next()


class Engine:
    """An engine without vLLM, which takes what it is given."""

    async def step(self, *_: object) -> dict[str, float]:
        return {"load_s": 0.0}

    begin_refit = load_bucket = finish_refit = abort_refit = step


def test_the_object_store_holds_few_buckets_at_a_time(two_nodes: RayCluster) -> None:
    ray.init(address=two_nodes.address, log_to_driver=False)
    nodes = nodes_of(ray.nodes())
    here, there = (NodeAffinitySchedulingStrategy(node.id, soft=False) for node in nodes)
    rank = ray.remote(Rank).options(num_cpus=0, scheduling_strategy=here).remote()
    engine = ray.remote(Engine).options(num_cpus=0, scheduling_strategy=there).remote()
    held: list[float] = []

    async def scenario() -> None:
        async def source() -> Bucket | None:
            held.append(plasma_mib())
            bucket: Bucket | None = await rank.next.remote()
            return bucket

        await rank.open.remote()
        pool = RolloutPool([engine], [None], [nodes[1]])
        await pool.refit([source], 1, timeout_s=60, transports=[["network"]])

    asyncio.run(scenario())
    assert len(held) == 11
    assert 8 <= max(held) <= 4 * 8, "two buckets on the sender's node, one or two on the engine's"
    deadline = time.monotonic() + 10
    while plasma_mib() > 0:
        assert time.monotonic() < deadline, "buckets are left in the object store"


@pytest.mark.timeout(300)
def test_weights_cross_nodes_bit_for_bit_and_a_failed_transfer_is_made_up_for(
    two_nodes: RayCluster, tmp_path: Path
) -> None:
    init_tiny_model(tmp_path / "model", 0)
    config = make_config(tmp_path, train_nodes=1, rollout_nodes=1)

    async def scenario() -> None:
        async with launch(config) as cluster:
            trial = Trial(cluster, tmp_path)
            assert [process.node.index for process in trial.pool._processes] == [0, 1]
            await trial.train()
            metrics = await trial.refit(1)
            sent = await trial.exported()
            nbytes = sum(t.nbytes for t in sent.values())
            assert metrics["weight_sync/bytes"] == metrics["weight_sync/network_bytes"] == nbytes
            assert metrics["weight_sync/network_s"] > 0
            assert metrics["weight_sync/buckets"] >= 4
            for held in await trial.held():
                assert held.keys() == sent.keys()
                assert [name for name in held if not torch.equal(held[name], sent[name])] == []

            await trial.train()
            failures = (
                (damaged, "other bytes than were sent"),
                (too_short, "manifest is damaged"),
                (lost, "lost on its way"),
            )
            for alter, message in failures:
                with pytest.raises(RefitError, match=message):
                    await trial.refit(2, alter)
                with pytest.raises(StaleEngineError):
                    await trial.pool.versions()
            await trial.refit(2)
            assert await trial.pool.versions() == [2, 2]
            again = await trial.exported()
            assert not torch.equal(again["model.norm.weight"], sent["model.norm.weight"])
            for held in await trial.held():
                assert [name for name in held if not torch.equal(held[name], again[name])] == []

            two_nodes.remove_node(next(iter(two_nodes.worker_nodes)), allow_graceful=False)
            with pytest.raises(EngineDiedError, match=r"rollout-1 on node .*: its node is gone") as death:
                await trial.refit(3)
            assert death.value.lost
            assert (death.value.process.rank, death.value.process.node.index) == (1, 1)

    asyncio.run(scenario())
