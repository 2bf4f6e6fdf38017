"""A scriptable OpenAI-compatible server: the fault injector of the GenRM tests.

In process: `async with FakeServer(script) as server`, where script(request body, number of the request) names what
happens to it, one of the functions below. As a process that can be killed: `python -m tests.faults.fake_server`, which
prints its port and answers each request after the number of seconds given as its argument.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

Behaviour = Callable[["FakeServer", web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]
Script = Callable[[dict[str, Any], int], Behaviour]
MODEL = "genrm"


def completion(text: str | None, finish_reason: str = "stop", tokens: int = 7) -> web.Response:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return web.json_response({"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": tokens}})


def says(text: str | None, finish_reason: str = "stop", after_s: float = 0.0) -> Behaviour:
    async def behave(_server: FakeServer, _request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
        await asyncio.sleep(after_s)
        return completion(text, finish_reason)

    return behave


def hangs() -> Behaviour:
    return says("\\boxed{-1}", after_s=3600)


def status(code: int, text: str = "no", headers: dict[str, str] | None = None) -> Behaviour:
    async def behave(_server: FakeServer, _request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
        return web.Response(status=code, text=text, headers=headers)

    return behave


def body(text: str) -> Behaviour:
    return status(200, text)


def breaks_off() -> Behaviour:
    """Half a body, then the socket closes."""

    async def behave(_server: FakeServer, request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b'{"choices": [{"message": {"content": "\\\\boxed{-1}')
        assert request.transport is not None
        request.transport.abort()
        return response

    return behave


def with_context(limit: int, tokens_of: Callable[[str], int]) -> Behaviour:
    """vLLM's rule: prompt and max_tokens must fit; without max_tokens all the room is granted."""

    async def behave(_server: FakeServer, _request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        prompt = tokens_of(body["messages"][0]["content"])
        if prompt + body.get("max_tokens", 1) > limit:
            text = f"This model's maximum context length is {limit} tokens. However, you requested"
            return web.json_response({"error": {"message": text, "code": 400}}, status=400)
        return completion("Sound. \\boxed{-1}", tokens=min(20, limit - prompt))

    return behave


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Waits for what a busy machine may do late. Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


class FakeServer:
    def __init__(self, script: Script, max_model_len: int | None = 32768, model: str = MODEL) -> None:
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.open = 0
        self.most_open = 0
        self.cancelled = 0
        self.model = {"id": model, "max_model_len": max_model_len}
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def start(self) -> FakeServer:
        """On a free port the first time, on the same port when it comes back."""
        app = web.Application()
        app.router.add_get("/health", self._models)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_post("/v1/completions", self._complete)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def __aenter__(self) -> FakeServer:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _models(self, _request: web.Request) -> web.Response:
        return web.json_response({"data": [self.model]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        self.bodies.append(asked)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            return await self.script(asked, len(self.bodies))(self, request, asked)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.open -= 1


async def _serve(after_s: float) -> None:
    server = await FakeServer(lambda _body, _number: says("\\boxed{-1}", after_s=after_s)).start()
    print(json.dumps({"port": server.port}), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(float(sys.argv[1])))
