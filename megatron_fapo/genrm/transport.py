"""One request to one OpenAI-compatible server, and what its outcome means. Nothing here retries or remembers."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import aiohttp


class FailureKind(StrEnum):
    """The words of the metrics `genrm/failed/<kind>`."""

    TIMEOUT = "timeout"
    GONE = "gone"
    """Connection refused: nobody listens."""
    NO_CONNECTION = "no_connection"
    """Nobody answered the attempt to connect in time."""
    CONNECTION = "connection"
    """Broken off during the request."""
    WITHDRAWN = "withdrawn"
    """Cut short by us: the judge service has moved."""
    SILENT = "silent"
    """Cut short by us: the server answered nobody for long, while others did."""
    CANCELLED = "cancelled"
    """Cut short by us: another server's answer came first."""
    HTTP_5XX = "http_5xx"
    BUSY = "busy"
    """HTTP 429."""
    NOT_SERVED = "not_served"
    """HTTP 401, 403 or 404: alive, but not for us."""
    HTTP_4XX = "http_4xx"
    """The request is at fault."""
    CONTEXT = "context"
    """HTTP 400 because prompt and critique exceed the context."""
    BAD_BODY = "bad_body"
    """HTTP 200 with a body that is not a chat completion."""


@dataclass(frozen=True)
class Answer:
    critique: str
    finish_reason: str | None
    completion_tokens: int
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Failure:
    kind: FailureKind
    detail: str
    busy_for_s: float = 0.0


# vLLM, SGLang and OpenAI word it differently; a miss is counted as http_4xx, never as a verdict.
_CONTEXT_EXCEEDED = re.compile(r"context.{0,20}length|context window|too long|max_model_len|longer than", re.IGNORECASE)
_BUSY_DEFAULT_S, _BUSY_MOST_S = 1.0, 30.0


class Cut:
    """What may end a request before its answer: its time limit, or whoever knows better and says why."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout, self._open = asyncio.timeout(timeout_s), False
        self.failure = Failure(FailureKind.TIMEOUT, f"no answer within {timeout_s:g} s")

    def now(self, why: FailureKind, detail: str) -> None:
        """Does nothing to a request that has not begun, has ended, or is being cut already."""
        if self._open and not self._timeout.expired():
            self._open, self.failure = False, Failure(why, detail)
            self._timeout.reschedule(0)

    async def __aenter__(self) -> Cut:
        await self._timeout.__aenter__()
        self._open = True
        return self

    async def __aexit__(self, *error: Any) -> None:
        self._open = False
        await self._timeout.__aexit__(*error)


async def ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any], cut: Cut) -> Answer | Failure:
    """POSTs a chat completion."""
    text = await send(session, "POST", f"{url}/chat/completions", body, cut)
    return text if isinstance(text, Failure) else _read_completion(text)


async def send(
    session: aiohttp.ClientSession, method: str, url: str, body: dict[str, Any] | None, cut: Cut
) -> str | Failure:
    """The text of an answer with HTTP 200. Cancelling or cutting it closes the connection, so that the server stops
    generating."""
    try:
        async with cut:
            async with session.request(method, url, json=body) as response:
                text = (await response.read()).decode(errors="replace")
                return text if response.status == 200 else _refusal(response, text)
    except aiohttp.ConnectionTimeoutError as error:
        return Failure(FailureKind.NO_CONNECTION, str(error))
    except TimeoutError:
        return cut.failure
    except aiohttp.ClientConnectorError as error:
        return Failure(FailureKind.GONE, str(error))
    except (aiohttp.ClientError, OSError) as error:
        return Failure(FailureKind.CONNECTION, f"{type(error).__name__}: {error}")


async def list_models(session: aiohttp.ClientSession, url: str, timeout_s: float) -> dict[str, int | None] | str:
    """The models that a server lists, with their context in tokens where it says so; or what is wrong, in words."""
    try:
        async with asyncio.timeout(timeout_s):
            async with session.get(f"{url}/models") as response:
                text = (await response.read()).decode(errors="replace")
                if response.status != 200:
                    return f"GET {url}/models answered HTTP {response.status}: {text[:200]}"
                return {str(model["id"]): model.get("max_model_len") for model in json.loads(text)["data"]}
    except TimeoutError:
        return f"GET {url}/models gave no answer within {timeout_s:g} s"
    except (aiohttp.ClientError, OSError) as error:
        return f"GET {url}/models failed: {type(error).__name__}: {error}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"GET {url}/models answered something that is not a list of models"


def _refusal(response: aiohttp.ClientResponse, text: str) -> Failure:
    status = response.status
    detail = f"HTTP {status}: {text[:200]}"
    if status == 429:
        return Failure(FailureKind.BUSY, detail, _retry_after_s(response.headers.get("Retry-After", "")))
    if status == 400 and _CONTEXT_EXCEEDED.search(text):
        return Failure(FailureKind.CONTEXT, detail)
    if status in (401, 403, 404):
        return Failure(FailureKind.NOT_SERVED, detail)
    return Failure(FailureKind.HTTP_4XX if 400 <= status < 500 else FailureKind.HTTP_5XX, detail)


def _read_completion(text: str) -> Answer | Failure:
    try:
        reply = json.loads(text)
        choice = reply["choices"][0]
        critique = choice["message"]["content"] or ""  # null when a reasoning parser took everything
        usage = reply.get("usage") or {}
        tokens, prompt_tokens = (int(usage.get(name) or 0) for name in ("completion_tokens", "prompt_tokens"))
        if not isinstance(critique, str):
            raise TypeError("content is not text")
        return Answer(critique, choice.get("finish_reason"), tokens, prompt_tokens)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        return Failure(FailureKind.BAD_BODY, f"not a chat completion ({type(error).__name__}): {text[:200]}")


def _retry_after_s(header: str) -> float:
    return min(float(header), _BUSY_MOST_S) if header.isdecimal() else _BUSY_DEFAULT_S
