"""The reward loop's own cost per sample: rule in a worker, GenRM request, score.

The GenRM is a local process that answers at once, so what is left is ours. `cpu` is the CPU time of the loop's process
alone; the server and the verifier's worker compete with it for the machine's cores. Half of the samples are right.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

from aiohttp import web

from megatron_fapo.config.genrm import GenRMConfig
from megatron_fapo.config.reward import RewardConfig
from megatron_fapo.data.records import Prompt, Sample, SampleKey
from megatron_fapo.genrm.reward_loop import RewardLoop

SOLUTION = "\n\n".join(["We add the two numbers and carry on as before, as the problem asks us to do here."] * 40)


async def serve() -> None:
    """Answers every request at once; prints its port."""
    choice = {"index": 0, "message": {"role": "assistant", "content": "Sound. \\boxed{-1}"}, "finish_reason": "stop"}

    async def complete(request: web.Request) -> web.Response:
        await request.read()
        return web.json_response({"choices": [choice], "usage": {"completion_tokens": 5}})

    async def models(_request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "genrm", "max_model_len": 32768}]})

    app = web.Application()
    app.add_routes([web.get("/v1/models", models), web.post("/v1/chat/completions", complete)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


async def samples(count: int) -> AsyncIterator[Sample]:
    for index in range(count):
        prompt = Prompt(f"bench/{index}", "bench", (), "2", f"What is 1+1? ({index})")
        text = f"{SOLUTION}\n\n\\boxed{{{2 if index % 2 else 3}}}"
        yield Sample(SampleKey(prompt.prompt_id, 0, 0), prompt, (0,) * 500, (0.0,) * 500, text, "stop", 0)


async def measure(count: int, in_flight: int, verifier: str, judge: bool, url: str) -> None:
    reward = RewardConfig.model_validate({"verifier": verifier, "verifier_processes": 1})
    async with RewardLoop(reward, GenRMConfig(), [url], 1024, max_in_flight=in_flight) as loop:
        wall, cpu, handed_on = time.perf_counter(), time.process_time(), 0
        async for scored in loop.score_stream(samples(count), judge=judge):
            assert scored.score.reward is not None
            handed_on += 1
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert handed_on == count
    what = f"{verifier} + GenRM for half" if judge else f"{verifier} alone"
    print(
        f"{what:32} {count / wall:8.0f} samples/s  {1e6 * wall / count:6.0f} us wall  {1e6 * cpu / count:6.0f} us cpu"
    )


def own_cost(count: int, in_flight: int) -> None:
    """Prints a line for each rule, with and without the GenRM."""
    words = [sys.executable, "-m", "benchmarks.judges.own_cost"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        for verifier in ("recipe_string", "math_verify"):
            for judge in (False, True):
                asyncio.run(measure(count, in_flight, verifier, judge, url))
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    asyncio.run(serve())
