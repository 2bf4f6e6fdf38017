"""What the scripts of this directory share: `fapo train` in a process of its own that is watched from outside, and
questions to the records that it leaves.

Whether memory grows is told by slope: the median slope over all pairs of steps (Theil-Sen, which single jumps and
noise do not move), once the first SETTLED steps of a process are over, times the steps that follow. More than TOLERANCE
is a fault. Asked of every process (resident memory, open files, sockets, threads) and of every entry of the policy's
ledger (docs/memory.md).
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.phase_switches import held
from benchmarks.run_table import machine
from megatron_fapo.observe.metrics import FILE, read_metrics
from megatron_fapo.policy.memory import PARTS, PLAN

ROOT = Path(__file__).resolve().parents[2]
SETTLED = 5
"""Steps of a process in which workspaces, caches and the C allocator come to their size."""
TOLERANCE = {"resident_mib": 128.0, "files": 4.0, "sockets": 64.0, "threads": 4.0, "owned": 1.0, "ledger": 256.0}
"""Growth from the first settled step to the last: of processes, whose sockets are as many as verdicts were ever asked
for at once; of what the policy owns, MiB; of the ledger's other entries, MiB, where batches of other sizes leave other
caches."""
OWNED = (*(f"{part}_gib" for part in PARTS), "pinned_gib")
_POLL_S = 0.1
_END_S = 120.0
"""For a run that was asked to save and stop."""
Series = dict[int, float]
"""Step -> value."""


def limit_of_mismatch(device: str) -> float:
    """Most that mismatch/token_mult_prob_error may be: in float32 on a `cpu`, in bfloat16 on a `gpu`."""
    return 1.001 if device == "cpu" else 1.01


def words(values: Mapping[str, Any]) -> list[str]:
    """Overrides as the command line takes them."""
    return [f"{key}={json.dumps(value) if isinstance(value, bool | dict) else value}" for key, value in values.items()]


def fapo(*arguments: str) -> list[str]:
    """The command of `fapo`, which need not be on PATH."""
    return [sys.executable, "-m", "megatron_fapo.cli", *arguments]


def attempt(run: Path, log: Path, command: Sequence[str], limit_s: float) -> dict[str, Any]:
    """Run `command`, which trains in `run`, until it ends; past the limit it is asked to save and stop.

    Returns:
        `code`, `began` (Unix time), `seconds`, `command`; `moments`, one for each step, with its Unix time and what
        every process holds as its line of metrics appears; `cards`, by index, as nvidia-smi saw them from the first of
        these to the last.
    """
    began, metrics = time.time(), run / FILE
    moments: list[dict[str, Any]] = []
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output, _watched_cards(log.with_suffix(".csv")):
        newest = _newest_step(metrics)
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
        asked = False
        try:
            while process.poll() is None:
                if (step := _newest_step(metrics)) > newest:
                    newest = step
                    moments.append({"step": step, "at": time.time(), "processes": _held_below(process.pid)})
                if time.time() - began > limit_s and not asked:
                    asked = True
                    process.terminate()
                if time.time() - began > limit_s + _END_S:
                    raise TimeoutError(f"{log}: did not stop within {_END_S:g} s of being asked to")
                time.sleep(_POLL_S)
        finally:
            if process.poll() is None:
                process.kill()  # its guard ends what is below it
                process.wait()
    cards = _cards(log.with_suffix(".csv"), moments)
    seconds = round(time.time() - began, 1)
    facts = {"command": list(command), "code": process.returncode, "began": began, "seconds": seconds}
    return facts | {"moments": moments, "cards": cards}


def _newest_step(metrics: Path) -> int:
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines and lines[-1].endswith("}") else 0


def _held_below(pid: int) -> dict[str, dict[str, float]]:
    try:
        driver = psutil.Process(pid)
        found = {each.pid: held(each) for each in (driver, *driver.children(recursive=True))}
    except psutil.NoSuchProcess:
        return {}
    # Ray adds the method that runs: `ray::PolicyActor.train` must be the same series at every step.
    return {
        f"{h.title.partition('.')[0]} ({pid})": {
            "resident_mib": h.resident_mib,
            "threads": h.threads,
            **_open_files(pid),
        }
        for pid, h in found.items()
        if h
    }


def _open_files(pid: int) -> dict[str, int]:
    links = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the process has ended
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed since it was listed
                links.append(os.readlink(entry.path))
    sockets = sum(link.startswith("socket:") for link in links)
    return {"files": len(links) - sockets, "sockets": sockets}


@contextlib.contextmanager
def _watched_cards(path: Path) -> Iterator[None]:
    """Have nvidia-smi, where there is one, write what each card does into `path`, five times a second."""
    if shutil.which("nvidia-smi") is None:
        yield
        return
    query = "--query-gpu=timestamp,index,utilization.gpu,memory.used"
    with path.open("wb") as file:
        smi = subprocess.Popen(["nvidia-smi", query, "--format=csv,noheader,nounits", "-lms", "200"], stdout=file)
        try:
            yield
        finally:
            smi.terminate()
            smi.wait()


def _cards(path: Path, moments: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each card between the ends of the first and the last step: share of time with no kernel, most memory."""
    if not path.exists() or len(moments) < 2:
        return {}
    first, last = moments[0]["at"], moments[-1]["at"]
    rows: dict[str, list[tuple[float, float]]] = {}
    with path.open() as file:
        for row in csv.reader(file, skipinitialspace=True):
            if len(row) == 4:  # the last may be cut short
                stamp, _, fraction = row[0].partition(".")
                at = time.mktime(time.strptime(stamp, "%Y/%m/%d %H:%M:%S")) + float(f"0.{fraction or 0}")
                if first <= at <= last:
                    rows.setdefault(row[1], []).append((float(row[2]), float(row[3])))
    return {
        card: {
            "idle_share": round(1 - statistics.mean(u for u, _ in seen) / 100, 3),
            "peak_mib": max(m for _, m in seen),
        }
        for card, seen in rows.items()
    }


