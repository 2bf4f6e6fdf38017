"""Asks the GenRM pool for verdicts: deadlines, retries on another server, and no failure that counts as a verdict.

One verdict is one or more requests. A request waits, first come first served, for a server with room (`pool.py` says
which); a failed one is repeated on another server; an unreadable or cut critique is asked for once more with another
seed. The clock of `genrm.deadline_s` starts when the verdict's first request is sent: queueing behind other verdicts is
not the judge's fault. When no server has answered for `deadline_s`, whoever waits is told so.

With `genrm.rendezvous` the servers of a judge service join the pool, and leave it when the service moves: what they
were asked is then asked of the new ones.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import random
import resource
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from megatron_fapo.config.genrm import GenRMConfig
from megatron_fapo.data.paragraphs import split_paragraphs
from megatron_fapo.data.records import Verdict
from megatron_fapo.errors import UserError
from megatron_fapo.genrm import rendezvous
from megatron_fapo.genrm.counters import Counters
from megatron_fapo.genrm.pool import Effect, ServerPool, State
from megatron_fapo.genrm.prompts import CHARS_PER_TOKEN, judge_messages
from megatron_fapo.genrm.transport import Answer, Failure, FailureKind, ask, list_models
from megatron_fapo.genrm.verdict import Reason, Unscored, parse_verdict
from megatron_fapo.observe.stall import WAITS, Wait

log = logging.getLogger(__name__)

TICK_S = 0.1
"""How often due probes, ended pauses and hopeless waits are looked for."""
PROBE_TIMEOUT_S = 5.0
FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.1, 5.0
EXPECTED_CRITIQUE_TOKENS = 1024
"""Until the first critiques show their length."""

_EFFECTS = {
    FailureKind.TIMEOUT: Effect.FAILED,
    FailureKind.NO_CONNECTION: Effect.FAILED,
    FailureKind.CONNECTION: Effect.FAILED,
    FailureKind.HTTP_5XX: Effect.FAILED,
    FailureKind.BAD_BODY: Effect.FAILED,
    FailureKind.NOT_SERVED: Effect.FAILED,
    FailureKind.GONE: Effect.GONE,
    FailureKind.BUSY: Effect.BUSY,
    FailureKind.HTTP_4XX: Effect.NOTHING,
    FailureKind.CONTEXT: Effect.NOTHING,
    FailureKind.WITHDRAWN: Effect.NOTHING,
}
_COSTS_NO_ATTEMPT = {FailureKind.BUSY, FailureKind.GONE, FailureKind.NO_CONNECTION, FailureKind.WITHDRAWN}
"""No server has read the request: one such failure must not use up a verdict's attempts while a service moves. The pool
keeps away from the server for a while, and the deadline ends it."""


class GenRMUnavailable(UserError):
    """The pool cannot be used as configured; says which server, why, and what to do."""


@dataclass
class _Judgement:
    """One verdict being made."""

    messages: list[dict[str, str]]
    n_paragraphs: int | None
    seed: int
    prompt_tokens: int
    """Estimated."""
    reserved_tokens: int = 0
    """Reserved at the server that the current request was given to."""
    tried: set[str] = field(default_factory=set)
    failures: list[Failure] = field(default_factory=list)
    requests: int = 0
    name: str = ""
    wait: Wait | None = None


@dataclass
class _Waiter:
    tried: set[str]
    tokens: int
    server: asyncio.Future[str | None]
    """None: no server has answered for too long."""


@dataclass
class _Shared:
    task: asyncio.Task[Verdict | Unscored]
    waiting: int = 0


class GenRMClient:
    """Verdicts from any set of OpenAI-compatible base URLs (`http://host:port/v1`). Belongs to one event loop."""

    def __init__(self, urls: Sequence[str], config: GenRMConfig) -> None:
        self._config = config
        self._fixed = [url.rstrip("/") for url in urls]
        self._pool = ServerPool(self._fixed, config.max_concurrent_per_server)
        self._context: dict[str, int | None] = {}
        self._waiters: deque[_Waiter] = deque()
        self._shared: dict[str, _Shared] = {}
        self._counters = Counters()
        self._critique_tokens = float(EXPECTED_CRITIQUE_TOKENS)
        self._session: aiohttp.ClientSession | None = None
        self._tending: dict[str, asyncio.Task[None]] = {}
        self._cuts: dict[str, set[asyncio.Timeout]] = {}
        """Server -> its open requests."""

    async def check(self) -> None:
        """Opens the pool: every server must answer and list `genrm.served_model`. Waits for a judge service.

        Raises GenRMUnavailable with everything that is wrong, or RendezvousError, and closes what it opened.
        """
        problems = []
        if not self._fixed and self._config.rendezvous is None:
            problems = ["no server: set genrm.servers, genrm.urls or genrm.rendezvous, or genrm.enabled=false"]
        try:
            session = self._open()
            urls = list(self._pool.servers)
            for url, models in zip(
                urls, await asyncio.gather(*(self._models(session, url) for url in urls)), strict=True
            ):
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
                self._start(self._config.rendezvous, self._follow())
        except BaseException:
            await self.close()
            raise

    async def judge(
        self, question: str, ground_truth: str, solution: str, vote: int = 0, name: str = ""
    ) -> Verdict | Unscored:
        """The verdict of one right answer. Identical judgements within a step share one; failures are not kept.

        Judgements that differ in `vote` alone are different ones, with seeds of their own. `name` is the sample's, for
        whoever asks what the driver waits for.
        """
        again = (str(vote),) if vote else ()
        key = _content_key(self._config.prompt_form, question, ground_truth, solution, *again)
        shared = self._shared.get(key)
        if shared is None:
            judgement = self._prepare(key, question, ground_truth, solution)
            judgement.name = name
            shared = self._shared[key] = _Shared(asyncio.create_task(self._judge(judgement), name="genrm judgement"))
        else:
            self._counters.add("shared")
        shared.waiting += 1
        kept = False
        try:
            outcome = await asyncio.shield(shared.task)
            kept = isinstance(outcome, Verdict)
            return outcome
        finally:
            shared.waiting -= 1
            abandoned = shared.waiting == 0 and not shared.task.done()
            if (abandoned or (shared.task.done() and not kept)) and self._shared.get(key) is shared:
                del self._shared[key]
            if abandoned:
                shared.task.cancel()
                await asyncio.wait([shared.task])

    def begin_step(self) -> None:
        """Forgets finished judgements and starts the metrics anew."""
        self._shared = {key: shared for key, shared in self._shared.items() if not shared.task.done()}
        self._counters.clear()

    def metrics(self) -> dict[str, float]:
        """`genrm/...` since the step began; docs/genrm.md lists them."""
        counts = self._counters.counts
        values = dict.fromkeys(("genrm/called", "genrm/answered", "genrm/unscored", "genrm/retries"), 0.0)
        values |= self._counters.metrics("genrm")
        values["genrm/completion_tokens_mean"] = counts["completion_tokens"] / max(1, counts["answered"])
        servers = self._pool.present()
        values["genrm/servers_alive"] = float(sum(server.down_since is None for server in servers))
        values["genrm/servers_down"] = float(sum(server.down_since is not None for server in servers))
        return values

    async def close(self) -> None:
        """Cancels what is under way and closes every connection."""
        tasks = [*self._tending.values(), *(shared.task for shared in self._shared.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tending, self._shared = {}, {}
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            _allow_connections(len(self._pool.servers) * self._config.max_concurrent_per_server)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),  # the pool bounds concurrency; a second bound would hide it
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=PROBE_TIMEOUT_S),
                headers=_authorization(self._config.api_key_env),
            )
            for url in self._pool.servers:
                self._start(url, self._tend(url))
        return self._session

    def _start(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = self._tending[name] = asyncio.create_task(work, name=f"tend {name}")
        task.add_done_callback(_report_death)

    async def _models(self, session: aiohttp.ClientSession, url: str) -> dict[str, int | None] | str:
        models = await list_models(session, url, PROBE_TIMEOUT_S)
        if not isinstance(models, str):
            self._context[url] = models.get(self._config.served_model)
        return models

    async def _tend(self, url: str) -> None:
        session = self._open()
        while True:
            await asyncio.sleep(TICK_S)
            if self._pool.probe_due(url, _now()):
                models = await self._models(session, url)
                self._pool.probed(url, not isinstance(models, str) and self._config.served_model in models, _now())
            self._end_hopeless_waits()
            self._dispatch()

    def _end_hopeless_waits(self) -> None:
        down_since = self._pool.down_since()
        if down_since is not None and _now() - down_since > self._config.deadline_s:
            while self._waiters:
                _settle(self._waiters.popleft().server, None)

    async def _meet(self) -> None:
        """Waits until every server of the judge service is in the pool."""
        deadline, said = _now() + self._config.start_timeout_s, ""
        with WAITS.on("genrm.rendezvous", f"the judge service of {self._config.rendezvous}") as wait:
            while (problem := await self._look()) is not None:
                wait.detail = problem
                if _now() > deadline:
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
            self._end_hopeless_waits()  # nobody tends an empty pool

    async def _look(self) -> str | None:
        """Makes the servers that the rendezvous file names the pool's, beside the fixed ones. Returns what is in the
        way; raises RendezvousError."""
        session = self._open()
        # A network filesystem that hangs must not stop the loop.
        service = await asyncio.to_thread(rendezvous.read, Path(self._config.rendezvous or ""))
        problem = rendezvous.obstacle(service, time.time(), self._config)
        if service is not None and not rendezvous.is_fresh(service, time.time()):
            return problem  # it was killed, or only its file is late: the servers' own answers tell
        urls = [] if service is None else service.urls
        known = {server.url for server in self._pool.present()}
        new = [url for url in urls if url not in known]
        answers = dict(zip(new, await asyncio.gather(*(self._models(session, url) for url in new)), strict=True))
        silent = {url: models for url, models in answers.items() if isinstance(models, str)}
        self._replace([*self._fixed, *(url for url in urls if url not in silent)])
        return problem or next(iter(silent.values()), None)

    def _replace(self, urls: list[str]) -> None:
        _allow_connections(len(urls) * self._config.max_concurrent_per_server)
        added, withdrawn = self._pool.replace(urls, _now())
        for url in withdrawn:
            self._tending.pop(url).cancel()
            for cut in self._cuts.pop(url, ()):
                cut.reschedule(0)
        for url in added:
            self._start(url, self._tend(url))
        if added or withdrawn:
            log.info("GenRM servers: %d joined, %d left; %d now", len(added), len(withdrawn), len(urls))
        self._dispatch()

    def _prepare(self, key: str, question: str, ground_truth: str, solution: str) -> _Judgement:
        messages = judge_messages(question, ground_truth, solution, self._config.prompt_form)
        return _Judgement(
            messages=messages,
            n_paragraphs=len(split_paragraphs(solution)) if self._config.prompt_form == "tagged" else None,
            seed=int(key[:7], 16),  # from the content: a resumed run asks the same again
            prompt_tokens=int(len(messages[0]["content"]) / CHARS_PER_TOKEN) + 64,
        )

    async def _judge(self, judgement: _Judgement) -> Verdict | Unscored:
        with WAITS.on("genrm.verdict", "a GenRM server with room", judgement.name) as judgement.wait:
            return await self._judged(judgement)

    async def _judged(self, judgement: _Judgement) -> Verdict | Unscored:
        self._counters.add("called")
        server = await self._acquire(judgement, retry=False)
        started = _now()
        outcome: Verdict | Unscored
        try:
            async with asyncio.timeout(self._config.deadline_s):
                outcome = await self._attempts(judgement, server, started)
        except TimeoutError:
            outcome = _unscored(Reason.GENRM_DEADLINE, f"no verdict within {self._config.deadline_s:g} s", judgement)
        if isinstance(outcome, Verdict):
            self._counters.add("answered")
            self._counters.observe("latency", outcome.latency_s)
        else:
            self._counters.add("unscored")
            log.debug("unscored: %s: %s", outcome.reason, outcome.detail)
        return outcome

    async def _attempts(self, judgement: _Judgement, server: str | None, started: float) -> Verdict | Unscored:
        attempts, resampled = 0, False
        while server is not None:
            outcome = await self._request(server, judgement)
            attempts += not (isinstance(outcome, Failure) and outcome.kind in _COSTS_NO_ATTEMPT)
            last = attempts >= self._config.max_attempts
            if isinstance(outcome, Answer):
                index = parse_verdict(outcome.critique, outcome.finish_reason, judgement.n_paragraphs)
                if isinstance(index, int):
                    taken_s = _now() - started
                    return Verdict(
                        index, outcome.critique, server, taken_s, judgement.requests, outcome.completion_tokens
                    )
                self._counters.add(index.removeprefix("genrm_"))
                if resampled or last or self._config.temperature == 0:  # greedy: the same critique would come again
                    return Unscored(index, f"critique ends: {outcome.critique[-200:]!r}")
                resampled, judgement.seed = True, judgement.seed + 1
            elif outcome.kind is FailureKind.CONTEXT:
                return Unscored(Reason.GENRM_CONTEXT, outcome.detail)
            else:
                judgement.tried.add(server)
                judgement.failures.append(outcome)
                if last:
                    refused = all(failure.kind is FailureKind.HTTP_4XX for failure in judgement.failures)
                    reason = Reason.GENRM_REFUSED if refused else Reason.GENRM_UNREACHABLE
                    return _unscored(reason, f"no answer in {judgement.requests} requests", judgement)
                backoff_s = min(FIRST_BACKOFF_S * 2 ** len(judgement.failures), LAST_BACKOFF_S)
                await asyncio.sleep(random.uniform(0.5, 1.0) * backoff_s)
            server = await self._acquire(judgement, retry=True)
        detail = f"no server has answered anybody for {self._config.deadline_s:g} s"
        return _unscored(Reason.GENRM_UNREACHABLE, detail, judgement)

    async def _request(self, server: str, judgement: _Judgement) -> Answer | Failure:
        """One critique from `server`, in the room that its context leaves. Gives back what `_acquire` took."""
        config, context = self._config, self._context.get(server)
        body: dict[str, Any] = {
            "model": config.served_model,
            "messages": judgement.messages,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "seed": judgement.seed,
        }
        effect, busy_for_s = Effect.NOTHING, 0.0
        try:
            outcome: Answer | Failure | None = None
            if context is None or judgement.prompt_tokens + config.max_tokens <= context:
                outcome = await self._send(server, judgement, body | {"max_tokens": config.max_tokens})
            if outcome is None or (isinstance(outcome, Failure) and outcome.kind is FailureKind.CONTEXT):
                # Without max_tokens a server grants all the room that its own token count leaves.
                outcome = await self._send(server, judgement, body)
                if isinstance(outcome, Answer) and outcome.finish_reason == "length":
                    outcome = Failure(FailureKind.CONTEXT, f"the context left {outcome.completion_tokens} tokens")
            if isinstance(outcome, Failure):
                effect, busy_for_s = _EFFECTS[outcome.kind], outcome.busy_for_s
            else:
                effect = Effect.ANSWERED
                self._counters.add("completion_tokens", outcome.completion_tokens)
                self._critique_tokens += 0.05 * (outcome.completion_tokens - self._critique_tokens)
            return outcome
        finally:
            self._pool.end(server, judgement.reserved_tokens, effect, _now(), busy_for_s)
            self._dispatch()

    async def _send(self, server: str, judgement: _Judgement, body: dict[str, Any]) -> Answer | Failure:
        judgement.requests += 1
        if judgement.wait is not None:
            judgement.wait.whom, judgement.wait.detail = server, f"{judgement.name}, attempt {judgement.requests}"
        self._counters.add("requests")
        if judgement.requests > 1:
            self._counters.add("retries")
        outcome: Answer | Failure = Failure(FailureKind.WITHDRAWN, "the judge service has moved")
        cut, cuts = asyncio.timeout(None), self._cuts.setdefault(server, set())
        if self._pool.servers[server].state is not State.WITHDRAWN:
            try:
                async with cut:
                    cuts.add(cut)
                    outcome = await ask(self._open(), server, body, self._config.request_timeout_s)
            except TimeoutError:
                log.debug("cut short: %s has left the pool", server)
            finally:
                cuts.discard(cut)
        if isinstance(outcome, Failure):
            self._counters.add(f"failed/{outcome.kind}")
        return outcome

    async def _acquire(self, judgement: _Judgement, retry: bool) -> str | None:
        """A server with a place reserved for this judgement, in order of arrival; retries come first."""
        judgement.reserved_tokens = judgement.prompt_tokens + int(self._critique_tokens)
        waiter = _Waiter(judgement.tried, judgement.reserved_tokens, asyncio.get_running_loop().create_future())
        (self._waiters.appendleft if retry else self._waiters.append)(waiter)
        self._dispatch()
        try:
            return await waiter.server
        except asyncio.CancelledError:
            # Cancelled between being given a place and taking it: an unreturned place would be lost for the whole run.
            if waiter.server.done() and not waiter.server.cancelled() and (server := waiter.server.result()):
                self._pool.end(server, waiter.tokens, Effect.NOTHING, _now())
                self._dispatch()
            raise

    def _dispatch(self) -> None:
        """Gives free places to those who wait; whoever waits for another server than the free one lets others pass."""
        passed: list[_Waiter] = []
        now = _now()
        while self._waiters and self._pool.has_room(now):
            waiter = self._waiters.popleft()
            if waiter.server.done():
                continue
            server = self._pool.choose(waiter.tried, now)
            if server is None:
                passed.append(waiter)
                continue
            self._pool.begin(server, waiter.tokens)
            waiter.server.set_result(server)
        self._waiters.extendleft(reversed(passed))


def _unscored(reason: Reason, what: str, judgement: _Judgement) -> Unscored:
    last = [f"{failure.kind}: {failure.detail}" for failure in judgement.failures[-3:]]
    return Unscored(reason, "; ".join([what, *last]))


def _content_key(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode("utf-8", errors="surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()


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
        log.error("%s has stopped; servers are no longer watched", task.get_name(), exc_info=task.exception())


def _settle(future: asyncio.Future[str | None], value: str | None) -> None:
    if not future.done():
        future.set_result(value)


def _now() -> float:
    return time.monotonic()
