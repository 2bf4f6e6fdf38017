"""Which servers the pool has, what they said of themselves, and whether they live: the effects around `pool.py`.

Owns the HTTP session, the probes of dead servers, the pool's other members by `genrm.rendezvous`, and the requests that
are open at each server, so that those of a server that is gone can be cut short. One task looks at all of it, every
`TICK_S`. When no server answers anybody it says so, loudly, and in the end calls it a loss.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

from megatron_fapo.config.genrm import GenRMConfig
from megatron_fapo.errors import UserError
from megatron_fapo.genrm import rendezvous
from megatron_fapo.genrm.pool import ServerPool, State
from megatron_fapo.genrm.transport import Cut, FailureKind, list_models
from megatron_fapo.observe.stall import WAITS
from megatron_fapo.processes import Process, ProcessDiedError

log = logging.getLogger(__name__)

TICK_S = 0.1
"""How often due probes, silent servers and an empty pool are looked for."""
PROBE_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 30.0
"""Longer than a driver is late that begins thousands of judgements at once: its own delay is no server's fault."""
PAUSE_S, COUNTDOWN_S = 1.0, 15.0
"""After how long a pause of the scoring is announced, and how often then."""


class GenRMUnavailable(UserError):
    """The pool cannot be used as configured; says which server, why, and what to do."""


class PoolEmptyError(ProcessDiedError):
    """No GenRM server has answered anybody for genrm.pool_empty_timeout_s."""


