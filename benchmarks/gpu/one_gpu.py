"""The whole stack on one GPU, ended and resumed: `fapo train` to step --steps, then anew to --resumed-steps.

    python benchmarks/gpu/one_gpu.py OUT --policy MODEL --judge MODEL --data gsm8k-train.jsonl
    python benchmarks/gpu/one_gpu.py OUT --device cpu      # the models of examples/ and the testbed, on a laptop

Policy (Megatron), engine and GenRM server take turns on the card (docs/memory.md), and each refit is by mapping. The
judge may be a model that nobody trained as one: --max-unscored is the share of samples that its unusable answers may
leave unscored, and the result says how many were. vLLM captures CUDA graphs of decoding and compiles nothing: two
engines start in each attempt, and a graph saves more than its capture after a step, which compilation would not.

Each attempt that has ended is kept in OUT and not repeated, so that the same command goes on; with --first-only it
ends after the first, for machines that give little time at once. Fails, and says why, unless
- both attempts ended with exit code 0, and the second left the lines of the first as they were;
- metrics.jsonl has each step once, report.html is there, and traces of all steps if the run writes traces;
- mismatch/token_mult_prob_error of each step is at most --max-mismatch;
- right answers were judged, and all bytes of every refit came from the card that the engine is on;
- the card held in no phase what the phase does not need, and nothing grew: runs.py says how that is told.
OUT/one_gpu.json has all of it, with medians by phase and the GenRM's share of a step.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import runs
from megatron_fapo.data.datasets import write_testbed

MODELS = runs.ROOT / "examples" / "models"
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
LIMIT_S = 1200.0
SHOWN = ("phase_s/", "weight_sync/", "memory/servers_", "mismatch/", "score/", "genrm/answered", "genrm/unscored")


def plain_rows(data: Path) -> dict[str, str]:
    """What tells GSM8K's rows from the recipe's."""
    with data.open() as file:
        plain = "question" in json.loads(file.readline())
    return {"data.question_key": "question", "data.answer_key": "answer"} if plain else {}


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """On a GPU, a step of about 6 s with 0.5B parameters; on a CPU, of about one with the tiny models."""
    values: dict[str, Any] = {
        "run_dir": args.out / "run",
        "device": args.device,
        "data.train": f"[{args.data}]",
        "policy.model_path": args.policy,
        "policy.offload": True,
        "policy.optimizer.warmup_steps": 2,
        "rollout.colocated": True,
        "rollout.samples_per_prompt": 8,
        "genrm.colocated": True,
        "genrm.model_path": args.judge,
        "reward.max_unscored_share": args.max_unscored,
        "training.checkpoint.every_steps": 0,
        "training.evaluation.every_steps": 0,
    }
    values |= plain_rows(args.data)
    if args.device == "cpu":
        return values | {
            "data.max_prompt_tokens": 256,
            "rollout.max_response_tokens": 112,
            "genrm.max_tokens": 256,
            "genrm.max_model_len": 768,
            "reward.verifier_processes": 1,
            "reward.overlong.buffer_tokens": 32,
            "training.prompts_per_step": 4,
            "training.prompts_per_mini_batch": 2,
        }
    return values | {
        "data.max_prompt_tokens": 512,
        "policy.optimizer.lr": 2e-6,
        "policy.micro_batch_tokens": 16384,
        "rollout.max_response_tokens": 256,
        "rollout.max_num_seqs": 128,
        "rollout.gpu_memory_utilization": 0.6,
        "rollout.vllm.compilation_config": GRAPHS,
        "genrm.gpu_memory_utilization": 0.6,
        "genrm.max_model_len": 2048,
        "genrm.max_tokens": 384,
        "genrm.max_attempts": 1,
        "genrm.vllm.max_num_seqs": 128,
        "genrm.vllm.compilation_config": GRAPHS,
        "reward.overlong.buffer_tokens": 64,
        "training.prompts_per_step": 16,
        "training.prompts_per_mini_batch": 8,
    }


def attempts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Both attempts, of which those that ended well before this start are read from OUT; none after one that failed."""
    done: list[dict[str, Any]] = []
    for number, steps in enumerate((args.steps, args.resumed_steps)[: 1 if args.first_only else 2], 1):
        kept = args.out / f"attempt-{number}.json"
        if not kept.exists():
            words = [*runs.words(overrides(args) | {"training.steps": steps}), *args.overrides]
            command = runs.fapo("train", *(["--resume"] if number > 1 else []), *words)
            found = runs.attempt(args.out / "run", args.out / f"attempt-{number}.log", command, args.limit)
            found["to_step"], found["lines"] = steps, lines_of(args.out / "run")
            if found["code"]:
                return [*done, found]
            kept.write_text(json.dumps(found) + "\n")
        done.append(json.loads(kept.read_text()))
        print(f"attempt {number}: to step {steps} in {done[-1]['seconds']:.0f} s", flush=True)
    return done


