"""fapo, TRL and verl on the same step of the same machine, one after the other, each in a process of its own.

    python benchmarks/gpu/against/compare.py OUT --tokenizer FOLDER --path trl=DIR verl=DIR      # one GPU of 80 GB
    python benchmarks/gpu/against/compare.py OUT --tokenizer FOLDER --only ours:resident ours:turns verl:padded
    python benchmarks/gpu/against/compare.py OUT --device cpu --tiny --steps 3 --only ours      # on a laptop

The step: 64 prompts x 8 samples x 512 response tokens of Qwen2.5-0.5B's shape with random weights, one AdamW update.
--only names systems, each with a variant of its script where one is wanted (SYSTEM:VARIANT). A system may have an
interpreter (--python NAME=FILE) or folders before all others on its PYTHONPATH (--path NAME=DIR) of its own; what it is
told beyond its script goes by --set NAME:KEY=VALUE. A system that is in OUT/compare.json is not run again: the same
command goes on. Seconds of a step are from the end of one to the end of the next, by this machine's clock, and the
table has medians after the first two; phases are as each system counts them. Memory is the most that nvidia-smi said
the card held, by all processes, within the run.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import model

HERE = Path(__file__).resolve().parent
SYSTEMS = ("ours", "trl", "verl")
WARMUP = 2
FREE_MIB, FREE_WAIT_S = 2048, 60.0
"""A card counts as empty below this; a system that left more than that to the next would slow it down unseen."""


def nvidia_smi(*words: str) -> list[str]:
    command = ["nvidia-smi", *words, "--format=csv,noheader,nounits"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")


def card() -> str:
    name, memory, driver = nvidia_smi("--query-gpu=name,memory.total,driver_version")[0].split(", ")
    return f"{name}, {memory} MiB, driver {driver}"


def wait_for_empty_card() -> None:
    """
    Raises:
        SystemExit: processes of others, or what a system left, still hold memory of it.
    """
    deadline = time.monotonic() + FREE_WAIT_S
    while (used := int(nvidia_smi("--query-gpu=memory.used")[0])) > FREE_MIB:
        if time.monotonic() > deadline:
            raise SystemExit(f"the card holds {used} MiB before a run; end what uses it (nvidia-smi) and go on")
        time.sleep(1)


@contextlib.contextmanager
def sampled_memory(out: Path) -> Iterator[None]:
    """Write the card's memory in use, MiB, ten times a second."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "100"]
    with out.open("w") as file, subprocess.Popen(command, stdout=file) as process:
        try:
            yield
        finally:  # else a system past its limit would have this wait for nvidia-smi, which never ends
            process.terminate()