class Membership:
    """The servers of one pool. Belongs to one event loop."""

    def __init__(
        self,
        urls: Sequence[str],
        config: GenRMConfig,
        pool: ServerPool,
        *,
        tick: Callable[[float | None], None],
        lost: Callable[[PoolEmptyError], None],
        silence_s: Callable[[], float | None],
    ) -> None:
        """
        Args:
            tick: called every TICK_S and whenever a server comes or goes, with how long no server has answered.
            lost: called with the error when that has been too long, again and again.
            silence_s: how long a server may be silent while others answer.
        """
        self._fixed, self._config, self._pool = list(urls), config, pool
        self._tick, self._lost, self._silence_s = tick, lost, silence_s
        self._context: dict[str, int | None] = {}
        self._session: aiohttp.ClientSession | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._probing: set[str] = set()
        self._open: dict[str, set[Cut]] = {}
        self._announced = 0.0

    async def check(self) -> None:
        """Opens the pool: every server must answer and list `genrm.served_model`. Waits for a judge service.

        Raises GenRMUnavailable with everything that is wrong, or RendezvousError.
        """
        problems = []
        if not self._fixed and self._config.rendezvous is None:
            problems = ["no server: set genrm.servers, genrm.urls or genrm.rendezvous, or genrm.enabled=false"]
        urls = list(self._pool.servers)
        self._connect()
        for url, models in zip(urls, await asyncio.gather(*map(self._models, urls)), strict=True):
            if isinstance(models, str):
                problems.append(f"{models}. Is the server up, and does the base URL end in /v1?")
            elif self._config.served_model not in models:
                problems.append(
                    f"{url} serves {', '.join(models) or 'nothing'} and not {self._config.served_model!r}: set "
                    "genrm.served_model to one of its names, or start it with --served-model-name"
                )
        if problems:
            raise GenRMUnavailable("the GenRM pool cannot be used:\n- " + "\n- ".join(problems))
        if self._config.rendezvous is not None:
            await self._meet()
            self._begin(self._follow(), "follow the judge service")

    def context(self, url: str) -> int | None:
        """Tokens, as the server lists it."""
        return self._context.get(url)

    def smallest_context(self) -> int | None:
        """Of the servers that say it."""
        known = [tokens for server in self._pool.present() if (tokens := self._context.get(server.url)) is not None]
        return min(known, default=None)

    @contextmanager
    def open(self, server: str, cut: Cut) -> Iterator[aiohttp.ClientSession]:
        """For the time that a request is at `server`; `cut` is used when the server leaves the pool or is silent."""
        session, cuts = self._connect(), self._open.setdefault(server, set())
        cuts.add(cut)
        try:
            yield session
        finally:
            cuts.discard(cut)

    def set_fixed(self, urls: Sequence[str]) -> None:
        """The servers beside those of the judge service are others now: one that was started again has a new URL."""
        if self._config.rendezvous is not None:
            others = [server.url for server in self._pool.present() if server.url not in self._fixed]
            self._replace([*urls, *others])
        else:
            self._replace(urls)
        self._fixed = list(urls)

    async def close(self) -> None:
        """Closes every connection."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _connect(self) -> aiohttp.ClientSession:
        if self._session is None:
            _allow_connections(len(self._pool.servers) * self._config.max_concurrent_per_server)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),  # the pool bounds concurrency; a second bound would hide it
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
                headers=_authorization(self._config.api_key_env),
            )
            self._begin(self._tend(), "watch the GenRM servers")
        return self._session

    def _begin(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_report_death)

    async def _models(self, url: str) -> dict[str, int | None] | str:
        models = await list_models(self._connect(), url, PROBE_TIMEOUT_S)
        if not isinstance(models, str):
            self._context[url] = models.get(self._config.served_model)
        return models

    async def _tend(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            for url in self._pool.servers.keys() - self._probing:
                if self._pool.probe_due(url, now):
                    self._begin(self._probe(url), f"probe {url}")
            if (limit_s := self._silence_s()) is not None:
                for url in self._pool.silent(now, limit_s):
                    self._pool.bury(url, now)
                    what = f"no answer to anybody for {limit_s:.1f} s, while others answered"
                    log.warning("%s: %s; its requests are asked again elsewhere", url, what)
                    self._cut(url, FailureKind.SILENT, what)
            self._mind_the_gap(now)

    async def _probe(self, url: str) -> None:
        self._probing.add(url)
        try:
            models = await self._models(url)
        finally:
            self._probing.discard(url)
        if url in self._pool.servers:
            answered = not isinstance(models, str) and self._config.served_model in models
            self._pool.probed(url, answered, time.monotonic())

    def _mind_the_gap(self, now: float) -> None:
        """Says for how much longer scoring is paused, and ends it."""
        since = self._pool.down_since()
        self._tick(None if since is None else now - since)
        if since is None:
            if self._announced:
                log.warning("a GenRM server answers again: scoring goes on")
            self._announced = 0.0
            return
        left_s = since + self._config.pool_empty_timeout_s - now
        # One that has just come back may be writing its first critique.
        recovering = any(server.state is State.RECOVERING and server.requests for server in self._pool.present())
        if left_s + (self._config.request_timeout_s if recovering else 0.0) <= 0:
            urls = [server.url for server in self._pool.present()]
            whom = next((WAITS.processes[url] for url in urls if url in WAITS.processes), Process("genrm", 0))
            named = ", ".join(urls) or "it has none"
            what = f"no server of the pool ({named}) has answered anybody for {now - since:.0f} s"
            self._lost(PoolEmptyError(whom, what, lost=True))
        elif now - max(self._announced, since) >= (COUNTDOWN_S if self._announced else PAUSE_S):
            self._announced = now
            states = ", ".join(f"{server.url} {server.state.value}" for server in self._pool.present()) or "none known"
            text = "NO GENRM SERVER ANSWERS: scoring is paused; in %.0f s the run ends, with everything saved (%s)"
            log.error(text, max(0.0, left_s), states)

    def _cut(self, url: str, why: FailureKind, detail: str) -> None:
        for cut in list(self._open.get(url, ())):
            cut.now(why, detail)

    async def _meet(self) -> None:
        """Waits until every server of the judge service is in the pool."""
        deadline, said = time.monotonic() + self._config.start_timeout_s, ""
        with WAITS.on("genrm.rendezvous", f"the judge service of {self._config.rendezvous}") as wait:
            while (problem := await self._look()) is not None:
                wait.detail = problem
                if time.monotonic() > deadline:
                    waited = f"waited genrm.start_timeout_s = {self._config.start_timeout_s:g} s for the judge service"
                    raise GenRMUnavailable(f"{waited}: {problem}")
                if problem != said:
                    log.info("waiting for the judge service: %s", problem)
                said = problem
                await asyncio.sleep(rendezvous.FOLLOW_S)

    async def _follow(self) -> None:
        said = None
        while True:
            await asyncio.sleep(rendezvous.FOLLOW_S)
            try:
                problem = await self._look()
            except UserError as error:  # somebody else's file must not end the run while servers answer
                problem = str(error)
            if problem != said:
                log.warning("%s", problem or "the judge service is back")
            said = problem

    async def _look(self) -> str | None:
        """Makes the servers that the rendezvous file names the pool's, beside the fixed ones. Returns what is in the
        way; raises RendezvousError."""
        # A network filesystem that hangs must not stop the loop.
        service = await asyncio.to_thread(rendezvous.read, Path(self._config.rendezvous or ""))
        problem = rendezvous.obstacle(service, time.time(), self._config)
        if service is not None and not rendezvous.is_fresh(service, time.time()):
            return problem  # it was killed, or only its file is late: the servers' own answers tell
        urls = [] if service is None else service.urls
        known = {server.url for server in self._pool.present()}
        new = [url for url in urls if url not in known]
        answers = dict(zip(new, await asyncio.gather(*map(self._models, new)), strict=True))
        silent = {url: models for url, models in answers.items() if isinstance(models, str)}
        self._replace([*self._fixed, *(url for url in urls if url not in silent)])
        return problem or next(iter(silent.values()), None)

    def _replace(self, urls: Sequence[str]) -> None:
        _allow_connections(len(urls) * self._config.max_concurrent_per_server)
        added, withdrawn = self._pool.replace(urls, time.monotonic())
        for url in withdrawn:
            self._cut(url, FailureKind.WITHDRAWN, "it has left the pool")
        if added or withdrawn:
            log.info("GenRM servers: %d joined, %d left; %d now", len(added), len(withdrawn), len(urls))
        self._mind_the_gap(time.monotonic())


def _authorization(api_key_env: str | None) -> dict[str, str]:
    if api_key_env is None:
        return {}
    if not os.environ.get(api_key_env):
        raise GenRMUnavailable(f"genrm.api_key_env names {api_key_env}, which is not set in this environment")
    return {"Authorization": f"Bearer {os.environ[api_key_env]}"}


def _allow_connections(connections: int) -> None:
    """Raises the soft limit of open files where needed: running out of it looks like every server being gone."""
    needed = connections + 512
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise GenRMUnavailable(
            f"{connections} connections to the GenRM need {needed} open files, and this machine allows {hard}: "
            "raise `ulimit -Hn`, or lower genrm.max_concurrent_per_server"
        )
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _report_death(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("%s has stopped", task.get_name(), exc_info=task.exception())