def slope(series: Series) -> float:
    """Median over all pairs of steps of the change per step."""
    pairs = itertools.combinations(sorted(series.items()), 2)
    return statistics.median((b - a) / (j - i) for (i, a), (j, b) in pairs)


def growth(moments: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """What is watched in one attempt -> growth over its settled steps, and the tolerance. GiB of the ledger are MiB.

    Raises:
        ValueError: fewer than 5 settled steps.
    """
    settled = [moment["step"] for moment in moments][SETTLED:]
    if len(settled) < 5:
        raise ValueError(f"growth cannot be told from {len(settled)} steps after the first {SETTLED}: run more steps")
    series: dict[tuple[str, str], Series] = {}
    for moment in moments:
        for title, values in moment["processes"].items():
            for kind, value in values.items():
                series.setdefault((f"{title} {kind}", kind), {})[moment["step"]] = value
    for record in records:
        for key, value in record.items():
            if key.startswith("memory/") and key.endswith("_gib") and not key.endswith("peak_gib"):
                kind = "owned" if key.rpartition("/")[2] in OWNED else "ledger"
                series.setdefault((key, kind), {})[int(record["step"])] = value * 1024
    found = {}
    for (name, kind), values in series.items():
        points = {step: value for step, value in values.items() if step in settled}
        if 2 * len(points) > len(settled):  # else a process that came and went
            grown, last = slope(points) * (settled[-1] - settled[0]), points[max(points)]
            found[name] = {"grown": round(grown, 3), "last": round(last, 1), "tolerance": TOLERANCE[kind]}
    return found


def grown(
    moments: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, float]]
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """`growth`, and what is wrong with it; of a run that ended early that it cannot be told, for the rest is worth
    having."""
    try:
        found = growth(moments, records)
    except ValueError as error:
        return {}, [str(error)]
    return found, growth_faults(found)


