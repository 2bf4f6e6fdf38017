"""Processes that are lost, and what is said of them. Those of real runs: test_end_to_end.py and tests/slurm."""

from __future__ import annotations

import asyncio
import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from megatron_fapo.config.cluster import ClusterConfig
from megatron_fapo.config.root import Config
from megatron_fapo.errors import UserError
from megatron_fapo.genrm.server import ServerStartError
from megatron_fapo.observe.stall import WAITS
from megatron_fapo.policy.group import PolicyGroup
from megatron_fapo.processes import Node, Process, ProcessDiedError, is_lost
from megatron_fapo.rollout.engine import MEMORY
from megatron_fapo.rollout.pool import RolloutPool
from megatron_fapo.rollout.refitted import VLLMDiedError
from megatron_fapo.training import servers as servers_module
from megatron_fapo.training.cluster import Cluster, _await_nodes
from megatron_fapo.training.failure import forget_failure, report_failure
from megatron_fapo.training.servers import ServerDiedError, Servers, start_server


@pytest.mark.parametrize(("lost", "code"), [(True, 76), (False, 1)])
def test_a_failure_is_left_for_whoever_started_the_run(tmp_path: Path, lost: bool, code: int) -> None:
    log = tmp_path / "rollout-3.log"
    log.write_text("".join(f"line {i}\n" for i in range(100)))
    process = Process("rollout", 3, Node("id", "10.0.0.7", 2, name="gpu-07"), log, 123)
    error = ProcessDiedError(process, "its process is gone", lost=lost, detail="killed by signal 9")
    first, *others = str(error).splitlines()
    assert first == "rollout-3 on node gpu-07 (10.0.0.7, pid 123): its process is gone"
    assert others[:2] == ["killed by signal 9", f"the end of {log}:"]
    assert (others[2], others[-1], len(others)) == ("line 70", "line 99", 32)
    assert report_failure(tmp_path, error, 5) == code
    written = json.loads((tmp_path / "failure.json").read_text())
    assert written.pop("time") > 0
    assert written == {
        "role": "rollout", "rank": 3, "node": "gpu-07", "node_index": 2, "address": "10.0.0.7",
        "what": "its process is gone", "log_path": str(log), "exit_code": code, "step": 5,
    }  # fmt: skip
    forget_failure(tmp_path)
    assert not (tmp_path / "failure.json").exists()


def test_an_error_of_the_driver_is_its_own(tmp_path: Path) -> None:
    assert report_failure(tmp_path, KeyError("x"), 0) == 1
    written = json.loads((tmp_path / "failure.json").read_text())
    assert (written["role"], written["what"]) == ("driver", "KeyError: 'x'")


def test_a_constructor_that_raises_is_code_that_failed() -> None:
    raised = RayTaskError("__init__", "Traceback: KeyError", KeyError("x"), actor_id="a")
    assert not is_lost(ActorDiedError(raised))
    assert is_lost(ActorDiedError())


def test_nodes_that_are_missing_are_named_while_they_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "there")
    monkeypatch.setattr("ray.nodes", list)

    async def scenario() -> None:
        config = ClusterConfig(train_nodes=1, rollout_nodes=1, start_timeout_s=0.6)
        task = asyncio.create_task(_await_nodes(config))
        await asyncio.sleep(0.1)
        assert any("missing nodes 0 (train), 1 (rollout)" in line for line in WAITS.lines())
        with pytest.raises(ProcessDiedError, match=r"has not joined Ray .* missing nodes: 0 \(train\), 1 \(rollout\)"):
            await task

    asyncio.run(scenario())


class FakeServer:
    """As much of a GenRMServer actor as who keeps it asks: alive or not, and what a new start gives."""

    def __init__(self, alive: Any, *starts: Any) -> None:
        self.answer, self.starts = alive, list(starts)
        self.alive, self.stop, self.start, self.cards = (
            SimpleNamespace(remote=do) for do in (self._alive, self._stop, self._start, self._cards)
        )

    async def remote(self, *_: Any) -> Any:
        return await self._alive()

    async def _alive(self) -> Any:
        if self.answer is None:
            await asyncio.Event().wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def _stop(self) -> None:
        pass

    async def _cards(self) -> list[str]:
        return []

    async def _start(self) -> str:
        start = self.starts.pop(0)
        if isinstance(start, Exception):
            raise start
        self.answer = True
        return str(start)


