"""`fapo genrm serve`: two runs judge through one real service that loses its server and gets it back; and who keeps the
file, with servers that are played."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_fapo.config import Config
from megatron_fapo.config.genrm import GenRMConfig
from megatron_fapo.config.reward import OverlongConfig, RewardConfig
from megatron_fapo.data.records import Verdict
from megatron_fapo.data.solutions import write_solution
from megatron_fapo.data.testbed import Problem, make_problem
from megatron_fapo.errors import UserError
from megatron_fapo.genrm import rendezvous
from megatron_fapo.genrm.client import GenRMClient
from megatron_fapo.genrm.membership import GenRMUnavailable
from megatron_fapo.genrm.reward_loop import RewardLoop
from megatron_fapo.processes import Process
from megatron_fapo.training import serve
from megatron_fapo.training import servers as servers_module
from megatron_fapo.training.servers import Servers
from tests.genrm.samples import make_sample
from tests.genrm.test_router import free_port
from tests.training.runs import FapoProcess

EXAMPLES = Path(__file__).parents[2] / "examples"
KEY = "FAPO_TEST_JUDGE_KEY"
PATIENT = {"start_timeout_s": 580.0, "deadline_s": 580.0, "request_timeout_s": 120.0, "max_attempts": 2}


def sound(problem: Problem) -> str:
    return write_solution(problem, "sound", random.Random(0)).text


async def judge_all(clients: list[GenRMClient], first: int, kill: int | None = None) -> None:
    """Each client asks for verdicts of its own, all at once; every one must come back."""
    problems = [make_problem(1, index) for index in range(first, first + 6 * len(clients))]
    asking = [
        asyncio.create_task(clients[i % len(clients)].judge(p.question, p.answer, sound(p)))
        for i, p in enumerate(problems)
    ]
    await asyncio.sleep(0.05)
    if kill is not None:
        os.kill(kill, signal.SIGKILL)
    outcomes = await asyncio.gather(*asking)
    assert [outcome for outcome in outcomes if not isinstance(outcome, Verdict)] == []


async def judge_through(router: str | None, first: int) -> None:
    """By the one address, as soon as a server is known there."""
    assert router is not None
    config = GenRMConfig(urls=[router], servers=0, api_key_env=KEY, temperature=0.0, max_tokens=256, **PATIENT)
    deadline = time.monotonic() + 300
    while True:
        client = GenRMClient([router], config)
        try:
            await client.check()
            break
        except GenRMUnavailable:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.5)
    try:
        await judge_all([client], first)
    finally:
        await client.close()


async def score_by_a_recipes_function(urls: list[str]) -> None:
    """Token ids to /generate and back, with vLLM's real answers."""
    model = str(EXAMPLES / "models" / "genrm")
    genrm = GenRMConfig(urls=urls, servers=0, model_path=model, api_key_env=KEY, **PATIENT)
    reward = RewardConfig(
        compute_score="tests.genrm.recipe_functions:by_generate", overlong=OverlongConfig(enabled=False)
    )
    sample = make_sample("\\boxed{2}")
    sample = replace(sample, prompt=replace(sample.prompt, extra_info={"split": "train", "question": "1 + 1?"}))
    async with RewardLoop(reward, genrm, urls, max_response_tokens=10) as loop:
        score = await loop.score(sample)
    (request,) = score.judging
    assert (request.outcome, score.correct) == ("answered", True)
    assert score.extra["critique_length"] == len(request.text), "its own text is what its token ids say"
    assert 0 < request.completion_tokens <= 200


