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
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from megatron_fapo.config.cluster import ClusterConfig
from megatron_fapo.config.root import Config, asks_genrm, judges_take_turns
from megatron_fapo.device import choose_device, choose_dtype
from megatron_fapo.genrm.client import GenRMClient
from megatron_fapo.genrm.reward_loop import RewardLoop
from megatron_fapo.genrm.server import GenRMServer
from megatron_fapo.observe.stall import WAITS
from megatron_fapo.policy.actor import PolicyActor
from megatron_fapo.policy.group import PolicyGroup
from megatron_fapo.processes import HERE, Node, Process, ProcessDiedError
from megatron_fapo.rollout.engine import MEMORY, EngineDiedError, RolloutEngine
from megatron_fapo.rollout.environment import vllm_environment
from megatron_fapo.rollout.guard import Guard
from megatron_fapo.rollout.pool import RolloutPool
from megatron_fapo.training.placement import missing_nodes, nodes_of, place
from megatron_fapo.training.refit import Refits
from megatron_fapo.training.servers import Servers

log = logging.getLogger(__name__)
T = TypeVar("T")

AWAKE = {"rollout": MEMORY, "refit": MEMORY[:1]}
"""Phase -> what of engines that take turns is awake; in other phases nothing is."""


@dataclass
class Cluster:
    """What a driver works with. Parts that a verb does not need are None."""

    config: Config
    device: str
    policy: PolicyGroup | None = None
    rollout: RolloutPool | None = None
    reward: RewardLoop | None = None
    servers: Servers = field(default_factory=Servers)
    """The GenRM's that are ours."""
    refits: Refits | None = None
    awake: tuple[str, ...] = MEMORY
    """What of the engines' memory is not asleep."""
    judges_awake: bool = True
    """Whether our GenRM servers are; they sleep if they take turns."""
    memory: dict[str, float] = field(default_factory=dict)
    """Metrics `memory/...` of the phases since `take_memory`."""

    async def enter(self, phase: str, *, keep_weights: bool = False) -> None:
        """Begin a phase of policy.memory.PLAN: who does not work in it makes room, then who does takes it.

        Args:
            keep_weights: engines that fall asleep keep their weights in host memory, and need no refit.

        Raises:
            ServerDiedError: a GenRM server did not take its turn.
        """
        awake, judges = AWAKE.get(phase, ()), judges_take_turns(self.config)
        if judges and self.judges_awake and phase != "judge":
            await self._servers("sleep")
            self.judges_awake = False
        turns = self.rollout is not None and (judges or self.config.rollout.colocated)
        if turns and not set(self.awake) <= set(awake):
            assert self.rollout is not None
            if self.awake != MEMORY:  # of a refit that failed: vLLM falls asleep only when all of it is awake
                try:
                    await self.enter("rollout")
                except EngineDiedError as gone:
                    if not gone.lost:
                        raise
                    log.warning("%s", gone)  # it holds no memory, and must not keep finished steps from being saved
            await self.rollout.sleep(keep_weights=keep_weights)
            self.awake = ()
        if self.policy is not None:
            for name, value in (await self.policy.enter(phase)).items():
                self.memory[f"memory/{name}"] = value
        # Said before it is done: who is cut short in waking may be awake, and is put to sleep again.
        if turns and self.awake != awake:
            assert self.rollout is not None
            asleep, self.awake = [tag for tag in awake if tag not in self.awake], awake
            await self.rollout.wake(asleep)
        if judges and phase == "judge" and not self.judges_awake:
            self.judges_awake = True
            await self._servers("wake")

    def judges_turn(self, *, keep_weights: bool = False) -> Callable[[], Awaitable[None]] | None:
        """What has colocated servers judge when a rollout has ended; None: they judge meanwhile."""
        return partial(self.enter, "judge", keep_weights=keep_weights) if judges_take_turns(self.config) else None

    async def _servers(self, order: str) -> None:
        """All GenRM servers of ours `sleep` or `wake`."""
        began = time.monotonic()
        await self.servers.turn(order)
        self.memory[f"memory/servers_{order}_s"] = time.monotonic() - began

    @property
    def serving(self) -> bool:
        """Whether the engines are awake; else only a refit makes them serve."""
        return self.awake == MEMORY

    def take_memory(self) -> dict[str, float]:
        taken, self.memory = self.memory, {}
        return taken

    async def refit(self, version: int) -> dict[str, float]:
        """Make every engine serve the policy's weights as `version`; returns `weight_sync/...`."""
        assert self.policy is not None
        assert self.rollout is not None
        await self.enter("refit")
        if self.refits is None:
            self.refits = Refits(self.policy, self.rollout, self.config.weight_sync, offload=self.config.policy.offload)
        metrics = await self.refits.refit(version)
        await self.enter("rollout")
        return metrics

    @property
    def genrm_urls(self) -> list[str]:
        """Base URLs of the GenRM pool as it is now, a judge service's excepted."""
        return [*self.servers.urls, *self.config.genrm.urls]

    @property
    def _others_judge(self) -> bool:
        return bool(self.config.genrm.urls or self.config.genrm.rendezvous)

    def require_servers(self, *, all_of_them: bool = False) -> None:
        """
        Raises:
            ServerDiedError: none of our GenRM servers is left in a pool that has no others; or, of those that take
                turns or if `all_of_them` are asked for, one is gone for good.
        """
        lost, every = self.servers.lost(), all_of_them or judges_take_turns(self.config)
        if lost and (every or (len(lost) == len(self.servers.keepers) and not self._others_judge)):
            raise lost[0]

    async def while_judged(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`, or cancel it when no GenRM server is left: its verdicts would be waited for in vain.

        Raises:
            ServerDiedError: the last server of a pool of ours alone; none can be started again.
        """
        if not self.servers.keepers or self._others_judge:
            return await work
        task, watch = asyncio.ensure_future(work), asyncio.ensure_future(self.servers.all_lost())
        try:
            await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise watch.result()
        finally:
            for each in (task, watch):
                each.cancel()
            await asyncio.gather(task, watch, return_exceptions=True)


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
        nodes = await _await_nodes(config.cluster)
        asked = {"policy": policy, "rollout": rollout, "genrm": rollout or judges_only}
        placed = place(config, nodes, device, **asked)
        cluster = Cluster(config, device)
        starting: list[Coroutine[Any, Any, Any]] = []
        if policy:
            cluster.policy = make_policy(config, device, placed.policy)
            stack.push_async_callback(cluster.policy.shutdown)
            dtype = choose_dtype(config.policy.dtype, device)
            starting.append(cluster.policy.start(device=device, dtype=dtype))
        cards: list[list[str]] = []
        if rollout and policy and config.rollout.colocated:
            assert cluster.policy is not None
            await starting.pop()  # the engines get its cards, and size their KV caches by what it leaves free
            await cluster.enter("rollout")
            cards = cluster.policy.cards(config.rollout.tensor_parallel)[: config.rollout.replicas]
        if rollout:
            cluster.rollout = make_rollout(config, device, placed.engines, cards)
            stack.push_async_callback(cluster.rollout.shutdown)
            starting.append(cluster.rollout.start(0, timeout_s=config.rollout.start_timeout_s))
        turns = rollout and not judges_only and judges_take_turns(config)
        if turns:
            await _all(starting)
            starting = []
            await cluster.enter("judge", keep_weights=not policy)  # the servers start on what the engines have left
        if rollout or judges_only:
            starting.append(_start_scoring(config, cluster, stack, placed.servers, loop=not judges_only))
        if device == "gpu" and config.gpu_share < 1 and not _kv_caches_are_set(config):
            # On a shared card vLLM sizes its KV cache by the memory that is left, so nobody else may be taking any.
            for each in starting:
                await each
        else:  # importing vLLM and megatron takes most of the time
            await _all(starting)
        if turns and not policy:
            await cluster.enter("rollout")
        yield cluster


async def _all(work: list[Coroutine[Any, Any, Any]]) -> None:
    """Run everything; the first error cancels the rest and is raised as itself."""
    try:
        async with asyncio.TaskGroup() as group:
            for each in work:
                group.create_task(each)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _start_scoring(
    config: Config, cluster: Cluster, stack: contextlib.AsyncExitStack, nodes: Sequence[Node], *, loop: bool
) -> None:
    if asks_genrm(config):
        await _start_genrm(config, cluster, stack, nodes)
    if not loop:
        return
    reward = cluster.reward = RewardLoop(
        config.reward, config.genrm, cluster.genrm_urls, config.rollout.max_response_tokens
    )
    stack.push_async_callback(reward.close)
    await reward.start()
    cluster.servers.keep(lambda: reward.set_servers(cluster.genrm_urls), restart=not judges_take_turns(config))


def _kv_caches_are_set(config: Config) -> bool:
    """Whether every vLLM has its KV cache given in bytes, and so does not measure the card's free memory."""
    judges = [config.genrm.vllm] if asks_genrm(config) and config.genrm.servers else []
    return all("kv_cache_memory_bytes" in options for options in (config.rollout.vllm, *judges))


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
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # one per core, and none has our actors' environment
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


async def _await_nodes(config: ClusterConfig) -> list[Node]:
    """The nodes of the run, once all have joined; without RAY_ADDRESS this machine, whatever `cluster` says.

    Raises:
        ProcessDiedError: nodes that have not joined within cluster.start_timeout_s; with the role of each.
    """
    import ray

    nodes, deadline = nodes_of(ray.nodes()), time.monotonic() + config.start_timeout_s
    with WAITS.on("cluster.start", "the nodes") as wait:
        while os.environ.get("RAY_ADDRESS") and (missing := missing_nodes(config, nodes)):
            named = ", ".join(f"{index} ({role})" for index, role in missing.items())
            wait.whom = f"missing nodes {named}"
            if time.monotonic() > deadline:
                first = Process("node", next(iter(missing)), Node("", "no address", next(iter(missing))))
                what = f"has not joined Ray within {config.start_timeout_s:g} s; missing nodes: {named}"
                raise ProcessDiedError(first, what, lost=True)
            await asyncio.sleep(0.5)
            nodes = nodes_of(ray.nodes())
    return nodes


def _stop_ray() -> None:
    import ray

    ray.shutdown()


def _actor(
    kind: type,
    config: Config,
    device: str,
    node: Node,
    gpus: int = 1,
    concurrency: int | None = None,
    cards: Sequence[str] = (),
) -> Any:
    """The Ray actor class with its place: CPUs are not counted, since actors wait for each other most of the time.

    Args:
        cards: Ray's ids of GPUs that other actors hold, and that this one shares.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    env = vllm_environment(device)  # megatron ranks on a CPU want the same: one thread, no compilation
    share: float = 0
    if device == "gpu":
        share = config.gpu_share if gpus == 1 else gpus
    if cards:
        share = 0
        env |= {"CUDA_VISIBLE_DEVICES": ",".join(cards), "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
    more: dict[str, Any] = {} if concurrency is None else {"max_concurrency": concurrency}
    if node.id:
        more["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node.id, soft=False)
    return ray.remote(kind).options(num_cpus=0, num_gpus=share, runtime_env={"env_vars": env}, **more)


def make_policy(config: Config, device: str, nodes: Sequence[Node] = ()) -> PolicyGroup:
    """The policy's actors, not yet started; their logs go to run_dir/logs. Without `nodes` Ray places them."""
    run_dir, model = str(Path(config.run_dir).resolve()), str(Path(config.policy.model_path).resolve())
    config = config.model_copy(update={"policy": config.policy.model_copy(update={"model_path": model})})
    nodes = nodes or [HERE] * config.policy.parallel.world_size
    actors = [_actor(PolicyActor, config, device, node).remote(run_dir, rank) for rank, node in enumerate(nodes)]
    return PolicyGroup(actors, config, [Path(run_dir) / "logs" / f"policy-{i}.log" for i in range(len(nodes))], nodes)


def make_rollout(
    config: Config, device: str, nodes: Sequence[Node] = (), cards: Sequence[Sequence[str]] = ()
) -> RolloutPool:
    """The engines' actors, not yet started; their logs go to run_dir/logs. Without `nodes` Ray places them, and without
    the `cards` of each it gives them GPUs of their own."""
    nodes = nodes or [HERE] * config.rollout.replicas
    logs = [str(Path(config.run_dir).resolve() / "logs" / f"rollout-{i}.log") for i in range(len(nodes))]
    engines = [
        _actor(RolloutEngine, config, device, node, config.rollout.tensor_parallel, cards=mine).remote(
            str(Path(config.policy.model_path).resolve()),
            config.rollout,
            device=device,
            dtype=choose_dtype(config.policy.dtype, device),
            max_model_len=config.data.max_prompt_tokens + config.rollout.max_response_tokens,
            max_positions=config.policy.max_position_embeddings,
            seed=config.seed,
            log_path=path,
            takes_turns=config.rollout.colocated or judges_take_turns(config),
            address=node.address if os.environ.get("RAY_ADDRESS") else None,
        )
        for path, node, mine in zip(logs, nodes, cards or [()] * len(nodes), strict=True)
    ]
    return RolloutPool(engines, logs, nodes)


async def _start_genrm(
    config: Config, cluster: Cluster, stack: contextlib.AsyncExitStack, nodes: Sequence[Node]
) -> None:
    """Start our GenRM servers, one on each of `nodes`."""
    genrm, device = config.genrm, cluster.device
    if genrm.model_path is not None:  # actors have working directories of their own
        genrm = genrm.model_copy(update={"model_path": str(Path(genrm.model_path).resolve())})
    stack.push_async_callback(cluster.servers.stop)
    gpus = genrm.tensor_parallel
    shared = cluster.rollout.cards if cluster.rollout is not None and judges_take_turns(config) else []
    for index, node in enumerate(nodes):
        path = Path(config.run_dir).resolve() / "logs" / f"genrm-{index}.log"
        # Two at once, so that a stop can reach a server that is still starting.
        cards = shared[index * gpus : (index + 1) * gpus]
        kind = _actor(GenRMServer, config, device, node, gpus, concurrency=2, cards=cards)
        host = node.address if os.environ.get("RAY_ADDRESS") else "127.0.0.1"
        options = {"device": device, "dtype": choose_dtype("auto", device), "log_path": str(path), "host": host}
        cluster.servers.add(Process("genrm", index, node, path), kind.remote(genrm, **options))
    await cluster.servers.start()
