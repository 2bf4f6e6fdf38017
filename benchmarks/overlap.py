"""How long a step is with judges that work meanwhile, against an instant judge, and against judging after the rollout.

    python benchmarks/overlap.py examples/fapo_32b.yaml --cluster 8x8xH100 --lengths mean=2300,critique=3200 \\
        --servers 4 8 12 16 [--scale 0.25 | --plan] [--json FILE] [section.key=value ...]

A calibrated simulation with our own code in it: the real RewardLoop, rule workers and GenRMClient, over HTTP, in real
time. What is simulated is the hardware: samples arrive when `fapo plan` has the engines finish them, and each judge is
an HTTP server in another process that decodes with the speed and the batches of `fapo plan`'s servers
(megatron_fapo/plan/simulate.py). Its rates are measured or assumed as docs/sizing.md says. Time runs faster by 1 /
--scale, which makes the overhead of our code, and of this machine, as much larger.

`plan` (alone with --plan) is the same step by `fapo plan`'s simulation. The phases of the policy are the planner's in
every row.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aiohttp import web

from megatron_fapo.config.load import load_config
from megatron_fapo.config.reward import RewardConfig
from megatron_fapo.data.records import Prompt, Sample, SampleKey
from megatron_fapo.genrm.reward_loop import RewardLoop
from megatron_fapo.plan.hardware import parse_cluster
from megatron_fapo.plan.layouts import Planner, changed
from megatron_fapo.plan.lengths import find_lengths
from megatron_fapo.plan.shapes import find_shape
from megatron_fapo.plan.simulate import Rollout, Server, SimSample, Speed, simulate

_WORK = re.compile(r"WORK (\d+) (\d+) (\d+)")
_LINE = "We carry the two over, as before, and go on with the next of the terms that are left. "
CHARS = 3
"""Of a token, in the text that is sent."""


class Judge:
    """One simulated server: the planner's batches and speeds, in scaled real time."""

    def __init__(self, speed: Speed, scale: float) -> None:
        self._server, self._scale, self._began = Server(speed), scale, time.monotonic()
        self._done: dict[int, asyncio.Future[None]] = {}
        self._requests = 0
        self._timer: asyncio.TimerHandle | None = None

    async def complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        work = _WORK.search(body["messages"][0]["content"])
        assert work is not None
        _, solution, critique = map(int, work.groups())
        self._requests += 1
        mine, self._done[mine] = self._requests, asyncio.get_running_loop().create_future()
        self._catch_up()
        self._server.add(mine, solution, critique, solution)
        self._arm()
        try:
            await self._done[mine]
        except asyncio.CancelledError:
            self._drop(mine, solution + critique)
            raise
        text = _LINE * (critique * CHARS // len(_LINE)) + "\\boxed{-1}"
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return web.json_response({"choices": [choice], "usage": {"completion_tokens": critique}})

    def _now(self) -> float:
        return (time.monotonic() - self._began) / self._scale

    def _catch_up(self) -> None:
        now = self._now()
        while (when := self._server.next_s()) <= now:
            self._server.advance(when)
            self._done.pop(self._server.finish()).set_result(None)
        self._server.advance(now)

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        when = self._server.next_s()
        if when < math.inf:
            self._timer = asyncio.get_running_loop().call_later((when - self._now()) * self._scale, self._tick)

    def _tick(self) -> None:
        self._catch_up()
        self._arm()

    def _drop(self, mine: int, tokens: int) -> None:
        """A request that its client gave up."""
        self._catch_up()
        if self._done.pop(mine, None) is None:
            return
        server = self._server
        server.outstanding -= tokens
        for entry in [each for each in server.running if each[1] == mine]:
            server.running.remove(entry)
            server.context = max(0.0, server.context - (tokens - (entry[0] - server.progress)))
        heapq.heapify(server.running)
        for waiting in [each for each in server.waiting if each[0] == mine]:
            server.waiting.remove(waiting)
        server.admit()
        self._arm()


async def serve(count: int, speed: Speed, scale: float) -> None:
    """So many judges, each on a port of its own; prints the ports."""
    ports = []
    for _ in range(count):
        judge = Judge(speed, scale)

        async def models(_request: web.Request) -> web.Response:
            return web.json_response({"data": [{"id": "genrm"}]})

        app = web.Application(client_max_size=2**24)
        app.add_routes([web.get("/v1/models", models), web.post("/v1/chat/completions", judge.complete)])
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
        ports.append(runner.addresses[0][1])
    print(json.dumps(ports), flush=True)
    await asyncio.Event().wait()


def oracle(question: str, ground_truth: str, solution: str) -> int:
    """The judge that takes no time."""
    del question, ground_truth, solution
    return -1


def texts(samples: Sequence[SimSample]) -> list[Sample]:
    """Samples of these lengths, right where they are to be judged."""
    made = []
    for index, each in enumerate(samples):
        prompt = Prompt(f"overlap/{index}", "overlap", (), "2", "Add up.")
        filler = (_LINE * 4 + "\n\n") * (each.response * CHARS // (4 * len(_LINE)))
        work = f"WORK {index} {each.prompt + each.response} {each.critique}"
        text = f"{work}\n\n{filler}\\boxed{{{2 if each.critique else 3}}}"
        made.append(Sample(SampleKey(prompt.prompt_id, 0, 0), prompt, (0,) * each.response, (), text, "stop", 0))
    return made


async def scored_after(
    planner: Planner, samples: list[Sample], ready: Sequence[float], scale: float, urls: Sequence[str], *, after: bool
) -> dict[str, float]:
    """Seconds, in the planner's time, until the last score; without `urls` by the oracle."""
    reward = RewardConfig.model_validate(
        {"verifier": "recipe_string", "verifier_processes": 2, "overlong": {"enabled": False}}
    )
    genrm = planner.config.genrm
    if not urls:
        genrm = genrm.model_copy(update={"judge_function": f"{Path(__file__).resolve()}:oracle"})

    async with RewardLoop(reward, genrm, urls, planner.config.rollout.max_response_tokens) as loop:
        loop.begin_step()
        began, cpu = time.monotonic(), time.process_time()

        async def engines() -> AsyncIterator[Sample]:
            for index in sorted(range(len(samples)), key=ready.__getitem__):
                await asyncio.sleep(began + ready[index] * scale - time.monotonic())
                yield samples[index]

        async def turn() -> None:
            """After the rollout: the pool idles until then."""

        counted: Callable[[], Awaitable[None]] | None = turn if after else None
        async with aclosing(loop.score_stream(engines(), turn=counted)) as stream:
            scores = [each.score async for each in stream]
        taken = (time.monotonic() - began) / scale
        assert len(scores) == len(samples)
        assert all(score.reward in (1.0, -1.0) for score in scores), "a sample is unscored"
        metrics = loop.metrics()
        return {
            "scored_s": taken,
            "requests": metrics.get("genrm/requests", 0.0),
            **{name: value for name, value in metrics.items() if name.startswith("genrm/failed/")},
            "cpu_share": (time.process_time() - cpu) / (taken * scale),
        }


def simulated(planner: Planner, samples: list[SimSample], servers: int, *, after: bool) -> Rollout:
    """The rollout of the step by the planner's simulation; `servers` 0: the oracle."""
    config = planner.config
    engines, judges = planner.speeds(samples)
    processes, group = config.reward.verifier_processes, config.rollout.samples_per_prompt
    judging = judges if servers else None
    rule_s = planner.hardware.rates.rule_s
    return simulate(samples, group, engines, judging, rule_s=rule_s, rule_processes=processes, streamed=not after)


def rest_s(planner: Planner, samples: list[SimSample]) -> float:
    """The phases of the policy and the refit."""
    policy = planner.work.times(samples)
    return policy.logprobs_s + policy.train_s + planner.refit_s


def row(
    planner: Planner, samples: list[SimSample], servers: int, rest: float, scale: float, *, after: bool
) -> dict[str, Any]:
    """One step, by the real code and by the plan; `servers` 0: the oracle. `rest`: seconds of all other phases."""
    plan = simulated(planner, samples, servers, after=after)
    _, judges = planner.speeds(samples)
    child = None
    urls: list[str] = []
    try:
        if servers:
            assert judges is not None
            arguments = ["--serve", str(servers), "--scale", str(scale), "--speed", json.dumps(asdict(judges.speed))]
            command = [sys.executable, __file__, *arguments]
            child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert child.stdout is not None
            urls = [f"http://127.0.0.1:{port}/v1" for port in json.loads(child.stdout.readline())]
        real = asyncio.run(scored_after(planner, texts(samples), plan.generated, scale, urls, after=after))
    finally:
        if child is not None:
            child.kill()
            child.wait()
    judge = "oracle" if not servers else "after the rollout" if after else "streamed"
    figures = {"judge": judge, "servers": servers, "generation_s": plan.generation_s, **real}
    return figures | {"step_s": rest + real["scored_s"], "plan_step_s": rest + plan.generation_s + plan.tail_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--cluster", default="8x8xH100")
    parser.add_argument("--lengths")
    parser.add_argument("--servers", type=int, nargs="+", default=[4, 8, 12, 16])
    parser.add_argument("--scale", type=float, default=1 / 4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plan", action="store_true", help="the plan's simulation alone, in seconds")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--speed", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if args.serve:
        asyncio.run(serve(args.serve, Speed(**json.loads(args.speed)), args.scale))
        return
    config = load_config([args.config], args.overrides).config
    shape, _ = find_shape(config.policy.model_path, "policy.model_path", config.policy.max_position_embeddings)
    judge, _ = find_shape(config.genrm.model_path or "", "genrm.model_path")
    planner = Planner(config, shape, judge, parse_cluster(args.cluster), find_lengths(args.lengths, config, True))
    samples = planner.drawn()
    _, judges = planner.speeds(samples)
    assert judges is not None
    judged, tokens = sum(s.critique > 0 for s in samples), sum(s.critique for s in samples)
    print(f"{len(samples)} samples, {judged} judged with {tokens:,} tokens; lengths: {planner.lengths.text}")
    mean = sum(s.prompt + s.response + s.critique / 2 for s in samples if s.critique) / judged
    print(f"a full server: {judges.speed.tokens_per_s(judges.speed.slots, mean):,.0f} tokens/s in {judges.speed.slots}")
    rest = rest_s(planner, samples)
    sizes = {servers: planner.with_config(changed(config, genrm={"servers": servers})) for servers in args.servers}
    if args.plan:
        oracle = rest + simulated(planner, samples, 0, after=False).generation_s
        for servers, sized in sizes.items():
            plans = [simulated(sized, samples, servers, after=after) for after in (False, True)]
            ratios = ", ".join(f"{(rest + each.generation_s + each.tail_s) / oracle:.3f}" for each in plans)
            print(f"{servers:>3} servers: streamed, after the rollout: {ratios} of the oracle's {oracle:.1f} s")
        return
    rows = [row(planner, samples, 0, rest, args.scale, after=False)]
    for servers, sized in sizes.items():
        rows += [row(sized, samples, servers, rest, args.scale, after=after) for after in (False, True)]
    for each in rows:
        each["of_oracle"], each["plan_of_oracle"] = (each[k] / rows[0][k] for k in ("step_s", "plan_step_s"))
        print(
            f"{each['servers']:>3} servers  {each['judge']:<18}  step {each['step_s']:7.1f} s  "
            f"{each['of_oracle']:.3f} of the oracle's (plan {each['plan_of_oracle']:.3f})  "
            f"requests {each['requests']:.0f}, driver's CPU {each['cpu_share']:.0%}"
            + "".join(f", {name.removeprefix('genrm/')} {each[name]:.0f}" for name in each if "/failed/" in name),
            flush=True,
        )
    if args.json:
        about = {"config": args.config.name, "cluster": args.cluster, "lengths": planner.lengths.text}
        args.json.write_text(json.dumps(about | {"scale": args.scale, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
