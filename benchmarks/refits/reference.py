"""The reference path of a refit: the policy gathered to whole HF tensors, and vLLM's own ways of taking them in.

For tests and benchmarks only: users refit through `Cluster.refit`, which this path is compared with and raced against.

On GPUs vLLM's native weight transfer (vllm.distributed.weight_transfer, vLLM 0.26): its `ipc` engine where each engine
shares the cards of the policy, its `nccl` engine where it has cards of its own, both packed. Every rank of the policy
gathers (over tensor and expert ranks, then over the stages of the pipeline); `ipc` maps each rank's copy from the
worker on the same card, `nccl` broadcasts rank 0's copy to all workers. On CPUs neither engine runs, so the reference
is an HF export to files and vLLM's `reload_weights` of them.

`Native` drives it, phase by phase, from where the driver is; `ReferencePolicy` and `ReferenceEngine` are the actors
that it needs. The policy has one data-parallel replica here.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_fapo.policy.actor import PolicyActor
from megatron_fapo.rollout.engine import RolloutEngine
from megatron_fapo.training.cluster import Cluster

Meta = tuple[str, str, tuple[int, ...]]
"""Name, dtype as torch names it, and shape of an HF tensor."""
BUFFER_BYTES = 2**30
"""vLLM's default of what is packed together. A larger tensor, which `ipc` would refuse, raises it."""


