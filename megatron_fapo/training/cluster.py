"""The processes of a run: started together, ended together.

In: a checked configuration. Out: a `Cluster` whose policy, engines and reward loop are up. Owns Ray and every actor;
leaving the context ends them all, whatever happened inside.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_fapo.config.root import Config, asks_genrm
from megatron_fapo.device import choose_device, choose_dtype
from megatron_fapo.errors import UserError
from megatron_fapo.genrm.client import GenRMClient
from megatron_fapo.genrm.reward_loop import RewardLoop
from megatron_fapo.policy.actor import PolicyActor
from megatron_fapo.policy.group import PolicyGroup
from megatron_fapo.rollout.engine import RolloutEngine
from megatron_fapo.rollout.environment import vllm_environment
from megatron_fapo.rollout.guard import Guard
from megatron_fapo.rollout.pool import RolloutPool
from megatron_fapo.weight_sync.protocol import choose_transport, verify_due

log = logging.getLogger(__name__)


@dataclass
class Cluster:
    """What a driver works with. Parts that a verb does not need are None."""

    config: Config
    device: str
    policy: PolicyGroup | None = None
    rollout: RolloutPool | None = None
    reward: RewardLoop | None = None
    genrm_urls: list[str] = field(default_factory=list)
    """Base URLs of the GenRM pool, a judge service's excepted."""
    genrm_servers: list[Any] = field(default_factory=list)
    """The GenRMServer actors of ours, in the order of their URLs."""
    transport: str = "shm"
    refits: int = 0

    async def refit(self, version: int) -> dict[str, float]:
        """Make every engine serve the policy's weights as `version`; returns `weight_sync/...`."""
        assert self.policy is not None
        assert self.rollout is not None
        cfg = self.config.weight_sync
        sources = await self.policy.open_refit(self.transport, verify_due(self.refits, cfg.verify_every))
        metrics = await self.rollout.refit(sources, version, timeout_s=cfg.timeout_s)
        self.refits += 1
        return metrics


@contextlib.asynccontextmanager
async def launch(
    config: Config, *, policy: bool = True, rollout: bool = True, judges_only: bool = False
) -> AsyncIterator[Cluster]:
    """Start what the verb needs; yields when all of it is ready.

    Args:
        policy: megatron ranks (training, warm-up, export).
        rollout: engines, GenRM servers and the reward loop.
        judges_only: GenRM servers without the reward loop, for a verb that asks them itself; also without engines.
    """
    device = choose_device(config.device)
    if rollout or judges_only:
        await _check_external_servers(config)
    async with contextlib.AsyncExitStack() as stack:
        if not os.environ.get("RAY_ADDRESS"):  # Ray's own processes outlive a killed driver by minutes
            guard = Guard()
            stack.callback(guard.release)
            for name, value in guard.environment.items():
                os.environ[name] = value
                stack.callback(os.environ.pop, name)
        _start_ray(device)
        stack.callback(_stop_ray)
        _require_gpus(config, device, policy=policy, rollout=rollout, genrm=rollout or judges_only)
        cluster = Cluster(config, device)
        starting: list[Coroutine[Any, Any, Any]] = []
        if policy:
            cluster.policy = make_policy(config, device)
            stack.push_async_callback(cluster.policy.shutdown)
            dtype = choose_dtype(config.policy.dtype, device)
            starting.append(cluster.policy.start(device=device, dtype=dtype))
        engines: list[dict[str, Any]] = []
        if rollout:
            cluster.rollout = make_rollout(config, device)
            stack.push_async_callback(cluster.rollout.shutdown)
            starting.append(_start_engines(cluster.rollout, config, engines))
        if rollout or judges_only:
            starting.append(_start_scoring(config, cluster, stack, loop=not judges_only))
        if device == "gpu" and config.gpu_share < 1 and not _kv_caches_are_set(config):
            # On a shared card vLLM sizes its KV cache by the memory that is left, so nobody else may be taking any.
            for each in starting:
                await each
        else:  # importing vLLM and megatron takes most of the time
            await _all(starting)
        if rollout and policy:
            assert cluster.policy is not None
            engine_gpus = [uuid for facts in engines for uuid in facts["gpus"]]
            cluster.transport = choose_transport(cluster.policy.gpus, engine_gpus)
        yield cluster


async def _all(work: list[Coroutine[Any, Any, Any]]) -> None:
    """Run everything; the first error cancels the rest and is raised as itself."""
    try:
        async with asyncio.TaskGroup() as group:
            for each in work:
                group.create_task(each)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _start_engines(pool: RolloutPool, config: Config, facts: list[dict[str, Any]]) -> None:
    facts += await pool.start(0, timeout_s=config.rollout.start_timeout_s)


async def _start_scoring(config: Config, cluster: Cluster, stack: contextlib.AsyncExitStack, *, loop: bool) -> None:
    urls = cluster.genrm_urls = await _start_genrm(config, cluster.device, stack, cluster.genrm_servers)
    if not loop:
        return
    cluster.reward = RewardLoop(config.reward, config.genrm, urls, config.rollout.max_response_tokens)
    stack.push_async_callback(cluster.reward.close)
    await cluster.reward.start()


def _kv_caches_are_set(config: Config) -> bool:
    """Whether every vLLM has its KV cache given in bytes, and so does not measure the card's free memory."""
    return all("kv_cache_memory_bytes" in options for options in (config.rollout.vllm, config.genrm.vllm))


