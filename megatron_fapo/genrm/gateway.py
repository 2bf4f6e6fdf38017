"""What a user's compute_score gets as `reward_router_address`: an HTTP server in the driver's loop, in front of the
GenRM pool, for /v1/... and SGLang's /generate.

The functions of the recipe, and those written after them, take a failed request for "not flawed". So each call of a
function has a port of its own: its requests are known to be its sample's, they wait and are repeated on other servers
as ours are, they are kept as the sample's judging history, and a sample whose last request failed is unscored, whatever
its function made of that.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from megatron_fapo.config.genrm import GenRMConfig
from megatron_fapo.data.records import JudgeRequest
from megatron_fapo.genrm.asking import COSTS_NO_ATTEMPT, EFFECTS, EXPECTED_CRITIQUE_TOKENS, TEXT_KEPT, back_off
from megatron_fapo.genrm.counters import Book, Counters
from megatron_fapo.genrm.deadlines import Deadline
from megatron_fapo.genrm.front import PoolFront
from megatron_fapo.genrm.membership import PoolEmptyError
from megatron_fapo.genrm.pool import Effect
from megatron_fapo.genrm.prompts import CHARS_PER_TOKEN
from megatron_fapo.genrm.sglang_api import NotSupportedError, from_completion, to_completion
from megatron_fapo.genrm.transport import Cut, Failure, FailureKind, send
from megatron_fapo.genrm.verdict import Reason, Unscored
from megatron_fapo.observe.stall import WAITS, Wait

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
MOST_REQUESTS = 16384
"""Under way or waiting; further ones are answered with 503."""
MOST_VISITS = 4096
"""Functions at work at once; further ones wait. Each has three open files: its port, and both ends of a connection."""
_AT_FAULT = {FailureKind.HTTP_4XX, FailureKind.CONTEXT}
"""It is the request: whoever sent it hears what the server says."""
_EVERYWHERE = ("/chat/completions", "/completions", "/models")
"""What a server lacks beside these does not make it ill."""
_REASONS = {FailureKind.CONTEXT: Reason.GENRM_CONTEXT, FailureKind.HTTP_4XX: Reason.GENRM_REFUSED}


class Visit:
    """One call of a compute_score, and what it has asked so far."""

    def __init__(self, name: str, counters: Counters) -> None:
        self.name, self.counters, self.began = name, counters, time.monotonic()
        self.address = ""
        """`host:port`"""
        self.clock: Deadline | None = None
        """Of the function; stands still while a request is under way."""
        self.under_way = 0
        self.history: list[JudgeRequest] = []
        self.failed: Unscored | None = None
        """Why a request has no answer, when no later one has."""
        self.failed_at = 0.0
        self.lost: PoolEmptyError | None = None

    def begin(self) -> None:
        self.under_way += 1
        if self.under_way == 1 and self.clock is not None:
            self.clock.pause()

    def end(self) -> None:
        self.under_way -= 1
        if self.under_way == 0 and self.clock is not None:
            self.clock.resume()

    def fail(self, why: Unscored) -> None:
        self.failed, self.failed_at = why, time.monotonic()

    def answer(self, began: float) -> None:
        if began >= self.failed_at:  # it was asked again; one that was asked beside the other makes up for nothing
            self.failed = None


class Gateway(PoolFront):
    """Belongs to one event loop. Its metrics are of what functions asked."""

    def __init__(self, urls: Sequence[str], config: GenRMConfig) -> None:
        super().__init__(urls, config)
        self._web: web.Server | None = None
        self._visits: dict[int, Visit] = {}
        self._under_way = 0
        self._places = asyncio.Semaphore(0)

    async def check(self) -> None:
        # A function that is cut off leaves its connection, and its request is taken back from the server.
        self._web = web.Server(self._answer, handler_cancellation=True, access_log=None)
        await super().check()
        self._places = asyncio.Semaphore(_visits(len(self._pool.servers) * self._config.max_concurrent_per_server))

    @asynccontextmanager
    async def visit(self, name: str, book: Book | None = None) -> AsyncIterator[Visit]:
        """An address for one call of a function, until the end of it. `name` is the sample's, `book` the step's: the
        last that began, if none is given.

        Raises:
            PoolEmptyError: no server has answered anybody for genrm.pool_empty_timeout_s.
        """
        assert self._web is not None
        async with self._places:
            listener = socket.create_server((HOST, 0))
            port = listener.getsockname()[1]
            visit = self._visits[port] = Visit(name, (book or self.book).counters)
            visit.address = f"{HOST}:{port}"
            server = await asyncio.get_running_loop().create_server(self._web, sock=listener)
            try:
                yield visit
            finally:
                server.close()
                del self._visits[port]
        if visit.lost is not None:
            raise visit.lost

    async def close(self) -> None:
        """Cuts off what is under way and closes every connection."""
        if self._web is not None:
            await self._web.shutdown(0.1)
        await super().close()

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        assert request.transport is not None
        visit = self._visits.get(request.transport.get_extra_info("sockname")[1])
        if request.path == "/health":
            status, reply = 200, {}
        elif visit is None or visit.lost is not None or self._under_way >= MOST_REQUESTS:
            status, reply = 503, _error("too many requests, or nobody waits for the answer any more")
            if visit is not None:
                visit.fail(Unscored(Reason.GENRM_UNREACHABLE, f"{self._under_way} requests are under way already"))
        else:
            self._under_way += 1
            visit.begin()
            try:
                status, reply = await self._relay(visit, request)
            finally:
                visit.end()
                self._under_way -= 1
        response = web.json_response(reply, status=status)
        response.force_close()  # the port is gone after this call
        return response

    async def _relay(self, visit: Visit, request: web.BaseRequest) -> tuple[int, Any]:
        """Status and JSON of the answer; books what became of it."""
        visit.counters.add("called")
        began = time.monotonic()
        outcome: Any | Failure = Failure(FailureKind.CANCELLED, "the function did not wait for the answer")
        reason, status = Reason.GENRM_UNREACHABLE, 502
        try:
            with WAITS.on("genrm.request", "a GenRM server with room", visit.name) as wait:
                async with self._deadlines.one() as deadline:
                    outcome = await self._asked(visit, request, deadline, wait)
        except TimeoutError:
            outcome = Failure(FailureKind.TIMEOUT, f"no answer within {self._config.deadline_s:g} s")
            reason, status = Reason.GENRM_DEADLINE, 504
        except PoolEmptyError as error:
            visit.lost = error
            return 503, _error(str(error))
        finally:  # also of a request that the function breaks off
            if isinstance(outcome, Failure):
                reason = _REASONS.get(outcome.kind, reason)
                visit.fail(Unscored(reason, outcome.detail))
                visit.counters.add("unscored")
        if isinstance(outcome, Failure):
            return 400 if outcome.kind in _AT_FAULT else status, _error(outcome.detail)
        visit.answer(began)
        visit.counters.add("answered")
        visit.counters.observe("latency", time.monotonic() - began)
        return 200, outcome

    async def _asked(self, visit: Visit, request: web.BaseRequest, deadline: Deadline, wait: Wait) -> Any | Failure:
        """The JSON that answers, in the words that were asked in; or the failure that ends the attempts."""
        generate = request.path == "/generate" and request.method == "POST"
        raw = await request.content.read()  # BaseRequest.read has a limit of 1 MiB
        body: dict[str, Any] | None = None
        try:
            if request.method == "POST":
                body = _object(raw)
                # Functions name the model as their author served it, or not at all; the servers of the pool have one.
                body = (to_completion(body) if generate else body) | {"model": self._config.served_model}
        except ValueError as error:
            return Failure(FailureKind.HTTP_4XX, str(error))
        path = "/completions" if generate else request.raw_path.removeprefix("/v1")
        if path == request.raw_path:
            return Failure(FailureKind.HTTP_4XX, f"there is no {path} here, only /v1/..., /generate and /health")
        tried: set[str] = set()
        attempts = failures = 0
        tokens = int(len(raw) / CHARS_PER_TOKEN) + EXPECTED_CRITIQUE_TOKENS
        while True:
            place = await self._dispatcher.enter(tried, tokens, first=failures > 0)
            deadline.start()
            wait.whom, wait.detail = place.server, f"{visit.name}, request {failures + 1}"
            reply: _Reply | Failure = Failure(FailureKind.CANCELLED, "")
            try:
                reply = await self._send(visit, place.server, request.method, path, body)
                if isinstance(reply, Failure) and reply.kind is FailureKind.CONTEXT:
                    reply = await self._send_shorter(visit, place.server, path, body or {}, reply)
            finally:
                effect, busy_for_s = Effect.ANSWERED, 0.0
                if isinstance(reply, Failure):
                    effect, busy_for_s = EFFECTS[reply.kind], reply.busy_for_s
                self._dispatcher.leave(place, effect, busy_for_s)
            if not isinstance(reply, Failure):
                return from_completion(reply.json) if generate else reply.json
            tried.add(place.server)
            failures += 1
            attempts += reply.kind not in COSTS_NO_ATTEMPT
            if reply.kind in _AT_FAULT:
                return reply
            if attempts >= self._config.max_attempts:
                return Failure(reply.kind, f"no answer in {failures} requests; {reply.kind}: {reply.detail}")
            visit.counters.add("retries")
            await back_off(failures)

    async def _send_shorter(
        self, visit: Visit, server: str, path: str, body: dict[str, Any], failure: Failure
    ) -> _Reply | Failure:
        """Once more, for an answer as long as the server's context leaves; `failure` when that cannot be asked for."""
        context, prompt = self._members.context(server), body.get("prompt")
        if path == "/chat/completions":
            body = {name: value for name, value in body.items() if name not in ("max_tokens", "max_completion_tokens")}
        elif isinstance(prompt, list) and context is not None and len(prompt) < context:
            body = body | {"max_tokens": context - len(prompt)}
        else:
            return failure
        reply = await self._send(visit, server, "POST", path, body)
        if isinstance(reply, Failure) or not reply.cut:
            return reply
        return Failure(FailureKind.CONTEXT, f"the context left {reply.tokens} tokens for the critique")

    async def _send(
        self, visit: Visit, server: str, method: str, path: str, body: dict[str, Any] | None
    ) -> _Reply | Failure:
        """One request to one server; booked whatever becomes of it."""
        visit.counters.add("requests")
        began, cut = time.monotonic(), Cut(self._config.request_timeout_s)
        reply: _Reply | Failure = Failure(FailureKind.CANCELLED, "nobody waits for it any more")
        try:
            with self._members.open(server, cut) as session:
                text = await send(session, method, server + path, body, cut)
            reply = text if isinstance(text, Failure) else _read(path, body, text)
            if isinstance(reply, Failure) and reply.kind is FailureKind.NOT_SERVED and path not in _EVERYWHERE:
                reply = Failure(FailureKind.HTTP_4XX, reply.detail)
        finally:
            took_s, what, tokens = time.monotonic() - began, "answered", 0
            if isinstance(reply, Failure):
                what, said = reply.kind, reply.detail[:TEXT_KEPT]
                visit.counters.add(f"failed/{what}")
            else:
                said, tokens = reply.said, reply.tokens
                self._latencies.add(took_s)
                visit.counters.add("completion_tokens", tokens)
                visit.counters.add("truncated", reply.cut)
            visit.history.append(JudgeRequest(server, what, began - visit.began, took_s, tokens, text=said))
        return reply


