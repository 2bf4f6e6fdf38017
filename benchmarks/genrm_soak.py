"""Verdicts by the ten thousand from servers that are killed and frozen at random: nothing lost, nothing left behind.

    python benchmarks/genrm_soak.py [--verdicts 20000] [--seed 0] [--json FILE]

Right answers go through the RewardLoop in steps of 1,000, to four judges in processes of their own
(benchmarks/judges/server.py) that are killed (SIGKILL, back on the same port) or frozen (SIGSTOP, for longer than a
request may take or shorter) all the time. After each step: memory, Python objects, open files and asyncio tasks of our
process. Fails if a sample has no outcome or two, if the counters do not add up, if a verdict is wrong, or if something
grows.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.judges.problems import Problem, make_problem
from megatron_fapo.config.genrm import GenRMConfig
from megatron_fapo.config.reward import RewardConfig
from megatron_fapo.data.records import Prompt, Sample, SampleKey
from megatron_fapo.genrm.reward_loop import RewardLoop

ROOT = Path(__file__).parents[1]
SERVERS, SLOTS, IN_FLIGHT = 4, 16, 64
GENRM = GenRMConfig(
    request_timeout_s=4.0, deadline_s=300.0, max_attempts=12, max_concurrent_per_server=2 * SLOTS, max_tokens=1024
)
REWARD = RewardConfig.model_validate(
    {"verifier": "recipe_string", "verifier_processes": 1, "overlong": {"enabled": False}}
)
VERDICTS_OF_A_FAULT = 150
"""One fault for so many verdicts, in the mean: by progress, so that a slow machine does not see more of them."""
GROWN_MIB, GROWN_OBJECTS, GROWN_FILES = 24.0, 1000, IN_FLIGHT + 8
"""More than this since the first quarter is a leak. Connections are kept, as many as were open at once."""


@dataclass(frozen=True)
class Reading:
    """Our process, between steps."""

    verdicts: int
    memory_mib: float
    """Resident."""
    objects: int
    files: int
    tasks: int


@dataclass
class Soak:
    """What happened."""

    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    """`sound`, `flawed`, or the reason why a sample is unscored."""
    wrong: int = 0
    twice: int = 0
    lost: int = 0
    counted: Counter[str] = field(default_factory=Counter)
    """`called`, `answered`, `unscored`, `retries`, `failed/...` of the client, over all steps."""
    faults: Counter[str] = field(default_factory=Counter)
    readings: list[Reading] = field(default_factory=list)

    def problems(self) -> list[str]:
        """What must not be."""
        total, counted = sum(self.outcomes.values()), self.counted
        unscored = total - self.outcomes["sound"] - self.outcomes["flawed"]
        found = [f"{getattr(self, what)} samples {what}" for what in ("wrong", "twice", "lost") if getattr(self, what)]
        if (counted["called"], counted["answered"], counted["unscored"]) != (total, total - unscored, unscored):
            found.append(f"the client counted {dict(counted)}, and there were {total} samples, {unscored} unscored")
        first, last = self.readings[len(self.readings) // 4], self.readings[-1]
        limits = {"memory_mib": GROWN_MIB, "objects": GROWN_OBJECTS, "files": GROWN_FILES, "tasks": 4}
        for what, limit in limits.items():
            grown = getattr(last, what) - getattr(first, what)
            if grown > limit:
                found.append(f"{what} grew by {grown:g} from {first.verdicts} to {last.verdicts} verdicts")
        return found


class Judges:
    """Four judges, each on a port that it keeps."""

    def __init__(self) -> None:
        self.ports = [0] * SERVERS
        self._suffering: dict[int, asyncio.Task[None]] = {}
        self._processes = [self._start(index) for index in range(SERVERS)]
        for index, process in enumerate(self._processes):
            assert process.stdout is not None
            self.ports[index] = int(process.stdout.readline())

    def _start(self, index: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "benchmarks.judges.server", str(index), str(SLOTS), str(self.ports[index])]
        return subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)

    def torment(self, rng: random.Random, faults: Counter[str]) -> None:
        """Kill one and bring it back, or freeze one, unless it suffers already. All may be away at once."""
        index, fault = rng.randrange(SERVERS), rng.choice(("killed", "frozen"))
        if index not in self._suffering:
            faults[fault] += 1
            task = asyncio.create_task(self._suffer(index, fault, rng.uniform(0.1, 1.5 * GENRM.request_timeout_s)))
            self._suffering[index] = task
            task.add_done_callback(lambda _: self._suffering.pop(index))

    async def relief(self) -> None:
        """Until all are back."""
        await asyncio.gather(*self._suffering.values())

    async def _suffer(self, index: int, fault: str, seconds: float) -> None:
        process = self._processes[index]
        process.send_signal(signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
        await asyncio.sleep(seconds)
        if fault == "frozen":
            process.send_signal(signal.SIGCONT)
            return
        self._reap(process)
        self._processes[index] = process = self._start(index)
        assert process.stdout is not None
        await asyncio.to_thread(process.stdout.readline)  # it is left alone until it is up

    @staticmethod
    def _reap(process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()

    def close(self) -> None:
        for process in self._processes:
            self._reap(process)


def sample_of(problem: Problem) -> Sample:
    prompt = Prompt(f"soak/{problem.number}", "soak", (), problem.ground_truth, problem.question)
    return Sample(SampleKey(prompt.prompt_id, 0, 0), prompt, (0,) * 64, (), problem.solution, "stop", 0)


def read_off(verdicts: int) -> Reading:
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    tasks = [task for task in asyncio.all_tasks() if not task.done()]
    return Reading(verdicts, resident, len(gc.get_objects()), len(os.listdir("/proc/self/fd")), len(tasks))


async def soak(verdicts: int, seed: int, step: int = 1000) -> Soak:
    """So many right answers, `step` at a time."""
    result, judges = Soak(), Judges()
    urls = [f"http://127.0.0.1:{port}/v1" for port in judges.ports]
    try:
        async with RewardLoop(REWARD, GENRM, urls, 1024, max_in_flight=IN_FLIGHT) as loop:
            began = time.monotonic()
            rng = random.Random(seed)
            for start in range(0, verdicts, step):
                numbers = range(start, min(start + step, verdicts))
                await _step(loop, numbers, result, lambda: judges.torment(rng, result.faults), rng)
                await judges.relief()
                result.readings.append(read_off(numbers.stop))
            result.seconds = time.monotonic() - began
    finally:
        judges.close()
    return result


async def _step(
    loop: RewardLoop, numbers: range, result: Soak, torment: Callable[[], None], rng: random.Random
) -> None:
    async def samples() -> AsyncIterator[Sample]:
        for number in numbers:
            yield sample_of(make_problem(0, number))

    loop.begin_step()
    seen: set[str] = set()
    async with aclosing(loop.score_stream(samples())) as stream:
        async for scored in stream:
            if rng.random() < 1 / VERDICTS_OF_A_FAULT:
                torment()
            name, reward = scored.sample.key.prompt_id, scored.score.reward
            result.twice += name in seen
            seen.add(name)
            outcomes = {1.0: "sound", 0.0: "flawed", None: str(scored.score.unscored_reason)}
            result.outcomes[outcomes[reward]] += 1
            truth = make_problem(0, int(name.partition("/")[2]))
            result.wrong += reward is not None and reward != (0.0 if truth.flawed else 1.0)
    result.lost += len(numbers) - len(seen)
    for name, value in loop.metrics().items():
        what = name.removeprefix("genrm/")
        if what in ("called", "answered", "unscored", "retries", "hedges") or what.startswith("failed/"):
            result.counted[what] += round(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verdicts", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = asyncio.run(soak(args.verdicts, args.seed))
    for reading in result.readings:
        print("  ".join(f"{name} {value:,.0f}" for name, value in asdict(reading).items()))
    print(f"{args.verdicts / result.seconds:.0f} verdicts/s for {result.seconds:.0f} s; faults {dict(result.faults)}")
    print(f"outcomes {dict(result.outcomes)}; counted {dict(result.counted)}")
    problems = result.problems()
    print("\n".join(problems) or "all accounted for, none wrong, nothing grew")
    if args.json:
        readings = [asdict(reading) for reading in result.readings]
        args.json.write_text(json.dumps(vars(result) | {"readings": readings, "problems": problems}, indent=1) + "\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