def whole_model(worker: Any, stages: Sequence[Sequence[Meta]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every HF tensor, whole, on every rank. Collective over all ranks of the policy.

    Args:
        stages: what each pipeline stage exports, in its order.
    """
    state, own = worker.state, worker.export()
    group = state.get_pipeline_model_parallel_group()
    for stage, metas in enumerate(stages):
        mine = stage == state.get_pipeline_model_parallel_rank()
        for name, dtype, shape in metas:
            tensor = next(own)[1] if mine else torch.empty(shape, dtype=getattr(torch, dtype), device=worker.device)
            if len(stages) > 1:
                tensor = tensor.contiguous()
                torch.distributed.broadcast(tensor, torch.distributed.get_process_group_ranks(group)[stage], group)
            yield name, tensor


class ReferencePolicy(PolicyActor):
    """A policy rank that can also feed vLLM's weight transfer. Its methods are collective over all ranks."""

    native_stages: Sequence[Sequence[Meta]] = ()
    native_group: Any = None

    def describe(self) -> list[Meta]:
        """Every HF tensor of the model, in the order in which it is gathered."""
        found = [(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in self._up.export()]
        group = self._up.state.get_pipeline_model_parallel_group()
        stages: list[Any] = [None] * group.size()
        torch.distributed.all_gather_object(stages, found, group=group)
        self.native_stages = stages
        return [meta for stage in stages for meta in stage]

    def gather(self) -> float:
        """Gather the whole model and drop it; seconds."""
        began = time.perf_counter()
        for _ in whole_model(self._up, self.native_stages):
            pass
        self._settle()
        return time.perf_counter() - began

    def meeting_place(self) -> dict[str, Any]:
        """Of vLLM's NCCL group: this node, and a port that is free."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return {"master_address": ray.util.get_node_ip_address(), "master_port": free.getsockname()[1]}

    def join_nccl(self, where: dict[str, Any]) -> None:
        """Enter the group with vLLM's workers. Rank 0 only; returns when all workers have come."""
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        self.native_group = NCCLWeightTransferEngine.trainer_init(where)

    def send(self, backend: str, engines: Sequence[Any], buffer_bytes: int) -> None:
        """Gather and hand over to vLLM's trainer side, which for `ipc` also calls the engines' `update_weights`."""
        tensors = whole_model(self._up, self.native_stages)
        options = {"packed": True, "packed_buffer_size_bytes": buffer_bytes}
        if backend == "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

            options |= {"send_mode": "ray", "llm_handle": list(engines)}
            IPCWeightTransferEngine.trainer_send_weights(tensors, options)
        elif self.rank == 0:
            from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

            NCCLWeightTransferEngine.trainer_send_weights(tensors, options | {"group": self.native_group})
        else:
            for _ in tensors:
                pass
        self._settle()

    def _settle(self) -> None:
        if self._up.device == "cuda":
            torch.cuda.synchronize()


class ReferenceEngine(RolloutEngine):
    """An engine with vLLM's own weight updates beside ours. `rollout.vllm.weight_transfer_config` names the backend."""

    def __init__(self, *args: Any, **options: Any) -> None:
        # vLLM's calls carry CUDA handles and functions as pickles; its processes read this when they start.
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        super().__init__(*args, **options)

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._ask(self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info)))

    async def begin_native(self) -> None:
        """Stop serving, as `begin_refit` does; the engine is stale until `finish_native`."""
        self._version.begin()
        await self.pause()

    async def start_weight_update(self) -> None:
        await self._ask(self._llm.start_weight_update())

    async def update_weights(self, request: dict[str, Any]) -> None:
        """As vLLM's trainer side calls it through Ray."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._ask(self._llm.update_weights(WeightTransferUpdateRequest(**request)))

    async def finish_weight_update(self) -> None:
        await self._ask(self._llm.finish_weight_update())

    async def reload(self, directory: str) -> None:
        """Load an HF checkpoint over the weights that there are."""
        await self.on_workers("reload_weights", weights_path=directory)

    async def reset(self) -> None:
        assert await self._ask(self._llm.reset_prefix_cache()), "the prefix cache could not be reset"

    async def finish_native(self, version: int) -> None:
        self._version.complete(version)
        await self.resume()

    async def on_workers(self, method: str | Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        """Call a method of each of vLLM's workers, or a function with each as its first argument."""
        found: list[Any] = await self._ask(self._llm.collective_rpc(method, args=args, kwargs=options))
        return found


@dataclass
class Native:
    """The reference path between the policy and the engines of a cluster. `open` first."""

    cluster: Cluster
    backend: str
    """`ipc`, `nccl`, or `reload` (CPUs)."""
    scratch: Path
    """For the export that `reload` reads."""
    metas: Sequence[Meta] = ()

    @property
    def ranks(self) -> list[Any]:
        assert self.cluster.policy is not None
        return self.cluster.policy._actors

    @property
    def engines(self) -> list[Any]:
        assert self.cluster.rollout is not None
        return self.cluster.rollout._engines

    async def open(self) -> None:
        """Set up once what vLLM's backend needs."""
        self.metas = (await asyncio.gather(*(rank.describe.remote() for rank in self.ranks)))[0]
        if self.backend == "nccl":
            each = self.cluster.config.rollout.tensor_parallel
            where = await self.ranks[0].meeting_place.remote() | {"world_size": 1 + each * len(self.engines)}
            joins = [self.ranks[0].join_nccl.remote(where)]
            for number, engine in enumerate(self.engines):
                joins.append(engine.init_weight_transfer_engine.remote(where | {"rank_offset": 1 + each * number}))
            await asyncio.gather(*joins)
        elif self.backend == "ipc":
            await asyncio.gather(*(engine.init_weight_transfer_engine.remote({}) for engine in self.engines))

    async def refit(self, version: int) -> dict[str, float]:
        """Make every engine serve the policy's weights as `version`. Returns seconds by phase, and of all together.

        The policy's weights and the engines' memory for weights are to be on their devices (`Cluster.enter("refit")`).
        """
        seconds: dict[str, float] = {}
        began = time.perf_counter()

        async def phase(name: str, calls: Sequence[Awaitable[Any]]) -> None:
            since = time.perf_counter()
            await asyncio.gather(*calls)
            seconds[f"{name}_s"] = time.perf_counter() - since

        await phase("pause", [engine.begin_native.remote() for engine in self.engines])
        if self.backend == "reload":
            assert self.cluster.policy is not None
            shutil.rmtree(self.scratch, ignore_errors=True)
            await phase("gather", [self.cluster.policy.export(self.scratch)])
            await phase("load", [engine.reload.remote(str(self.scratch)) for engine in self.engines])
        else:
            await phase("start", [engine.start_weight_update.remote() for engine in self.engines])
            await phase("transfer", self._transfer())
            await phase("finish", [engine.finish_weight_update.remote() for engine in self.engines])
        await phase("reset", [engine.reset.remote() for engine in self.engines])
        await phase("resume", [engine.finish_native.remote(version) for engine in self.engines])
        return seconds | {"total_s": time.perf_counter() - began}

    def _transfer(self) -> list[Awaitable[Any]]:
        largest = max(torch.Size(shape).numel() * getattr(torch, dtype).itemsize for _, dtype, shape in self.metas)
        buffer_bytes = max(BUFFER_BYTES, largest)
        calls = [rank.send.remote(self.backend, self.engines, buffer_bytes) for rank in self.ranks]
        if self.backend == "nccl":
            from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo

            names, dtypes, shapes = zip(*self.metas, strict=True)
            sizes = {"packed": True, "packed_buffer_size_bytes": buffer_bytes}
            info = NCCLWeightTransferUpdateInfo(list(names), list(dtypes), [list(s) for s in shapes], **sizes)
            calls += [engine.update_weights.remote({"update_info": asdict(info)}) for engine in self.engines]
        return calls

    async def gather_s(self) -> float:
        """Seconds of the Megatron gather alone; the slowest rank's."""
        return float(max(await asyncio.gather(*(rank.gather.remote() for rank in self.ranks))))
