"""What tracing costs a run: CPU time of each record and of a step, bytes of its file, and clocks of two processes.

    python benchmarks/trace_cost.py                         # a step of the 32B recipe: 64 ranks, 8192 samples
    python benchmarks/trace_cost.py --ranks 2 --samples 128

The step is made up: each rank has the spans of its answers, every sample comes to and leaves an engine, and of
`--judged` of them a request comes to and leaves a server. Clocks: another process answers with its time, which is
compared with the middle of question and answer, as NTP does; of 1,000 answers the quickest.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from megatron_fapo.observe.spans import Span
from megatron_fapo.observe.trace import DRIVER, Tracer, step_file, summarize, wall, write_step
from megatron_fapo.processes import Process

SPANS = ("enter", "logprobs", "enter", *("gradients", "optimizer", "train") * 16, "enter", "expose", "weights", "sums")
"""Of a rank in a step of 16 updates."""


def now() -> float:
    return wall(time.monotonic())


def microseconds(work: Callable[[], object], times: int = 20_000) -> float:
    began = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - began) / times * 1e6


def made_up_step(args: argparse.Namespace) -> Tracer:
    tracer = Tracer()
    engines, servers = args.ranks // 2 or 1, args.ranks // 4 or 1
    for role, count in (("policy", args.ranks), ("rollout", engines), ("genrm", servers)):
        for rank in range(count):
            tracer.register(Process(role, rank), [f"{rank}"], f"http://{role}-{rank}")
    tracer.begin()
    with tracer.on(DRIVER, "rollout"):
        for i in range(args.samples):
            tracer.count(f"rollout-{i % engines}", 1)
        for i in range(args.samples):
            tracer.count(f"rollout-{i % engines}", -1, 900)
            if i < args.judged * args.samples:
                tracer.count(f"http://genrm-{i % servers}", 1)
                tracer.count(f"http://genrm-{i % servers}", -1)
    with tracer.on(DRIVER, "train"):
        for rank in range(args.ranks):
            began = now()
            tracer.add(
                f"policy-{rank}", [Span(name, began + i * 1e-6, now() + i * 1e-6) for i, name in enumerate(SPANS)]
            )
    return tracer


def answer(pipe: Connection) -> None:
    while pipe.recv():
        pipe.send(now())


def clocks_apart() -> tuple[float, float]:
    """Seconds by which the clock of another process is ahead, and half of the quickest round trip."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=answer, args=(theirs,))
    process.start()
    trips = []
    for _ in range(1000):
        asked = now()
        ours.send(True)
        there = ours.recv()
        trips.append((now() - asked, there - (asked + now()) / 2))
    ours.send(False)
    process.join()
    took, ahead = min(trips)
    return ahead, took / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=64, help="policy ranks; half as many engines, a quarter servers")
    parser.add_argument("--samples", type=int, default=8192, help="of the step")
    parser.add_argument("--judged", type=float, default=0.6, help="share of them")
    args = parser.parse_args()
    tracer = Tracer()
    tracer.begin()

    def span() -> None:
        with tracer.on("policy-0", "train"):
            pass

    row = {"span_us": microseconds(span), "count_us": microseconds(lambda: tracer.count("rollout-0", 1))}
    tracer = made_up_step(args)
    began = time.process_time()
    taken = tracer.take()
    summary = summarize(1, taken, tracer.tracks)
    row["summary_s"] = time.process_time() - began
    with tempfile.TemporaryDirectory() as directory:
        began = time.process_time()
        write_step(Path(directory), taken, tracer.tracks, summary)
        row["write_s"] = time.process_time() - began
        row["file_kb"] = step_file(Path(directory), 1).stat().st_size / 1e3
    row["spans"] = sum(map(len, taken.spans.values()))
    row["changes"] = sum(map(len, taken.changes.values()))
    ahead, uncertain = clocks_apart()
    row |= {"clock_ahead_us": ahead * 1e6, "clock_uncertain_us": uncertain * 1e6}
    print(json.dumps({name: round(value, 3) for name, value in row.items()}))


if __name__ == "__main__":
    main()
