"""Policy and engine in turns on one GPU: a few steps of training, and the ledger of every phase.

    python benchmarks/colocated_gpu.py OUT [--hidden 576 --layers 30] [--steps 3] [dotted overrides]

Writes a random model and testbed prompts into OUT, trains with `policy.offload` and `rollout.colocated`, saves a
checkpoint after each step (so that engines are put to sleep and woken again in between), and prints one table: GiB by
phase. Fails if something that a phase does not need was on the GPU, if a leak was logged, or if policy and engine
disagree after a refit into memory that slept. With `--device cpu` a tiny run on a laptop, where engines keep their
memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from megatron_fapo.config.load import load_config
from megatron_fapo.data.datasets import write_testbed
from megatron_fapo.data.tokenizer import init_tiny_model
from megatron_fapo.policy.memory import PARTS, PLAN
from megatron_fapo.training.loop import train_command

MISMATCH = {"bfloat16": 0.05, "float32": 1e-3}
"""Mean difference of log-probabilities, nats, that rounding explains."""


def reward_of_length(data_source: str, solution_str: str, ground_truth: str, extra_info: dict, **_: object) -> float:
    """A reward that a random model can earn, so that there are gradients."""
    del data_source, ground_truth, extra_info
    return (sum(map(ord, solution_str)) % 97) / 97 - 0.5


def overrides(args: argparse.Namespace) -> list[str]:
    values: dict[str, Any] = {
        "run_dir": args.out / "run",
        "device": args.device,
        "data.train": f"[{args.out / 'data' / 'train.jsonl'}]",
        "data.max_prompt_tokens": 256,
        "policy.model_path": args.out / "model",
        "policy.offload": True,
        "policy.optimizer.warmup_steps": 0,
        "policy.micro_batch_tokens": 8192,
        "rollout.colocated": True,
        "rollout.gpu_memory_utilization": 0.8,
        "rollout.samples_per_prompt": 8,
        "rollout.max_response_tokens": 256 if args.device == "gpu" else 24,
        "reward.compute_score": f"{Path(__file__).resolve()}:reward_of_length",
        "reward.overlong.enabled": False,
        "genrm.enabled": False,
        "training.steps": args.steps,
        "training.prompts_per_step": 64 if args.device == "gpu" else 4,
        "training.prompts_per_mini_batch": 32 if args.device == "gpu" else 2,
        "training.checkpoint.every_steps": 1,
        "training.checkpoint.keep": 1,
    }
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()]


def table(record: dict[str, float]) -> list[str]:
    """The ledger of one step: a row per phase."""
    rows: dict[str, dict[str, float]] = {}
    for key, value in record.items():
        if key.startswith("memory/"):
            _, phase, name = key.split("/")
            rows.setdefault(phase, {})[name.removesuffix("_gib")] = value
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [" ".join([f"{'':<11}", *(f"{name:>10}" for name in columns)])]
    for phase, row in rows.items():
        cells = (f"{row[name]:>10.3f}" if name in row else f"{'':>10}" for name in columns)
        lines.append(" ".join([f"{phase:<11}", *cells]))
    return lines


def faults(records: list[dict[str, float]], logs: str, dtype: str) -> list[str]:
    found = [line for line in logs.splitlines() if "memory leak" in line]
    for record in records:
        for phase, needed in PLAN.items():
            held = [part for part in PARTS if part not in needed and record.get(f"memory/{phase}/{part}_gib", 0.0) > 0]
            found += [f"step {record['step']}: {part} on the device in {phase}" for part in held]
        if record["mismatch/abs_mean"] > MISMATCH[dtype]:
            found.append(f"step {record['step']}: policy and engine differ by {record['mismatch/abs_mean']:.4f} nats")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="gpu")
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    args.out = args.out.resolve()
    heads = {"num_attention_heads": args.hidden // 64, "num_key_value_heads": args.hidden // 64, "head_dim": 64}
    sizes = heads | {"hidden_size": args.hidden, "intermediate_size": 8 * args.hidden // 3 // 64 * 64}
    if args.device == "gpu":
        sizes |= {"num_hidden_layers": args.layers, "initializer_range": 0.02}
    init_tiny_model(args.out / "model", 0, **(sizes if args.device == "gpu" else {}))
    write_testbed(args.out / "data", 64 * args.steps, 8, seed=0)
    config = load_config([], [*overrides(args), *args.overrides]).config
    if code := train_command(config, resume=None):
        return code
    run = args.out / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        print(f"step {record['step']}, mismatch {record['mismatch/abs_mean']:.5f} nats")
        print("\n".join(table(record)))
    phases = sorted({key for record in records for key in record if key.startswith("phase_s/")})
    print(json.dumps({key: statistics.median(r[key] for r in records if key in r) for key in phases}))
    logs = "".join(path.read_text(errors="replace") for path in (run / "logs").glob("policy-*.log"))
    problems = faults(records, logs, "bfloat16" if args.device == "gpu" else "float32")
    print("\n".join(problems) or "every phase held what it needs and nothing else")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
