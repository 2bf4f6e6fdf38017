"""A simulated judge: an OpenAI-compatible server that takes as long as a real one, on a smaller scale.

    python -m benchmarks.judges.server INDEX SLOTS [PORT]

Prints its port. SLOTS requests are served at once and the others wait in order, as an engine's `max_num_seqs` has it; a
client that goes away frees its place. POST /case sets what happens next; GET /stats says what was asked.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from typing import Any

from aiohttp import web

from benchmarks.judges.problems import critique, read_mark, service_s

MODEL = {"id": "genrm", "max_model_len": 32768}
TOKENS_PER_P50 = 2345


class Judge:
    def __init__(self, index: int, slots: int) -> None:
        self._index, self._slots = index, asyncio.Semaphore(slots)
        self._case: dict[str, Any] = {"name": "healthy", "seed": 0, "p50_s": 0.001, "hang_after": None}
        self._asked: Counter[int] = Counter()
        self._awake = asyncio.Event()

    async def set_case(self, request: web.Request) -> web.Response:
        self._case = await request.json()
        self._asked.clear()
        self._awake.set()
        self._awake = asyncio.Event()
        return web.json_response({})

    async def stats(self, _request: web.Request) -> web.Response:
        return web.json_response({"requests": self._asked.total()})

    async def healthy(self, _request: web.Request) -> web.Response:
        """A hanging judge too calls itself healthy, as vLLM's API server does while its engine is stuck."""
        return web.json_response({"object": "list", "data": [MODEL]})

    async def complete(self, request: web.Request) -> web.Response:
        number, verdict = read_mark((await request.json())["messages"][0]["content"])
        case, awake = self._case, self._awake
        asked = (self._index, self._asked[number])
        self._asked[number] += 1
        taken_s = service_s(case["seed"], number, case["name"], asked, case["p50_s"])
        async with self._slots:
            await asyncio.sleep(taken_s)
            if case["hang_after"] is not None and self._asked.total() > case["hang_after"]:
                await awake.wait()
        text = critique(case["seed"], number, verdict, case["name"], asked)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        tokens = round(TOKENS_PER_P50 * taken_s / case["p50_s"])
        return web.json_response({"choices": [choice], "usage": {"prompt_tokens": 1200, "completion_tokens": tokens}})


async def serve(index: int, slots: int, port: int) -> None:
    judge = Judge(index, slots)
    app = web.Application()
    app.add_routes(
        [
            web.get("/health", judge.healthy),
            web.get("/v1/models", judge.healthy),
            web.get("/stats", judge.stats),
            web.post("/case", judge.set_case),
            web.post("/v1/chat/completions", judge.complete),
        ]
    )
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True, backlog=4096).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    words = [int(word) for word in sys.argv[1:]]
    asyncio.run(serve(words[0], words[1], words[2] if len(words) > 2 else 0))
