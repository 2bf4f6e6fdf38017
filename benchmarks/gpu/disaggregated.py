"""Policy, engines and GenRM on GPUs of their own, synchronous and asynchronous: seconds of a step, and who idles.

    python benchmarks/gpu/disaggregated.py OUT --gpus 4 --policy MODEL --judge MODEL --data gsm8k-train.jsonl
    python benchmarks/gpu/disaggregated.py OUT --gpus 3 --device cpu     # the layout of 3 GPUs with tiny models

| --gpus | policy | engines | GenRM |
|---|---|---|---|
| 2 | one rank | 1 | none: rewards by the rule alone |
| 3 | one rank | 1 | 1 |
| 4 | TP2+SP | 1 | 1 |

Two runs of `fapo train` with the same seed, prompts and sizes: engines wait for the policy and the policy for them;
and `training.asynchrony.max_staleness=1` with `algorithm.tis_cap=2`, new weights going in between the tokens of
samples (`weight_sync.in_flight`). A step's seconds are those between its line of metrics and the one before. Idle
are, by nvidia-smi, each card's share of time without a kernel; by the run's own trace, each role's without work.
Fails if a run ends otherwise than with 0, a step is missing, policy and engine disagree in the synchronous run,
tokens of the asynchronous one are older than allowed or none is older than the policy, or memory grows (runs.py).
OUT/disaggregated.json has both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import runs
from benchmarks.gpu.one_gpu import GRAPHS, MODELS, plain_rows
from megatron_fapo.data.datasets import write_testbed

ASYNCHRONOUS = {"training.asynchrony.max_staleness": 1, "weight_sync.in_flight": True, "algorithm.tis_cap": 2.0}
SHOWN = ("phase_s/", "weight_sync/", "mismatch/", "score/", "staleness/", "trace/", "response/", "genrm/latency")


def overrides(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Of the run `name`. On GPUs a step of 256 samples of up to 512 tokens."""
    tensor, judged, gpu = (2 if args.gpus == 4 else 1), args.gpus > 2, args.device == "gpu"
    values: dict[str, Any] = {
        "run_dir": args.out / name,
        "device": args.device,
        "data.train": f"[{args.data}]",
        "data.max_prompt_tokens": 512 if gpu else 256,
        "policy.model_path": args.policy,
        "policy.parallel.tensor": tensor,
        "policy.parallel.sequence_parallel": tensor > 1,
        "policy.optimizer.lr": 2e-6,
        "policy.optimizer.warmup_steps": 2,
        "policy.micro_batch_tokens": 16384,
        "rollout.samples_per_prompt": 8,
        "rollout.max_response_tokens": 512 if gpu else 112,
        "genrm.enabled": judged,
        "reward.max_unscored_share": args.max_unscored,
        "reward.overlong.buffer_tokens": 128 if gpu else 32,
        "training.steps": args.steps,
        "training.prompts_per_step": 32 if gpu else 4,
        "training.prompts_per_mini_batch": 16 if gpu else 2,
        "training.checkpoint.every_steps": 0,
        "training.evaluation.every_steps": 0,
    }
    if judged:
        values |= {
            "genrm.model_path": args.judge,
            "genrm.max_model_len": 2048 if gpu else 768,
            "genrm.max_tokens": 384 if gpu else 256,
        }
    if gpu:
        values |= {"rollout.gpu_memory_utilization": 0.8, "rollout.vllm.compilation_config": GRAPHS}
        values |= {"genrm.gpu_memory_utilization": 0.8, "genrm.vllm.compilation_config": GRAPHS} if judged else {}
    return values | plain_rows(args.data) | (ASYNCHRONOUS if name == "async" else {})


