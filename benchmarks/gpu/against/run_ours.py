"""`fapo train` on the step of model.py: benchmarks/gpu/against/ours.yaml.

    python benchmarks/gpu/against/run_ours.py OUT [--variant resident] [--set policy.micro_batch_tokens=16384]

Variants: `resident` keeps policy and engine on the card; `turns` lets the engine sleep while the policy works and the
policy rest in host memory while the engine does (docs/memory.md).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import model

HERE = Path(__file__).resolve().parent
VARIANTS = {
    "resident": [],
    "turns": [
        *("gpu_share=1", "policy.offload=true", "rollout.colocated=true", "rollout.gpu_memory_utilization=0.6"),
        "rollout.vllm={}",
    ],
}


def main() -> None:
    args = model.arguments(__doc__, VARIANTS, "resident")
    run, step = args.out / "ours", args.step
    settings = [
        *(f"run_dir={run}", f"device={args.device}", f"data.train=[{args.out / 'prompts.parquet'}]"),
        *(f"policy.model_path={args.out / 'model'}", f"reward.compute_score={HERE / 'reward.py'}:compute_score"),
        *(f"training.steps={args.steps}", f"training.prompts_per_step={step.prompts}"),
        *(f"training.prompts_per_mini_batch={step.prompts}", f"rollout.samples_per_prompt={step.samples}"),
        f"rollout.max_response_tokens={step.tokens}",
    ]
    if args.device == "cpu":
        settings += ["rollout.vllm={}", "reward.verifier_processes=1"]
    command = [sys.executable, "-m", "megatron_fapo.cli", "train", "-c", str(HERE / "ours.yaml"), *settings]
    paths = os.pathsep.join(filter(None, (str(HERE.parents[2]), os.environ.get("PYTHONPATH"))))
    lines = model.follow([*command, *args.chosen], run / "metrics.jsonl", env=os.environ | {"PYTHONPATH": paths})
    records = []
    for ended_s, line in lines:
        phases = {name.removeprefix("phase_s/"): value for name, value in line.items() if name.startswith("phase_s/")}
        rollout = phases["rollout"] + phases["score_tail"]
        named = {"logprobs": phases["logprobs"], "update": phases["train"], "refit": phases["refit"]}
        ended_s -= phases.get("checkpoint", 0.0)  # a run always saves its last step, which is no part of the comparison
        more = {
            str(name): float(line[name])
            for name in ("mismatch/token_mult_prob_error", "response/tokens_min")
            if name in line
        }
        records.append(
            model.Record(
                ended_s, {"rollout": rollout} | named, line["reward/mean"], line["response/tokens_mean"], more=more
            )
        )
    model.report(args.out, "ours", {"config": (run / "config.yaml").read_text(), "overrides": args.chosen}, records)


if __name__ == "__main__":
    main()
