"""The systems under test: each takes a problem and returns what a training run would have made of it."""

from __future__ import annotations

import abc
import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import aiohttp
import psutil

from benchmarks.judges.peers import peer_binaries
from benchmarks.judges.problems import Problem
from megatron_fapo.config.genrm import GenRMConfig
from megatron_fapo.data.records import Verdict
from megatron_fapo.genrm.client import GenRMClient
from megatron_fapo.genrm.rules import last_boxed

REQUEST_OF_P50, DEADLINE_OF_P50 = 40, 240
"""Time-outs of one request and of one verdict: 10 s and 60 s here; of a real pool 15 and 94 minutes."""
LEAST_REQUEST_S, LEAST_DEADLINE_S = 2.0, 20.0
"""On a smaller scale still, a busy machine would be what is timed."""


@dataclass(frozen=True)
class Setting:
    p50_s: float
    slots: int
    """Of each server; we keep up to twice as many at one, so that it never waits for us."""
    max_tokens: int = 16384

    @property
    def request_timeout_s(self) -> float:
        return max(LEAST_REQUEST_S, REQUEST_OF_P50 * self.p50_s)

    @property
    def deadline_s(self) -> float:
        return max(LEAST_DEADLINE_S, DEADLINE_OF_P50 * self.p50_s)


class System(Protocol):
    """`flawed` is the score that the sample gets: True, False, or None for none at all."""

    name: str
    notes: dict[str, float]
    """Counts of its own, for whoever asks why."""

    async def open(self, urls: list[str]) -> None: ...
    async def flawed(self, problem: Problem) -> bool | None: ...
    async def close(self) -> None: ...
    def router_cpu_s(self) -> float: ...


class MegatronFapo:
    """Our client, straight to the servers."""

    name = "megatron_fapo"

    def __init__(self, setting: Setting, **fields: Any) -> None:
        self._config = GenRMConfig.model_validate(
            {
                "max_concurrent_per_server": 2 * setting.slots,
                "request_timeout_s": setting.request_timeout_s,
                "deadline_s": setting.deadline_s,
                "max_tokens": setting.max_tokens,
                **fields,
            }
        )
        self.notes: dict[str, float] = {}

    async def open(self, urls: list[str]) -> None:
        self._client = GenRMClient([f"{url}/v1" for url in urls], self._config)
        await self._client.check()

    async def flawed(self, problem: Problem) -> bool | None:
        outcome = await self._client.judge(problem.question, problem.ground_truth, problem.solution)
        if isinstance(outcome, Verdict):
            return outcome.flawed
        self.notes[f"unscored/{outcome.reason}"] = self.notes.get(f"unscored/{outcome.reason}", 0) + 1
        return None

    async def close(self) -> None:
        self.notes |= {name: round(value, 4) for name, value in self._client.metrics().items() if value}
        await self._client.close()

    def router_cpu_s(self) -> float:
        return 0.0


TEMPLATE = (
    "The following is a math problem with its ground truth answer, along with an AI solution (split into steps):\n\n"
    "[Math Problem]\n\n{}\n\n[Ground Truth]\n\n{}\n\n[AI Solution]\n\n{}\n\n"
    "Review the solution step by step and put the index of the step with the earliest error, or -1, in \\boxed{{}}."
)


class BehindRouter(abc.ABC):
    """A router, and before it a reward function that does what FAPO's published one does.

    For each verdict a session of its own; one attempt; an answer that cannot be read, whatever its HTTP status, counts
    as sound. There, an exception ends the run; here it only costs the sample its score.
    """

    def __init__(self, name: str, setting: Setting, timeout_s: float | None) -> None:
        self.name, self._setting, self._timeout_s = name, setting, timeout_s
        self._router: subprocess.Popen[str] | None = None
        self._url = ""
        self.notes: dict[str, float] = {}

    @abc.abstractmethod
    def _command(self, port: int, urls: list[str]) -> list[str]:
        """That starts the router on `port`, before the servers at `urls`."""

    async def open(self, urls: list[str]) -> None:
        self.notes = {}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        with tempfile.TemporaryFile("w+") as log:
            self._router = _start(self._command(port, urls), log)
            if not await _answers(f"{self._url}/v1/models", self._router):
                log.seek(0)
                raise RuntimeError(f"{self.name} does not answer; the end of its log:\n{log.read()[-2000:]}")

    async def flawed(self, problem: Problem) -> bool | None:
        text = TEMPLATE.format(problem.question, problem.ground_truth, problem.solution)
        body: dict[str, Any] = {"model": "genrm", "messages": [{"role": "user", "content": text}]}
        body |= {"max_tokens": self._setting.max_tokens}
        try:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self._timeout_s)) as session:
                async with session.post(f"{self._url}/v1/chat/completions", json=body) as response:
                    answer = await response.text()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self._note(type(error).__name__)
            return None
        try:
            boxed = last_boxed(json.loads(answer)["choices"][0]["message"]["content"])
            return int(boxed or "") != -1
        except (ValueError, KeyError, IndexError, TypeError):
            self._note(f"unreadable, HTTP {response.status}")
            return False

    def _note(self, what: str) -> None:
        self.notes[what] = self.notes.get(what, 0) + 1

    async def close(self) -> None:
        if self._router is not None:
            _end(self._router)

    def router_cpu_s(self) -> float:
        return 0.0 if self._router is None else cpu_s(self._router)