async def _check_external_servers(config: Config) -> None:
    """Refuse dead GenRM addresses before any process or GPU is taken."""
    if asks_genrm(config) and (config.genrm.urls or config.genrm.rendezvous):
        client = GenRMClient(config.genrm.urls, config.genrm)
        await client.check()
        await client.close()


def _start_ray(device: str) -> None:
    """Join the cluster of RAY_ADDRESS, or start Ray on this machine."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # 30 is too few on a busy laptop
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**common)
    else:
        store = 200 * 2**20 if device == "cpu" else None
        ray.init(address="local", include_dashboard=False, object_store_memory=store, **common)
    # Ray takes SIGTERM for a crash: it would end the process with a stack trace instead of letting it save and stop.
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _require_gpus(config: Config, device: str, *, policy: bool, rollout: bool, genrm: bool) -> None:
    """
    Raises:
        UserError: Ray has fewer GPUs than the run asks for; its actors would wait for them for ever.
    """
    if device == "cpu":
        return
    import ray

    def share(tensor_parallel: int) -> float:
        return config.gpu_share if tensor_parallel == 1 else tensor_parallel

    asked = config.policy.parallel.world_size * config.gpu_share if policy else 0.0
    if rollout:
        asked += config.rollout.replicas * share(config.rollout.tensor_parallel)
    if genrm and asks_genrm(config):
        asked += config.genrm.servers * share(config.genrm.tensor_parallel)
    present = ray.cluster_resources().get("GPU", 0.0)
    if asked > present:
        raise UserError(
            f"the run asks for {asked:g} GPUs and there are {present:g}: lower policy.parallel, rollout.replicas or "
            "genrm.servers, or let processes share cards with gpu_share (0.33 puts three on one)"
        )


def _stop_ray() -> None:
    import ray

    ray.shutdown()


def _actor(kind: type, config: Config, device: str, gpus: int = 1, concurrency: int | None = None) -> Any:
    """The Ray actor class with its place: CPUs are not counted, since actors wait for each other most of the time."""
    import ray

    env = vllm_environment(device)  # megatron ranks on a CPU want the same: one thread, no compilation
    share: float = 0
    if device == "gpu":
        share = config.gpu_share if gpus == 1 else gpus
    more = {} if concurrency is None else {"max_concurrency": concurrency}
    return ray.remote(kind).options(num_cpus=0, num_gpus=share, runtime_env={"env_vars": env}, **more)


def make_policy(config: Config, device: str) -> PolicyGroup:
    """The policy's actors, not yet started; their logs go to run_dir/logs."""
    run_dir, model = str(Path(config.run_dir).resolve()), str(Path(config.policy.model_path).resolve())
    config = config.model_copy(update={"policy": config.policy.model_copy(update={"model_path": model})})
    ranks = range(config.policy.parallel.world_size)
    actors = [_actor(PolicyActor, config, device).remote(run_dir, rank) for rank in ranks]
    return PolicyGroup(actors, config, [Path(run_dir) / "logs" / f"policy-{rank}.log" for rank in ranks])


def make_rollout(config: Config, device: str) -> RolloutPool:
    """The engines' actors, not yet started; their logs go to run_dir/logs."""
    logs = [str(Path(config.run_dir).resolve() / "logs" / f"rollout-{i}.log") for i in range(config.rollout.replicas)]
    engines = [
        _actor(RolloutEngine, config, device, config.rollout.tensor_parallel).remote(
            str(Path(config.policy.model_path).resolve()),
            config.rollout,
            device=device,
            dtype=choose_dtype(config.policy.dtype, device),
            max_model_len=config.data.max_prompt_tokens + config.rollout.max_response_tokens,
            max_positions=config.policy.max_position_embeddings,
            seed=config.seed,
            log_path=path,
        )
        for path in logs
    ]
    return RolloutPool(engines, logs)


async def _start_genrm(config: Config, device: str, stack: contextlib.AsyncExitStack, actors: list[Any]) -> list[str]:
    """Start our GenRM servers; returns the base URLs of the whole pool."""
    if not asks_genrm(config):
        return []
    import ray

    from megatron_fapo.genrm.server import GenRMServer

    dtype = choose_dtype("auto", device)
    genrm = config.genrm
    if genrm.model_path is not None:  # actors have working directories of their own
        genrm = genrm.model_copy(update={"model_path": str(Path(genrm.model_path).resolve())})
    for index in range(genrm.servers):
        log_path = str(Path(config.run_dir).resolve() / "logs" / f"genrm-{index}.log")
        # Two at once, so that a stop can reach a server that is still starting.
        server = _actor(GenRMServer, config, device, genrm.tensor_parallel, concurrency=2)
        actors.append(server.remote(genrm, device=device, dtype=dtype, log_path=log_path))
        stack.push_async_callback(_stop_server, actors[-1])
    try:
        started = await asyncio.gather(*(actor.start.remote() for actor in actors))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    return [*started, *genrm.urls]


async def _stop_server(actor: Any) -> None:
    import ray

    stopping = asyncio.ensure_future(actor.stop.remote())
    await asyncio.wait([stopping], timeout=30)
    stopping.cancel()
    ray.kill(actor)