def growth_faults(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What has grown by more than it may."""
    text = "{name} has grown by {grown:g} to {last:g}, more than {tolerance:g}"
    return [text.format(name=name, **each) for name, each in found.items() if each["grown"] > each["tolerance"]]


def step_faults(records: Sequence[Mapping[str, float]], steps: int, mismatch: float) -> list[str]:
    """Steps that are not there once, in order; and those in which engine and policy disagree.

    Args:
        mismatch: most that mismatch/token_mult_prob_error may be.
    """
    found, seen = [], [int(record["step"]) for record in records]
    if seen != list(range(1, steps + 1)):
        found.append(f"{FILE} has the steps {seen} where 1 to {steps} are due once each")
    key = "mismatch/token_mult_prob_error"
    for record in records:
        if not record.get(key, float("inf")) <= mismatch:
            found.append(f"step {record['step']}: {key} is {record.get(key, 'missing')}, more than {mismatch:g}")
    return found


def ledger_faults(records: Sequence[Mapping[str, float]], run: Path) -> list[str]:
    """What is on the cards in a phase that does not need it, with policy.offload; and leaks that the ranks logged."""
    logs = (run / "logs").glob("policy-*.log")
    found = [line for log in logs for line in log.read_text(errors="replace").splitlines() if "memory leak" in line]
    for record in records:
        for phase, needed in PLAN.items():
            wrong = [part for part in PARTS if part not in needed and record.get(f"memory/{phase}/{part}_gib", 0.0) > 0]
            found += [f"step {record['step']}: {part} on the device in {phase}" for part in wrong]
    return found


def file_faults(run: Path, steps: Sequence[int]) -> list[str]:
    """Missing: the report, and traces of steps where the run writes traces."""
    found = [] if (run / "report.html").is_file() else [f"{run} has no report.html"]
    if (run / "trace").is_dir():
        traced = [path.name for path in (run / "trace").iterdir()]
        missing = [step for step in steps if not any(f"{step:06d}" in name for name in traced)]
        found += [f"{run / 'trace'} lacks the steps {missing}"] if missing else []
    return found


def medians(records: Sequence[Mapping[str, float]], prefixes: Sequence[str]) -> dict[str, float]:
    """Of every metric that begins so, over the records that have it."""
    names = sorted({name for record in records for name in record if name.startswith(tuple(prefixes))})
    return {name: statistics.median(r[name] for r in records if name in r) for name in names}


def ledger_table(record: Mapping[str, float]) -> list[str]:
    """The ledger of one step, GiB: a row for each phase."""
    rows: dict[str, dict[str, float]] = {}
    for key, value in record.items():
        if key.startswith("memory/") and key.count("/") == 2:
            _, phase, name = key.split("/")
            rows.setdefault(phase, {})[name.removesuffix("_gib")] = value
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [" ".join([f"{'':<11}", *(f"{name:>10}" for name in columns)])]
    for phase, row in rows.items():
        cells = (f"{row[name]:>10.3f}" if name in row else f"{'':>10}" for name in columns)
        lines.append(" ".join([f"{phase:<11}", *cells]))
    return lines


def records_of(run: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl of whole steps; none before the first."""
    return [record for record in read_metrics(run) if record["step"] > 0] if (run / FILE).exists() else []


def finish(out: Path, name: str, result: Mapping[str, Any], faults: Sequence[str]) -> int:
    """Write OUT/NAME.json, say what is wrong; returns the exit code."""
    command = " ".join([Path(sys.executable).name, *sys.argv])
    whole = {"command": command, "machine": machine(), **result, "faults": list(faults)}
    path = out / f"{name}.json"
    path.write_text(json.dumps(whole, indent=1) + "\n")
    print("\n".join([*(f"FAULT {fault}" for fault in faults), f"{len(faults)} faults; {path}"]), flush=True)
    return int(bool(faults))
