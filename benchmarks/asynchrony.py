"""What rollouts ahead of updates are worth: simulated step time and idle shares of the recipe's 7B and 32B runs.

    .venv/bin/python benchmarks/asynchrony.py [--json benchmarks/results/asynchrony_plan.json]

Each run in disaggregated layouts that `fapo plan` knows: as its file has it; the one that is fastest step after step;
and the one whose longer side, rollout or policy, is shortest, which bounds rollouts that run ahead. Lengths are those
that `fapo plan` assumes: log-normal, a mean of an eighth of the limit, a 99th percentile of half of it. Times are means
of ten steps without the first and last two. Runs on a CPU; rates of the GPUs are assumed, as `fapo plan` lists them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean

from megatron_fapo.config.load import load_config
from megatron_fapo.plan.asynchrony import StepWork, simulate_run
from megatron_fapo.plan.hardware import parse_cluster
from megatron_fapo.plan.layouts import SEED, Planner, alternatives
from megatron_fapo.plan.lengths import find_lengths
from megatron_fapo.plan.shapes import find_shape

STEPS, EDGE = 10, 2
RUNS = (("fapo_7b", "4x8xH100"), ("fapo_32b", "8x8xH100"))
MODES = ((0, False), (1, False), (1, True), (2, False), (2, True))


def planner_of(name: str, cluster: str) -> Planner:
    config = load_config([Path("examples") / f"{name}.yaml"], []).config
    shape, _ = find_shape(config.policy.model_path, "policy.model_path", config.policy.max_position_embeddings)
    judge, _ = find_shape(config.genrm.model_path or "", "genrm.model_path")
    return Planner(config, shape, judge, parse_cluster(cluster), find_lengths(None, config, True))


def layouts(planner: Planner) -> dict[str, Planner]:
    def longer_s(phases: dict[str, float]) -> float:
        return max(phases["rollout"] + phases["score_tail"], phases["logprobs"] + phases["train"])

    found = alternatives(planner)
    bounded = min(found, key=lambda each: longer_s(each[1].phases))
    both = {"fastest in step": found[0][0], "shortest longer side": bounded[0]}
    return {"as configured": planner} | ({"fastest in step": found[0][0]} if bounded is found[0] else both)


def work(planner: Planner) -> list[StepWork]:
    steps = []
    for seed in range(SEED, SEED + STEPS):
        samples = planner.drawn(seed)
        phases = planner.step(samples).phases
        steps.append(StepWork(samples, phases["score_tail"], phases["logprobs"] + phases["train"]))
    return steps


def measure(planner: Planner, steps: list[StepWork], max_staleness: int, in_flight: bool) -> dict[str, float | str]:
    c = planner.config
    engines, _ = planner.speeds(steps[0].samples)
    times = simulate_run(
        steps, c.rollout.samples_per_prompt, engines,
        max_staleness=max_staleness, in_flight=in_flight, refit_s=planner.refit_s,
    )[EDGE:-EDGE]  # fmt: skip
    total_s = sum(time.total_s for time in times)
    policy_s = sum(step.policy_s for step in steps[EDGE:-EDGE])
    return {
        "max_staleness": max_staleness,
        "refits": "in flight" if in_flight else "idle engines",
        "step_s": round(total_s / len(times), 1),
        "waited_s": round(fmean(time.waited_s for time in times), 1),
        "drained_s": round(fmean(time.drained_s for time in times), 1),
        "engines_idle": round(1 - sum(time.engine_busy_s for time in times) / total_s / engines.count, 3),
        "policy_idle": round(1 - policy_s / total_s, 3),
        "older_tokens": round(fmean(time.older_share for time in times), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers")
    args = parser.parse_args()
    results = []
    for name, cluster in RUNS:
        for layout, planner in layouts(planner_of(name, cluster)).items():
            gpus, parallel = planner.gpus, planner.config.policy.parallel
            rollout = planner.config.rollout
            text = f"{gpus['train']} + {gpus['rollout']} + {gpus['genrm']} GPUs, policy TP{parallel.tensor} "
            text += f"CP{parallel.context} PP{parallel.pipeline} DP{parallel.data}, "
            text += f"engines {rollout.replicas} x TP{rollout.tensor_parallel}"
            print(f"\n{name} on {cluster}, {layout}: {text}\n  lengths: {planner.lengths.text}")
            steps = work(planner)
            rows = [measure(planner, steps, *mode) for mode in MODES]
            print("  " + "  ".join(f"{key:>13}" for key in rows[0]))
            for row in rows:
                print("  " + "  ".join(f"{value:>13}" for value in row.values()), flush=True)
            results.append({"run": name, "cluster": cluster, "layout": layout, "is": text, "modes": rows})
    if args.json is not None:
        about = {"command": "benchmarks/asynchrony.py", "steps": STEPS, "left_out_at_each_end": EDGE}
        args.json.write_text(json.dumps(about | {"runs": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
