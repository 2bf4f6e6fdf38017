"""Policy, engine and GenRM server in turns on one GPU: a few steps of training, and the ledger of every phase.

    python benchmarks/colocated_genrm_gpu.py OUT [--policy DIR --judge DIR] [--steps 3] [--share 0.8] [dotted overrides]

Trains with `policy.offload`, `rollout.colocated` and `genrm.colocated`; engine and server may each take --share of the
card, together more than there is, so it only runs if the one that is not at work gives its memory back. The models are
those of examples/ unless others are named, which must be a policy that is sometimes right and a judge that boxes an
index. Prints GiB by phase, what vLLM says it freed, and the seconds that the turns took. Fails if something was on the
card in a phase that does not need it, if no verdict came after the first sleep, if policy and engine disagree, or if
too many right answers are unscored. With `--device cpu` the same on a laptop, where vLLM keeps its memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.colocated_gpu import faults, table
from megatron_fapo.config.load import load_config
from megatron_fapo.data.datasets import write_testbed
from megatron_fapo.training.loop import train_command

MODELS = Path(__file__).parents[1] / "examples" / "models"
FREED = ("Sleep mode freed", "to fall asleep", "to wake up")
"""Of vLLM's lines about sleep."""
SLEEPING_GIB = 4.0
"""Of each vLLM process that sleeps: its CUDA context, graphs and workspaces."""


def overrides(args: argparse.Namespace) -> list[str]:
    gpu = args.device == "gpu"
    values: dict[str, Any] = {
        "run_dir": args.out / "run",
        "device": args.device,
        "data.train": f"[{args.out / 'data' / 'train.jsonl'}]",
        "data.eval.held": args.out / "data" / "eval.jsonl",
        "data.max_prompt_tokens": 256,
        "policy.model_path": args.policy.resolve(),
        "policy.offload": True,
        "policy.optimizer.warmup_steps": 0,
        "policy.micro_batch_tokens": 8192,
        "rollout.colocated": True,
        "rollout.gpu_memory_utilization": args.share,
        "rollout.samples_per_prompt": 8,
        "rollout.max_response_tokens": 112,
        "genrm.colocated": True,
        "genrm.model_path": args.judge.resolve(),
        "genrm.gpu_memory_utilization": args.share,
        "genrm.max_tokens": 256,
        "genrm.max_model_len": 768,
        "genrm.temperature": 0.0,
        "reward.overlong.enabled": False,
        "reward.verifier_processes": 1,
        "training.steps": args.steps,
        "training.prompts_per_step": 64 if gpu else 4,
        "training.prompts_per_mini_batch": 32 if gpu else 2,
        "training.checkpoint.every_steps": 2,
        "training.checkpoint.keep": 1,
        "training.evaluation.every_steps": 2,
    }
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()]


def turn_faults(records: list[dict[str, float]]) -> list[str]:
    """Whoever should sleep and holds memory, and steps without verdicts."""
    found = []
    for record in records:
        if not record["genrm/answered"]:
            found.append(f"step {record['step']}: no verdict")
        for phase in ("judge", "logprobs"):
            on_card, owned = record.get(f"memory/{phase}/card_gib"), record.get(f"memory/{phase}/reserved_gib", 0.0)
            if on_card is not None and on_card - owned > 3 * SLEEPING_GIB:
                found.append(f"step {record['step']}: {on_card - owned:.1f} GiB of others on the card in {phase}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="gpu")
    parser.add_argument("--policy", type=Path, default=MODELS / "policy")
    parser.add_argument("--judge", type=Path, default=MODELS / "genrm")
    parser.add_argument("--share", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    args.out = args.out.resolve()
    write_testbed(args.out / "data", 64 * args.steps, 8, seed=0)
    config = load_config([], [*overrides(args), *args.overrides], "train").config
    if code := train_command(config, resume=None):
        return code
    run = args.out / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["step"]]
    for record in steps:
        print(
            f"step {record['step']}, {record['genrm/answered']:.0f} verdicts, {record['genrm/unscored']:.0f} unscored"
        )
        print("\n".join(table({k: v for k, v in record.items() if k.count("/") == 2})))
    names = sorted({n for r in steps for n in r if n.startswith(("phase_s/", "memory/servers_"))})
    print(json.dumps({name: statistics.median(r[name] for r in steps if name in r) for name in names}))
    logs = {path.name: path.read_text(errors="replace") for path in sorted((run / "logs").glob("*.log"))}
    for name, text in logs.items():
        for line in [line for line in text.splitlines() if any(words in line for words in FREED)][:6]:
            print(f"{name}: {line.rpartition('] ')[2]}")
    gpu = args.device == "gpu"
    policy_logs = "".join(text for name, text in logs.items() if name.startswith("policy-"))
    problems = faults(steps, policy_logs, "bfloat16" if gpu else "float32")
    problems += turn_faults(steps)
    print("\n".join(problems) or "every phase held what it needs and nothing else")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