@pytest.mark.timeout(1200)
def test_two_runs_share_a_service_whose_server_is_killed(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(KEY, "a secret of the service and its runs")
    path, run_dir = tmp_path / "shared" / "judges.json", tmp_path / "service"
    overrides = (f"genrm.model_path={EXAMPLES / 'models' / 'genrm'}", f"run_dir={run_dir}", f"genrm.api_key_env={KEY}")
    command = ("genrm", "serve", "-c", str(EXAMPLES / "tiny_cpu.yaml"), "--rendezvous", str(path))
    service = FapoProcess(tmp_path / "service.txt", *command, *overrides, "--router", str(free_port()))

    async def two_runs() -> None:
        config = GenRMConfig(
            servers=0, rendezvous=str(path), api_key_env=KEY, temperature=0.0, max_tokens=256, **PATIENT
        )
        clients = [GenRMClient([], config) for _ in range(2)]
        await asyncio.gather(*(client.check() for client in clients))
        try:
            met = rendezvous.read(path)
            assert met is not None
            assert (met.pid, met.served_model, met.api_key_env) == (service.process.pid, "genrm", KEY)
            with pytest.raises(GenRMUnavailable, match="HTTP 401"):
                await GenRMClient(met.urls, GenRMConfig()).check()
            await judge_all(clients, 0)
            await judge_through(met.router, 200)
            await score_by_a_recipes_function(met.urls)
            (server,) = service.pids("genrm.server_process")
            await judge_all(clients, 100, kill=server)
            again = rendezvous.read(path)
            assert again is not None
            assert again.started == met.started
            assert again.heartbeat > met.heartbeat
            assert again.urls != met.urls
            assert again.router == met.router
            await judge_through(met.router, 300)
        finally:
            for client in clients:
                await client.close()

    try:
        asyncio.run(two_runs())
        assert "genrm-0 on node" in service.output()
        assert "has ended and is started again" in service.output()
        service.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not path.exists()
        assert service.pids("genrm.server_process"), "the file goes first"
        assert service.wait(60) == 75
        assert service.wait_until_gone() == []
        assert not path.exists()
    except BaseException:
        print(service.output()[-4000:])
        raise
    finally:
        service.kill_all()


class PlayedServer:
    """An actor whose life is written down: alive so many looks, then a new address, or no other life."""

    def __init__(self, *looks: int) -> None:
        self.looks, self.lives = list(looks), 0
        self.alive, self.stop, self.start, self.cards = (
            SimpleNamespace(remote=call) for call in (self._alive, self._stop, self._start, self._cards)
        )

    async def _cards(self) -> list[str]:
        return []

    async def _alive(self) -> bool:
        self.looks[0] -= 1
        return self.looks[0] >= 0

    async def _stop(self) -> None:
        self.looks.pop(0)

    async def _start(self) -> str:
        from ray.exceptions import RayActorError

        if not self.looks:
            raise RayActorError
        await asyncio.sleep(0.1)
        self.lives += 1
        return f"life-{self.lives}"


def test_the_file_names_the_servers_that_are_up_until_the_last_is_lost(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(servers_module, "CHECK_S", 0.01)

    async def node_gone(*_: object) -> str:
        return "its node is gone"

    monkeypatch.setattr(servers_module, "how_lost", node_gone)
    monkeypatch.setattr(rendezvous, "HEARTBEAT_S", 0.02)
    path, seen = tmp_path / "judges.json", []
    monkeypatch.setattr(rendezvous, "write", lambda _, service: seen.append(service))
    ours = Servers([Process("genrm", 0), Process("genrm", 1)], [PlayedServer(20, 40), PlayedServer(60)])
    ours.up = {0: "life-0", 1: "other"}
    died = asyncio.run(serve._announce(Config(), path, SimpleNamespace(servers=ours, genrm_urls=ours.urls)))
    assert died.lost
    assert "its node is gone" in str(died)
    lists = [urls for urls, _ in itertools.groupby(service.urls for service in seen)]
    assert lists[:3] == [["life-0", "other"], ["other"], ["life-1", "other"]], "gone, and back in its place"
    assert len({service.started for service in seen}) == 1
    beats = [service.heartbeat for service in seen]
    assert beats == sorted(set(beats)), "renewed each time"


@pytest.mark.parametrize("renewed", [True, False], ids=["runs", "left behind"])
def test_a_file_that_another_service_renews_is_not_taken(tmp_path, monkeypatch, renewed) -> None:
    monkeypatch.setattr(rendezvous, "HEARTBEAT_S", 0.05)
    path = tmp_path / "judges.json"

    def write() -> None:
        now = time.time()
        rendezvous.write(path, rendezvous.Service([], "genrm", "m", now, now, "node7", 5))

    async def main() -> None:
        write()
        starting = asyncio.create_task(serve._refuse_company(path))
        await asyncio.sleep(0.05)
        if renewed:
            write()
        await starting

    if renewed:
        with pytest.raises(UserError, match=r"belongs to the judge service on node7 \(pid 5\), which runs"):
            asyncio.run(main())
    else:
        asyncio.run(main())
