"""`vllm-router` (PyPI) in front of a judge service's servers, for whoever wants one address.

It balances and retries by itself; here it is started, told which servers there are now, and started again when it ends.
Runs of ours ask the servers themselves: they know which one failed a verdict, and what each is doing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import aiohttp

from megatron_fapo.errors import UserError
from megatron_fapo.rollout.guard import Guard

log = logging.getLogger(__name__)

FOLLOW_S = 1.0
START_S = 120.0
ANSWER_S = 10.0
"""For the router's own API: it asks a new server for its health before it takes it."""
_LOG_BYTES = 2000


class RouterError(UserError):
    """The router did not come up; says why."""


class Router:
    """One router process on this node. Ends with its owner."""

    def __init__(self, port: int, log_path: Path) -> None:
        """Raises UserError when vllm-router is not installed or the port is taken."""
        here = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        program = shutil.which("vllm-router", path=here)
        if program is None:
            raise UserError("--router: vllm-router is not installed: pip install 'megatron-fapo[router]'")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except (OSError, OverflowError) as error:
                raise UserError(f"--router: port {port} cannot be used ({error}): choose another") from error
        self._program, self._port, self._log = program, port, log_path
        self._host = "127.0.0.1"
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: Guard | None = None

    @property
    def url(self) -> str:
        """Base URL, as the servers have one."""
        return f"http://{self._host}:{self._port}/v1"

    async def start(self, urls: Sequence[str], host: str | None = None) -> None:
        """Starts it in front of the servers with these base URLs, at least one, all of them up.

        Args:
            host: the address to serve on; None: the one before, at first 127.0.0.1.

        Raises:
            RouterError: it ended, or does not answer within START_S; nothing of it is left.
        """
        self._host = host or self._host
        process = self._process = self._spawn(urls)
        deadline = time.monotonic() + START_S
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_S)) as session:
            while await _call(session, "GET", self._api("health")) is None:
                if (code := process.poll()) is not None or time.monotonic() > deadline:
                    self.stop()
                    what = "did not answer in time" if code is None else f"ended with exit code {code}"
                    tail = self._log.read_bytes()[-_LOG_BYTES:].decode(errors="replace")
                    raise RouterError(f"vllm-router {what}; the end of its log {self._log}:\n{tail}")
                await asyncio.sleep(0.2)

    def options(self, urls: Sequence[str]) -> list[str]:
        """Its command line."""
        with socket.socket() as free:  # its metrics have a fixed port unless told otherwise, which a second one lacks
            free.bind(("127.0.0.1", 0))
            metrics_port = free.getsockname()[1]
        # It refuses power_of_two for one server.
        policy = "power_of_two" if len(urls) > 1 else "round_robin"
        return [
            *("--host", self._host, "--port", str(self._port), "--policy", policy, "--log-level", "warning"),
            *("--prometheus-port", str(metrics_port), "--health-check-interval-secs", "5"),
            *("--worker-startup-timeout-secs", str(int(ANSWER_S)), "--worker-urls", *map(_root, urls)),
        ]

    async def follow(self, urls: Callable[[], Sequence[str]]) -> None:
        """Keeps it in front of the servers that `urls` names, and alive, until cancelled."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_S)) as session:
            while True:
                await asyncio.sleep(FOLLOW_S)
                wanted = urls()
                if self._process is not None and self._process.poll() is None:
                    await self._tell(session, {_root(url) for url in wanted})
                elif wanted:
                    log.error("vllm-router has ended and is started again; its log is %s", self._log)
                    self.stop()
                    try:
                        await self.start(wanted)
                    except RouterError as error:
                        log.error("%s", error)

    def stop(self) -> None:
        """Returns when nothing of it is left."""
        process, guard = self._process, self._guard
        self._process = self._guard = None
        if process is not None:
            process.kill()
            process.wait()
        if guard is not None:
            guard.release()

    def _spawn(self, urls: Sequence[str]) -> subprocess.Popen[bytes]:
        self._guard = Guard()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as file:
            return subprocess.Popen(
                [self._program, *self.options(urls)],
                env={**os.environ, **self._guard.environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    async def _tell(self, session: aiohttp.ClientSession, wanted: set[str]) -> None:
        known = await _call(session, "GET", self._api("list_workers"))
        if known is None:
            return
        has = set(known["urls"])
        for verb, each in [*(("remove_worker", u) for u in has - wanted), *(("add_worker", u) for u in wanted - has)]:
            done = await _call(session, "POST", self._api(verb), url=each) is not None
            log.info("vllm-router: %s %s%s", verb, each, "" if done else " failed, and is tried again")

    def _api(self, verb: str) -> str:
        return f"http://{self._host}:{self._port}/{verb}"


async def _call(session: aiohttp.ClientSession, method: str, address: str, **query: str) -> dict[str, list[str]] | None:
    """What it says; None: it does not answer, or refuses."""
    try:
        async with session.request(method, address, params=query) as reply:
            if reply.status != 200:
                return None
            return await reply.json() if reply.content_type == "application/json" else {}
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        log.debug("%s: %s", address, error)
        return None


def _root(url: str) -> str:
    return url.removesuffix("/v1")