def lines_of(run: Path) -> list[str]:
    path = run / runs.FILE
    return path.read_text().splitlines() if path.exists() else []


def start_s(attempt: Mapping[str, Any], records: Sequence[Mapping[str, float]]) -> float:
    """Seconds from the command to the first step's beginning."""
    first = attempt["moments"][0]
    took = next(record["phase_s/total"] for record in records if record["step"] == first["step"])
    return round(first["at"] - attempt["began"] - took, 1)


def judge(args: argparse.Namespace, done: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """What the records say, and what is wrong with them."""
    run = args.out / "run"
    records = runs.records_of(run)
    faults = [f"attempt {i} ended with exit code {a['code']}: see {args.out}/attempt-{i}.log" for i, a in
              enumerate(done, 1) if a["code"]]  # fmt: skip
    faults += runs.step_faults(records, done[-1]["to_step"], args.max_mismatch)
    faults += runs.ledger_faults(records, run) + runs.file_faults(run, [int(r["step"]) for r in records])
    if lines_of(run)[: len(done[0]["lines"])] != done[0]["lines"]:
        faults.append("resuming changed lines of steps that were finished")
    for record in records:
        if not record["genrm/called"] > 0:
            faults.append(f"step {record['step']}: nothing was judged")
        if args.device == "gpu" and record["weight_sync/local_bytes"] != record["weight_sync/bytes"]:
            faults.append(f"step {record['step']}: weights came to the engine from another card")
    found: dict[str, Any] = {"attempts": [], "max_unscored_share": args.max_unscored}
    for attempt in done:
        first = done[-2]["to_step"] if attempt is done[-1] and len(done) > 1 else 0
        mine = [record for record in records if first < record["step"] <= attempt["to_step"]]
        row = {key: value for key, value in attempt.items() if key not in ("lines", "moments")}
        if mine and attempt["moments"]:
            row["start_s"] = start_s(attempt, records)
            row["growth"], wrong = runs.grown(attempt["moments"], mine)
            faults += [f"to step {attempt['to_step']}: {text}" for text in wrong]
        found["attempts"].append(row)
    settled = [record for record in records if record["step"] > 1] or records
    found["medians"] = runs.medians(settled, SHOWN)
    found["memory"] = runs.medians(settled, ("memory/",))
    found["genrm_share"] = {
        "median": sorted(share := [r["phase_s/score_tail"] / r["phase_s/total"] for r in settled])[len(share) // 2],
        "unscored": max(r["score/unscored_share"] for r in settled),
    }
    return found, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--policy", type=Path, default=MODELS / "policy")
    parser.add_argument("--judge", type=Path, default=MODELS / "genrm")
    parser.add_argument("--data", type=Path, help="rows of GSM8K or of the recipe; default: the testbed's")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="gpu")
    parser.add_argument("--steps", type=int, default=20, help="of the first attempt")
    parser.add_argument("--resumed-steps", type=int, default=50, help="of both")
    parser.add_argument("--first-only", action="store_true")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="S", help="of an attempt")
    parser.add_argument("--max-unscored", type=float, default=0.5, help="share of samples (reward.max_unscored_share)")
    parser.add_argument("--max-mismatch", type=float)
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    args = parser.parse_intermixed_args()
    args.out, args.policy, args.judge = args.out.resolve(), args.policy.resolve(), args.judge.resolve()
    args.max_mismatch = args.max_mismatch or runs.limit_of_mismatch(args.device)
    args.data = args.data.resolve() if args.data else write_testbed(args.out / "data", 512, 8, seed=0)[0]
    began = time.monotonic()
    done = attempts(args)
    if not runs.records_of(args.out / "run"):
        return runs.finish(args.out, "one_gpu", {"attempts": done}, [f"no step was finished: see {args.out}/*.log"])
    found, faults = judge(args, done)
    print("\n".join(runs.ledger_table(found["memory"])))
    width = max(map(len, found["medians"]))
    print("\n".join(f"{name:<{width}} {value:12.5g}" for name, value in found["medians"].items()))
    print(f"GenRM's share of a step {found['genrm_share']['median']:.3f}; {time.monotonic() - began:.0f} s in all")
    return runs.finish(args.out, "one_gpu", found, faults)


if __name__ == "__main__":
    sys.exit(main())
