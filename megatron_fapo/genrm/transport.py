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


@dataclass(frozen=True)
class Failure:
    kind: FailureKind
    detail: str
    busy_for_s: float = 0.0


# vLLM, SGLang and OpenAI word it differently; a miss is counted as http_4xx, never as a verdict.
_CONTEXT_EXCEEDED = re.compile(r"context.{0,20}length|context window|too long|max_model_len|longer than", re.IGNORECASE)
_BUSY_DEFAULT_S, _BUSY_MOST_S = 1.0, 30.0


async def ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any], timeout_s: float) -> Answer | Failure:
    """POSTs a chat completion. Cancelling it closes the connection, so that the server stops generating."""
    try:
        async with asyncio.timeout(timeout_s):
            async with session.post(f"{url}/chat/completions", json=body) as response:
                text = (await response.read()).decode(errors="replace")
                return _read(response, text)
    except aiohttp.ConnectionTimeoutError as error:
        return Failure(FailureKind.NO_CONNECTION, str(error))
    except TimeoutError:
        return Failure(FailureKind.TIMEOUT, f"no answer within {timeout_s:g} s")
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


def _read(response: aiohttp.ClientResponse, text: str) -> Answer | Failure:
    status = response.status
    if status == 200:
        return _read_completion(text)
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
        tokens = int((reply.get("usage") or {}).get("completion_tokens") or 0)
        if not isinstance(critique, str):
            raise TypeError("content is not text")
        return Answer(critique, choice.get("finish_reason"), tokens)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        return Failure(FailureKind.BAD_BODY, f"not a chat completion ({type(error).__name__}): {text[:200]}")


def _retry_after_s(header: str) -> float:
    return min(float(header), _BUSY_MOST_S) if header.isdecimal() else _BUSY_DEFAULT_S
