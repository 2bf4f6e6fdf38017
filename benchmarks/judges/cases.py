"""One case: a number of problems through one system, with what goes wrong meanwhile, and what came of it."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks.judges.problems import MEAN_OF_P50, Problem
from benchmarks.judges.systems import Servers, Setting, System

CASES = {
    "healthy": "all is well",
    "burst": "all is well, and all answers come at once",
    "hang": "1 of 4 servers accepts and never answers, from a tenth of the way on",
    "killed": "1 of 4 servers is killed at a tenth of the way, and is back after 26 p50",
    "nonsense": "1 % of the answers are nonsense, with HTTP 200",
    "babbler": "1 of 4 servers talks nonsense when it is first asked about a problem: some for certain, never in a row",
    "tail": "2 % of the requests are slow: the 99th percentile is 20 p50",
}
DOWN_OF_P50 = 26
"""6.5 s: longer than NaiveRouter retries (6 s), as the restart of a real server, a minute or more, is."""


@dataclass
class Outcome:
    """What became of the problems of one case."""

    problems: int
    seconds: list[float] = field(default_factory=list)
    """From the call to the score, of those that have one."""
    wrong: int = 0
    wall_s: float = 0.0
    """Until the last score."""
    ended: bool = True
    """Every call returned before the case's deadline."""
    cpu_s: dict[str, float] = field(default_factory=dict)
    requests: int = 0
    notes: dict[str, float] = field(default_factory=dict)


async def drive(
    system: System, problems: list[Problem], in_flight: int, deadline_s: float, at: dict[int, Callable[[], Any]]
) -> Outcome:
    """Keeps `in_flight` problems under way. `at`: what happens when so many have been begun."""
    outcome, waiting, happening = Outcome(len(problems)), iter(enumerate(problems)), set()
    began = time.perf_counter()

    async def work() -> None:
        for number, problem in waiting:
            if number in at:
                happening.add(asyncio.create_task(at[number]()))
            asked = time.perf_counter()
            flawed = await system.flawed(problem)
            if flawed is not None:
                now = time.perf_counter()
                outcome.seconds.append(now - asked)
                outcome.wrong += flawed != problem.flawed
                outcome.wall_s = now - began

    workers = [asyncio.create_task(work()) for _ in range(min(in_flight, len(problems)))]
    _, late = await asyncio.wait(workers, timeout=deadline_s)
    for worker in late:
        worker.cancel()
    outcome.ended = not late
    ends = await asyncio.gather(*workers, return_exceptions=True)
    raised = [end for end in ends if isinstance(end, Exception)]
    if raised:
        raise raised[0]
    await asyncio.gather(*happening)
    return outcome


async def run_case(
    case: str, system: System, servers: Servers, setting: Setting, problems: list[Problem], in_flight: int, seed: int
) -> Outcome:
    """One system through one case, after a warm-up in which all is well; the servers are as new afterwards."""
    warm_up, problems = problems[:100], problems[100:]
    tenth = len(problems) // 10
    await servers.set_case("healthy", seed, setting.p50_s)
    await system.open(servers.urls)
    try:
        await drive(system, warm_up, in_flight, setting.deadline_s, {})
        await servers.set_case(case, seed, setting.p50_s, hang_after=tenth // 4 if case == "hang" else None)

        async def kill_and_restart() -> None:
            servers.kill_first()
            await asyncio.sleep(DOWN_OF_P50 * setting.p50_s)
            await servers.restart_first()

        at = {tenth: kill_and_restart} if case == "killed" else {}
        at_once = len(problems) if case == "burst" else in_flight
        # Twice what it takes with three servers of four, and two time-outs after the last.
        expected_s = len(problems) * setting.p50_s * MEAN_OF_P50 / in_flight
        deadline_s = max(3 * expected_s + 2 * setting.request_timeout_s, 30.0)
        before = time.process_time(), system.router_cpu_s(), servers.cpu_s()
        outcome = await drive(system, problems, at_once, deadline_s, at)
        after = time.process_time(), system.router_cpu_s(), servers.cpu_s()
        outcome.requests = await servers.requests()
        names = ("client", "router", "servers")
        outcome.cpu_s = {name: b - a for name, a, b in zip(names, before, after, strict=True)}
    finally:
        await system.close()
    outcome.notes = dict(system.notes)
    return outcome


def row(system: str, case: str, runs: list[Outcome]) -> dict[str, Any]:
    """Of all runs of one system through one case: latencies pooled, rates as medians, failures added up."""
    seconds = sorted(second for run in runs for second in run.seconds)
    scored = len(seconds)
    cpu = {name: round(1e3 * sum(run.cpu_s[name] for run in runs) / max(1, scored), 3) for name in runs[0].cpu_s}
    busy = sum(sum(run.cpu_s.values()) for run in runs) / max(1e-9, sum(run.wall_s for run in runs))
    return {
        "system": system,
        "case": case,
        "verdicts_per_s": round(median(len(run.seconds) / run.wall_s if run.seconds else 0.0 for run in runs), 2),
        "p50_s": _rank(seconds, 0.5),
        "p99_s": _rank(seconds, 0.99),
        "lost": sum(run.problems for run in runs) - scored,
        "wrong": sum(run.wrong for run in runs),
        "problems": sum(run.problems for run in runs),
        "ended": all(run.ended for run in runs),
        "requests_per_verdict": round(sum(run.requests for run in runs) / max(1, scored), 3),
        "cpu_ms_per_verdict": cpu,
        "cores_busy": f"{busy:.2f} of {os.cpu_count()}",
        "runs": [round(len(run.seconds) / run.wall_s, 2) if run.seconds else 0.0 for run in runs],
        "notes": [run.notes for run in runs],
    }


def _rank(ordered: list[float], share: float) -> float | None:
    """Nearest-rank percentile."""
    return round(ordered[max(0, math.ceil(len(ordered) * share) - 1)], 4) if ordered else None