def cluster_of(*actors: FakeServer, **genrm: Any) -> Cluster:
    places = [Process("genrm", rank, Node("x", f"10.0.0.{rank}", rank, name=f"gpu-{rank}")) for rank in range(9)]
    servers = Servers(places[: len(actors)], list(actors), {rank: f"url-{rank}" for rank in range(len(actors))})
    return Cluster(Config.model_validate({"genrm": genrm}), "cpu", servers=servers)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers_module, "CHECK_S", 0.01)
    monkeypatch.setattr(servers_module, "ALIVE_S", 0.05)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("lost", [True, False])
def test_an_engine_that_is_lost_while_half_awake_does_not_keep_the_policy_from_saving(lost: bool) -> None:
    """It was lost in a refit, when the weights alone were awake; its neighbour takes its turn all the same."""
    said: list[str] = []

    def engine(name: str, error: Exception | None) -> Any:
        async def call(order: str) -> None:
            await asyncio.sleep(0 if error else 0.05)
            said.append(f"{name} {order}")
            if error:
                raise error

        orders = ("sleep", "wake")
        return SimpleNamespace(**{o: SimpleNamespace(remote=lambda *_, o=o: call(o)) for o in orders})

    async def enter(phase: str) -> dict[str, float]:
        said.append(phase)
        return {}

    error = RayTaskError("wake", "Traceback", VLLMDiedError("gone") if lost else KeyError("x"))
    pool = RolloutPool([engine("first", error), engine("second", None)], [None, None])
    config = Config.model_validate({"rollout": {"colocated": True, "replicas": 2}, "policy": {"offload": True}})
    policy: Any = SimpleNamespace(enter=enter)
    cluster = Cluster(config, "cpu", policy=policy, rollout=pool, awake=MEMORY[:1])
    if lost:
        asyncio.run(cluster.enter("checkpoint"))
        assert said == ["rollout", "first wake", "second wake", "first sleep", "second sleep", "checkpoint"]
    else:
        with pytest.raises(ProcessDiedError, match="failed: KeyError"):
            asyncio.run(cluster.enter("checkpoint"))
        assert said == ["rollout", "first wake", "second wake"], "it has not fallen asleep"


def test_a_server_that_ends_is_started_again_and_the_pool_is_told() -> None:
    async def scenario() -> None:
        mortal = FakeServer(True, "second-life", "third-life")
        cluster, told = cluster_of(FakeServer(True), mortal, urls=["http://there/v1"]), []
        cluster.servers.keep(lambda: told.append(cluster.genrm_urls))
        for _ in range(2):
            count = len(told)
            mortal.answer = False
            await until(lambda count=count: len(told) == count + 2)
        outside = "http://there/v1"
        ours = [["url-0"], ["url-0", "second-life"], ["url-0"], ["url-0", "third-life"]]
        assert told == [[*urls, outside] for urls in ours]
        cluster.require_servers(all_of_them=True)
        mortal.answer = False  # a third short life in a row
        await until(lambda: bool(cluster.servers.lost()))
        cluster.require_servers()  # the pool has others
        with pytest.raises(ServerDiedError, match=r"genrm-1 on node gpu-1 \(10.0.0.1\): it has ended") as death:
            cluster.require_servers(all_of_them=True)
        assert death.value.lost

    asyncio.run(scenario())