class NaiveRouter(BehindRouter):
    """verl's, as verl starts it: least outstanding requests, three attempts at the same server 2 and 4 s apart."""

    def __init__(self, setting: Setting) -> None:
        super().__init__("verl_naive_router", setting, timeout_s=None)

    def _command(self, port: int, urls: list[str]) -> list[str]:
        return [str(peer_binaries() / "python"), "naive_router.py", str(port), *urls]


class VllmRouter(BehindRouter):
    """vllm-router as a careful user would set it: time-outs, retries elsewhere, quick health checks and breakers."""

    OPTIONS = {
        "policy": "power_of_two",
        "retry-max-retries": 5,
        "health-check-interval-secs": 1,
        "health-check-timeout-secs": 1,
        "health-failure-threshold": 2,
        "health-success-threshold": 1,
        "cb-failure-threshold": 3,
        "cb-success-threshold": 1,
        "cb-timeout-duration-secs": 2,
        "worker-startup-check-interval": 1,
        "log-level": "error",
    }

    def __init__(self, setting: Setting) -> None:
        super().__init__("vllm_router", setting, timeout_s=setting.deadline_s)

    def _command(self, port: int, urls: list[str]) -> list[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            metrics_port = probe.getsockname()[1]
        options = (self.OPTIONS if len(urls) > 1 else self.OPTIONS | {"policy": "round_robin"}) | {
            "request-timeout-secs": max(1, round(self._setting.request_timeout_s)),
            "prometheus-port": metrics_port,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [str(peer_binaries() / "vllm-router"), "--port", str(port), "--worker-urls", *urls, *words]


SYSTEMS = ("megatron_fapo", "verl_naive_router", "vllm_router")


def make_system(name: str, setting: Setting) -> System:
    if name == "megatron_fapo":
        return MegatronFapo(setting)
    return NaiveRouter(setting) if name == "verl_naive_router" else VllmRouter(setting)


def _start(command: list[str], log: IO[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=log, stderr=log, text=True, cwd=Path(__file__).parent)


async def _answers(url: str, process: subprocess.Popen[str], within_s: float = 90.0) -> bool:
    """Waits until `url` answers with HTTP 200; False: it did not in time, or its process ended."""
    deadline = time.monotonic() + within_s
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                async with session.get(url) as response:
                    if response.status == 200:
                        return True
            except (aiohttp.ClientError, TimeoutError):
                pass  # not up yet
            await asyncio.sleep(0.1)
    return False


def cpu_s(process: subprocess.Popen[Any]) -> float:
    """CPU time that a process has used; 0 once it is gone."""
    try:
        times = psutil.Process(process.pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


class Servers:
    """Four simulated judges in processes of their own."""

    def __init__(self, count: int, slots: int) -> None:
        self._slots = slots
        self._processes = [self._start(index, 0) for index in range(count)]
        self._ports = [_port(process) for process in self._processes]
        self._gone_cpu_s = 0.0

    def _start(self, index: int, port: int) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "benchmarks.judges.server", str(index), str(self._slots), str(port)]
        return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self._ports]

    async def set_case(self, name: str, seed: int, p50_s: float, hang_after: int | None = None) -> None:
        """`hang_after`: the first server answers so many requests and then no more."""
        async with aiohttp.ClientSession() as session:
            for index, url in enumerate(self.urls):
                hangs = hang_after if index == 0 else None
                case = {"name": name, "seed": seed, "p50_s": p50_s, "hang_after": hangs}
                async with session.post(f"{url}/case", json=case) as response:
                    response.raise_for_status()
        self._case = case

    async def requests(self) -> int:
        """Since the case began, without those that a server had before it was killed."""
        return sum([await self._requests(url) for url in self.urls])

    async def _requests(self, url: str) -> int:
        async with aiohttp.ClientSession() as session, session.get(f"{url}/stats") as response:
            return int((await response.json())["requests"])

    def kill_first(self) -> None:
        self._gone_cpu_s += cpu_s(self._processes[0])
        _end(self._processes[0])

    async def restart_first(self) -> None:
        process = self._processes[0] = self._start(0, self._ports[0])
        await asyncio.to_thread(_port, process)
        async with aiohttp.ClientSession() as session:
            async with session.post(f"{self.urls[0]}/case", json=self._case) as response:
                response.raise_for_status()

    def cpu_s(self) -> float:
        return self._gone_cpu_s + sum(map(cpu_s, self._processes))

    def close(self) -> None:
        for process in self._processes:
            _end(process)


def _port(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