def run(args: argparse.Namespace, system: str, variant: str) -> dict[str, Any]:
    """One system's steps, with what the run took as a whole.

    Raises:
        SystemExit: it failed; its log is OUT/SYSTEM-VARIANT.log.
    """
    name = "-".join(filter(None, (system, variant)))
    command = [args.python.get(system, sys.executable), str(HERE / f"run_{system}.py"), str(args.out)]
    command += ["--steps", str(args.steps), "--device", args.device, *(["--tiny"] if args.tiny else [])]
    command += ["--variant", variant] if variant else []
    command += ["--set", *settings] if (settings := [s for who, s in args.set if who == system]) else []
    paths = [*(path for who, path in args.path if who == system), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    result, log, began = args.out / f"{system}.json", args.out / f"{name}.log", time.monotonic()
    result.unlink(missing_ok=True)
    gpu = args.device == "gpu"
    if gpu:
        wait_for_empty_card()
    print(f"{name}: {' '.join(command)}", flush=True)
    memory = args.out / f"{name}.mib"
    with log.open("w") as file, sampled_memory(memory) if gpu else contextlib.nullcontext():
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(args.limit_s)
        finally:
            with contextlib.suppress(ProcessLookupError):  # what it has started would hold the card of the next
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code:
        tail = log.read_text(errors="replace")[-3000:]
        raise SystemExit(f"{tail}\n{name} ended with exit code {code}; all that it said is in {log}")
    found = json.loads(result.read_text()) | {"command": command, "wall_s": time.monotonic() - began}
    return found | ({"peak_mib": max(map(int, memory.read_text().split()))} if gpu else {})


def summary(found: dict[str, Any], step: model.Step, gpus: int = 1) -> dict[str, float]:
    """Medians after the warm-up: seconds of a step and of its phases, and response tokens per second and GPU."""
    steps = found["steps"]
    seconds = [later["ended_s"] - one["ended_s"] for one, later in itertools.pairwise(steps)][WARMUP - 1 :]
    counted = steps[WARMUP:]
    if not counted:
        raise SystemExit(f"a table needs more than {WARMUP} steps")
    row = {"step_s": statistics.median(seconds)}
    row |= {f"{phase}_s": statistics.median(each["phases"][phase] for each in counted) for phase in model.PHASES}
    row["other_s"] = row["step_s"] - sum(row[f"{phase}_s"] for phase in model.PHASES)
    tokens = statistics.median(each["response_tokens"] for each in counted) * step.prompts * step.samples
    row["tokens_per_s_gpu"] = tokens / row["step_s"] / gpus
    row["start_s"] = found["wall_s"] - (steps[-1]["ended_s"] - steps[0]["ended_s"])
    return row | ({"peak_gib": found["peak_mib"] / 1024} if "peak_mib" in found else {})


def table(results: dict[str, Any], step: model.Step) -> str:
    rows = {name: summary(found, step) for name, found in results.items()}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = ["| system | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = (f"{row[c]:.4g}" if c in row else "" for c in columns)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        *(f"reward of {n}: " + " ".join(f"{s['reward']:.4f}" for s in r["steps"]) for n, r in results.items()),
    ]
    return "\n".join(lines)


def pair(separator: str) -> Any:
    def split(text: str) -> tuple[str, str]:
        system, found, value = text.partition(separator)
        if system not in SYSTEMS or not found:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not NAME{separator}VALUE with a NAME of {', '.join(SYSTEMS)}"
            )
        return system, value

    return split


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", default=list(SYSTEMS), metavar="SYSTEM[:VARIANT]")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--tokenizer", type=Path, help="folder with the tokenizer files of Qwen2.5")
    parser.add_argument("--python", nargs="*", type=pair("="), default=[], metavar="NAME=FILE")
    parser.add_argument("--path", nargs="*", type=pair("="), default=[], metavar="NAME=DIR")
    parser.add_argument("--set", nargs="*", type=pair(":"), default=[], metavar="NAME:KEY=VALUE")
    parser.add_argument("--limit-s", type=float, default=560.0, help="for one system")
    args = parser.parse_args()
    args.out, args.python = args.out.resolve(), dict(args.python)
    if unknown := {name.partition(":")[0] for name in args.only} - set(SYSTEMS):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(SYSTEMS)}")
    if not args.tiny and args.tokenizer is None:
        parser.error("--tokenizer is needed, or --tiny")
    return args


def main() -> int:
    args = parse()
    step, kept = model.TINY if args.tiny else model.FULL, args.out / "compare.json"
    if not (args.out / "prompt_tokens").exists():
        make = [sys.executable, str(HERE / "model.py"), str(args.out), "--steps", str(args.steps)]
        subprocess.run([*make, *(["--tiny"] if args.tiny else ["--tokenizer", str(args.tokenizer)])], check=True)
    whole = json.loads(kept.read_text()) if kept.exists() else {"systems": {}}
    whole |= {"machine": card() if args.device == "gpu" else platform.machine(), "step": vars(step)}
    failed = []
    for name in args.only:
        system, _, variant = name.partition(":")
        if name not in whole["systems"]:
            try:
                whole["systems"][name] = run(args, system, variant)
            except (SystemExit, subprocess.TimeoutExpired) as error:  # the others' rows are worth having
                print(error, file=sys.stderr, flush=True)
                failed.append(name)
                continue
            whole["summary"] = {each: summary(found, step) for each, found in whole["systems"].items()}
            kept.write_text(json.dumps(whole, indent=1) + "\n")
        print(table(whole["systems"], step), flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