NEVER_UP = RayTaskError("start", "tb", ServerStartError("its last words", lost=False))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("actor", "words"),
    [
        (FakeServer(None), "has not answered for 0.05 s"),
        (FakeServer(RuntimeError("broken")), "failed\nbroken"),
        (
            FakeServer(False, RayTaskError("start", "tb", ServerStartError("its last words", lost=False))),
            "did not start",
        ),
    ],
)
def test_a_server_that_cannot_be_started_again_is_lost_and_the_last_one_ends_the_run(
    actor: FakeServer, words: str
) -> None:
    async def scenario() -> None:
        last = FakeServer(True)
        cluster = cluster_of(last, actor)
        cluster.servers.keep(lambda: None)
        await until(lambda: len(cluster.servers.lost()) == 1)
        assert words in str(cluster.servers.lost()[0])
        assert cluster.genrm_urls == ["url-0"]
        cluster.require_servers()  # a pool that shrinks goes on
        last.answer = None
        await until(lambda: len(cluster.servers.lost()) == 2)
        with pytest.raises(ServerDiedError):
            cluster.require_servers()

    asyncio.run(scenario())


@pytest.mark.usefixtures("quick")
def test_servers_that_take_turns_are_not_started_again() -> None:
    async def scenario() -> None:
        cluster = cluster_of(FakeServer(True), FakeServer(False, "again"), colocated=True, model_path="judge")
        cluster.servers.keep(lambda: None, restart=False)
        await until(lambda: bool(cluster.servers.lost()))
        with pytest.raises(ServerDiedError, match=r"genrm-1 .*: it has ended"):
            cluster.require_servers()

    asyncio.run(scenario())


def test_ranks_and_engines_that_are_not_up_in_time_are_worth_another_attempt(tmp_path: Path) -> None:
    never = FakeServer(None)
    group = PolicyGroup([SimpleNamespace(address=never)], Config(), [tmp_path / "policy-0.log"])
    pool = RolloutPool([SimpleNamespace(start=never)], [None])

    async def scenario() -> None:
        with pytest.raises(ProcessDiedError, match=r"were not up within 0.05 s") as death:
            await group.start(device="cpu", dtype="float32", timeout_s=0.05)
        assert death.value.lost
        with pytest.raises(ProcessDiedError, match=r"did not answer within 0.05 s") as death:
            await pool.start(timeout_s=0.05)
        assert death.value.lost

    asyncio.run(scenario())


def test_servers_that_hang_are_stopped_together(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[Any] = []
    monkeypatch.setattr("ray.kill", killed.append)
    monkeypatch.setattr(servers_module, "STOP_S", 0.3)
    servers = [SimpleNamespace(stop=FakeServer(answer)) for answer in (None, True, None, RuntimeError("gone"), None)]
    began = time.monotonic()
    asyncio.run(Servers(actors=servers).stop())
    assert time.monotonic() - began < 0.9, "one wait for all, not one for each"
    assert killed == servers
    asyncio.run(Servers().stop())


@pytest.mark.parametrize("lost", [True, False])
def test_a_server_that_does_not_start_is_a_process_that_died_and_bad_input_stays_bad_input(lost: bool) -> None:
    class Starting:
        def __init__(self, cause: Exception) -> None:
            self.start, self.cause = self, cause

        async def remote(self) -> str:
            raise RayTaskError("start", "Traceback", pickle.loads(pickle.dumps(self.cause)))

    with pytest.raises(ServerDiedError, match=r"genrm-2 .*: did not start\nits last words") as death:
        asyncio.run(start_server(Process("genrm", 2), Starting(ServerStartError("its last words", lost=lost))))
    assert death.value.lost is lost
    with pytest.raises(UserError, match="no model"):
        asyncio.run(start_server(Process("genrm", 2), Starting(UserError("no model"))))


@pytest.mark.usefixtures("quick")
def test_work_goes_on_while_a_server_is_left_and_ends_with_the_last() -> None:
    async def scenario() -> None:
        servers = [FakeServer(True), FakeServer(None)]
        cluster = cluster_of(*servers)
        cluster.servers.keep(lambda: None)
        cancelled = False

        async def work(seconds: float) -> str:
            nonlocal cancelled
            try:
                await asyncio.sleep(seconds)
            except asyncio.CancelledError:
                cancelled = True
                raise
            return "done"

        assert await cluster.while_judged(work(0.3)) == "done"
        asyncio.get_running_loop().call_later(0.1, setattr, servers[0], "answer", None)
        with pytest.raises(ServerDiedError, match=r"genrm-0 .*: has not answered"):
            await cluster.while_judged(work(60))
        assert cancelled

    asyncio.run(scenario())