def _visits(connections: int) -> int:
    """As many as the limit of open files allows beside the `connections` to servers; the soft limit is raised."""
    needed = connections + 512 + 3 * MOST_VISITS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return max(1, MOST_VISITS - (needed - limit) // 3)


@dataclass
class _Reply:
    json: Any
    said: str = ""
    tokens: int = 0
    cut: bool = False


def _read(path: str, body: dict[str, Any] | None, text: str) -> _Reply | Failure:
    try:
        reply = json.loads(text)
        if path not in ("/chat/completions", "/completions"):
            return _Reply(reply)
        if body is not None and "return_token_ids" in body:
            from_completion(reply)
        choice = reply["choices"][0]
        said = choice["message"]["content"] if path == "/chat/completions" else choice["text"]
        tokens = int((reply.get("usage") or {}).get("completion_tokens") or 0)
        return _Reply(reply, said or "", tokens, choice.get("finish_reason") == "length")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        return Failure(FailureKind.BAD_BODY, f"not a completion ({type(error).__name__}: {error}): {text[:200]}")


def _object(raw: bytes) -> dict[str, Any]:
    body = json.loads(raw)
    if not isinstance(body, dict):
        raise NotSupportedError("the body must be a JSON object")
    if body.get("stream"):
        raise NotSupportedError("answers come whole: leave `stream` out")
    return body


def _error(detail: str) -> dict[str, Any]:
    return {"error": {"message": detail}}