def row(attempt: Mapping[str, Any], records: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Of one run, over the steps after the second: compilation and first allocations are over then."""
    at = {moment["step"]: moment["at"] for moment in attempt["moments"]}
    seconds = {step: at[step] - at[before] for before, step in pairwise(sorted(at)) if step > 2}
    step_s = statistics.median(seconds.values())
    settled = [record for record in records if record["step"] > 2]
    tokens = statistics.median(r["response/tokens_mean"] * r["score/samples"] for r in settled)
    return {
        "step_s": round(step_s, 3),
        "response_tokens_per_s": round(tokens / step_s),
        "genrm_share": round(statistics.median(r["phase_s/score_tail"] for r in settled) / step_s, 3),
        "idle_by_role": {
            name.rpartition("/")[2]: x for name, x in runs.medians(settled, ("trace/idle_share/",)).items()
        },
        "idle_by_card": {card: seen["idle_share"] for card, seen in attempt["cards"].items()},
        "peak_mib_by_card": {card: seen["peak_mib"] for card, seen in attempt["cards"].items()},
        "medians": runs.medians(settled, SHOWN),
    }


def measure(args: argparse.Namespace, name: str) -> tuple[dict[str, Any], list[str]]:
    """One run: its row, and what is wrong."""
    run = args.out / name
    command = runs.fapo("train", *runs.words(overrides(args, name)), *args.overrides)
    attempt = runs.attempt(run, args.out / f"{name}.log", command, args.limit)
    records = runs.records_of(run)
    limit = float("inf") if name == "async" else runs.limit_of_mismatch(args.device)
    faults = [f"exit code {attempt['code']}: see {args.out / name}.log"] if attempt["code"] else []
    faults += runs.step_faults(records, args.steps, limit) + runs.file_faults(run, [int(r["step"]) for r in records])
    if len(records) < 4:
        return {"seconds": attempt["seconds"]}, faults
    facts = {"command": attempt["command"], "seconds": attempt["seconds"]} | row(attempt, records)
    facts["growth"], wrong = runs.grown(attempt["moments"], records)
    return facts, faults + wrong + (age_faults(records) if name == "async" else [])


def age_faults(records: Sequence[Mapping[str, float]]) -> list[str]:
    """Tokens that are older than ASYNCHRONOUS allows; or none that are older than the policy, as if it waited."""
    ages = [record.get("staleness/max", 0.0) for record in records]
    limit = ASYNCHRONOUS["training.asynchrony.max_staleness"]
    found = [
        f"step {i}: tokens are {age:g} versions old, more than {limit}" for i, age in enumerate(ages, 1) if age > limit
    ]
    return found if any(ages) else [*found, "no step trained on tokens of an older version: nothing was asynchronous"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gpus", type=int, choices=(2, 3, 4), required=True)
    parser.add_argument("--policy", type=Path, default=MODELS / "policy")
    parser.add_argument("--judge", type=Path, default=MODELS / "genrm")
    parser.add_argument("--data", type=Path, help="rows of GSM8K or of the recipe; default: the testbed's")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="gpu")
    parser.add_argument("--runs", nargs="+", choices=("sync", "async"), default=["sync", "async"])
    parser.add_argument("--steps", type=int, default=12, help="of each run")
    parser.add_argument("--limit", type=float, default=300.0, metavar="S", help="of each run")
    parser.add_argument("--max-unscored", type=float, default=0.5, help="share of samples (reward.max_unscored_share)")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    args = parser.parse_intermixed_args()
    args.out, args.policy, args.judge = args.out.resolve(), args.policy.resolve(), args.judge.resolve()
    args.data = args.data.resolve() if args.data else write_testbed(args.out / "data", 512, 8, seed=0)[0]
    found, faults = {}, []
    for name in args.runs:
        found[name], wrong = measure(args, name)
        faults += [f"{name}: {each}" for each in wrong]
        print(name, json.dumps({k: v for k, v in found[name].items() if k not in ("medians", "growth", "command")}))
        for key, value in found[name].get("medians", {}).items():
            if key.startswith(("phase_s/", "staleness/", "trace/")):
                print(f"  {key:<40} {value:10.4g}")
    return runs.finish(args.out, "disaggregated", {"gpus": args.gpus} | found, faults)


if __name__ == "__main__":
    sys.exit(main())
