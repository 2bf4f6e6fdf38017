"""The GenRM pool beside what the peers use, when all is well and when it is not.

    python benchmarks/reward_loop.py --json FILE                    # all systems, all cases, one real vLLM: 20 minutes
    python benchmarks/reward_loop.py --quick --json FILE            # fewer problems
    python benchmarks/reward_loop.py --systems megatron_fapo --cases tail --json FILE
    python benchmarks/reward_loop.py --own-cost --problems 16384 --in-flight 4096    # what scoring costs our process

Systems: `megatron_fapo` (our client, straight to the servers); `verl_naive_router` (the router of verl's reward loop,
run from its package) and `vllm_router`, each with a reward function before it that behaves as FAPO's published one.
Four simulated judges (judges/problems.py: what they are calibrated to) stand for the servers. A problem is *lost* when
it has no score when its case ends, and *wrong* when its score says sound of a flawed solution or the reverse. Seconds
are of the verdicts that came.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import sys
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.judges.cases import CASES, Outcome, row, run_case
from benchmarks.judges.own_cost import own_cost
from benchmarks.judges.peers import peer_versions
from benchmarks.judges.problems import P50_S, make_problem
from benchmarks.judges.real_vllm import CASE as REAL_VLLM
from benchmarks.judges.real_vllm import real_vllm
from benchmarks.judges.systems import SYSTEMS, Servers, Setting, VllmRouter, make_system
from megatron_fapo.errors import UserError

SERVERS, WARM_UP = 4, 100


async def compare(args: argparse.Namespace, setting: Setting) -> list[dict[str, Any]]:
    """Every case, the systems in turn, in another order each time; one row for each of both."""
    runs: defaultdict[tuple[str, str], list[Outcome]] = defaultdict(list)
    servers = Servers(SERVERS, setting.slots)
    try:
        for repeat in range(args.seed, args.seed + args.repeats):
            for case in args.cases:
                # A server that is killed must have the time to come back.
                count = args.problems * 3 // 2 if case == "killed" else args.problems
                problems = [make_problem(repeat, number) for number in range(WARM_UP + count)]
                for place in range(len(args.systems)):
                    name = args.systems[(place + repeat) % len(args.systems)]
                    system = make_system(name, setting)
                    outcome = await run_case(case, system, servers, setting, problems, args.in_flight, repeat)
                    runs[name, case].append(outcome)
                    print(line(row(name, case, [outcome])), flush=True)
    finally:
        servers.close()
    return [row(name, case, runs[name, case]) for case in args.cases for name in args.systems]


HEAD = """| case | system | verdicts/s | p50, s | p99, s | lost | wrong | requests a verdict | CPU, ms a verdict |
|---|---|---|---|---|---|---|---|---|"""


def line(values: dict[str, Any]) -> str:
    """A row as one of a Markdown table."""
    cpu = " + ".join(f"{ms:.1f} {name}" for name, ms in values["cpu_ms_per_verdict"].items() if ms)
    seconds = ["-" if values[name] is None else f"{values[name]:.2f}" for name in ("p50_s", "p99_s")]
    counts = [str(values[name]) for name in ("lost", "wrong")]
    words = [values["case"], f"`{values['system']}`", f"{values['verdicts_per_s']:.1f}", *seconds, *counts]
    return f"| {' | '.join([*words, f'{values["requests_per_verdict"]:.2f}', cpu])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="rows, settings and versions")
    parser.add_argument("--quick", action="store_true", help="600 problems for a case, once")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    usual = [case for case in CASES if case != "babbler"]  # it is there for the tests
    parser.add_argument("--cases", nargs="+", default=[*usual, REAL_VLLM], choices=[*CASES, REAL_VLLM])
    parser.add_argument("--problems", type=int, help="for each case and repetition (2000)")
    parser.add_argument("--repeats", type=int, help="with other problems each time (2)")
    parser.add_argument("--seed", type=int, default=0, help="of the first repetition")
    parser.add_argument("--in-flight", type=int, default=48, help="verdicts under way at any time")
    parser.add_argument("--slots", type=int, default=16, help="requests that a server works on at once")
    parser.add_argument(
        "--p50-ms", type=float, default=1e3 * P50_S, help="of a judge; every other time is scaled along"
    )
    parser.add_argument("--own-cost", action="store_true", help="what scoring a sample costs our process, nothing else")
    args = parser.parse_args()
    args.problems = args.problems or (600 if args.quick else 2000)
    args.repeats = args.repeats or (1 if args.quick else 2)
    if args.own_cost:
        own_cost(args.problems, args.in_flight)
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a connection for each problem in the burst
    setting = Setting(args.p50_ms / 1e3, args.slots)
    began, load = time.time(), os.getloadavg()[0]
    try:
        versions = peer_versions() if set(args.systems) != {"megatron_fapo"} else {}
        with_vllm = REAL_VLLM in args.cases
        args.cases = [case for case in args.cases if case != REAL_VLLM]
        print(HEAD, flush=True)
        rows = asyncio.run(compare(args, setting)) if args.cases else []
        if with_vllm:
            rows += real_vllm(args.systems, 60 if args.quick else 300)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print("\n".join(["", "All repetitions:", HEAD, *map(line, rows)]))
    if args.json:
        settings = {
            "servers": SERVERS,
            "slots": args.slots,
            "in_flight": args.in_flight,
            "seed": args.seed,
            "p50_s": setting.p50_s,
            "request_timeout_s": setting.request_timeout_s,
            "deadline_s": setting.deadline_s,
            "vllm_router": VllmRouter.OPTIONS | {"request-timeout-secs": round(setting.request_timeout_s)},
            "versions": versions | {name: version(name) for name in ("aiohttp", "megatron_fapo")},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} before",
        }
        lines = ",\n".join(json.dumps(found | {"settings": settings}) for found in rows)
        args.json.write_text(f"[\n{lines}\n]\n")
        print(f"{len(rows)} rows in {args.json}, after {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
