"""A whole step of a 32B on the GPUs of one host, timed by phase, with the memory ledger and `fapo plan` beside it.

    python benchmarks/gpu/whole_step_32b.py OUT            # 4 H200
    python benchmarks/gpu/whole_step_32b.py OUT --tiny     # two tensor-parallel ranks on a CPU

The run is `fapo train`'s own: policy (tensor-parallel over all cards, sequence-parallel, all layers recomputed, its
state in host memory while others work) and one engine over the same cards in turns, rewards by a function, since random
weights are never right. What differs: weights are drawn on the cards by name and never written (refits/models.py), vLLM
has dummy weights until the refit before step 1, and no checkpoint is saved: 16 bytes a parameter are more than the
machine's disk. Adam's moments are bfloat16 (`policy.optimizer.moments_dtype`), since by `fapo plan` float32 state does
not fit into a host of 512 GiB. Fails if a step is missing, if policy and engine disagree, or if a card held in a phase
what the phase does not need. OUT/whole_step_32b.json: medians after step 1, plan, ledger.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import runs
from benchmarks.gpu.one_gpu import GRAPHS
from benchmarks.refits.models import RandomCheckpoint, write_shape
from megatron_fapo.config.load import load_config
from megatron_fapo.config.root import Config
from megatron_fapo.data.datasets import write_testbed
from megatron_fapo.plan.command import plan_command
from megatron_fapo.plan.layouts import PHASES
from megatron_fapo.plan.shapes import find_shape
from megatron_fapo.policy import hf_weights
from megatron_fapo.policy.actor import PolicyActor
from megatron_fapo.policy.hf_config import ModelShape
from megatron_fapo.training.loop import Run, train_command

SHAPE = "Qwen2.5-32B"
TINY: dict[str, Any] = {"layers": 2, "hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 256, "vocab": 512}
MISMATCH = {"tiny": 1.001, "whole": 1.05}
"""Most that mismatch/token_mult_prob_error may be. Random weights give bfloat16 more to round than
a trained model's, layer by layer."""
log = logging.getLogger("megatron_fapo.benchmark")


class RandomPolicy(PolicyActor):
    """A policy rank that draws its weights instead of reading them."""

    def join(self, *args: Any) -> dict[str, Any]:
        hf_weights.HFCheckpoint = RandomCheckpoint  # type: ignore[assignment,misc]
        return super().join(*args)


async def no_checkpoint(self: Run, _: object) -> None:
    """In place of Run.save."""
    log.info("no checkpoint of step %d", self.state.step)


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    values: dict[str, Any] = {
        "run_dir": args.out / "run",
        "device": "cpu" if args.tiny else "gpu",
        "data.train": f"[{args.out / 'data' / 'train.jsonl'}]",
        "data.max_prompt_tokens": 512,
        "policy.model_path": args.out / "model",
        "policy.parallel.tensor": args.tensor,
        "policy.parallel.sequence_parallel": args.tensor > 1,
        "policy.recompute": "full",
        "policy.offload": True,
        "policy.optimizer.warmup_steps": 0,
        "policy.micro_batch_tokens": 16384,
        "rollout.colocated": True,
        "rollout.tensor_parallel": args.tensor,
        "rollout.gpu_memory_utilization": 0.75,
        "rollout.samples_per_prompt": 8,
        "rollout.max_response_tokens": args.tokens,
        "rollout.vllm.load_format": "dummy",
        "genrm.enabled": False,
        "reward.compute_score": f"{Path(__file__).resolve().with_name('rewards.py')}:of_text",
        "reward.overlong.enabled": False,
        "training.steps": args.steps,
        "training.prompts_per_step": args.prompts,
        "training.prompts_per_mini_batch": args.prompts // 2,
        "training.checkpoint.every_steps": 0,
    }
    if args.tiny:
        return values
    return values | {"policy.optimizer.moments_dtype": "bfloat16", "rollout.vllm.compilation_config": GRAPHS}


def plan(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """What `fapo plan` says of this configuration with the lengths that the run had."""
    path, lengths = args.out / "plan.json", str(args.out / "run")
    plan_command(config, model=None, cluster=args.cluster, lengths=lengths, rates=None, json_path=path, timeline=None)
    found = json.loads(path.read_text())
    return {key: found[key] for key in ("cluster", "lengths", "configured")}


def table(planned: Mapping[str, Any], medians: Mapping[str, float]) -> list[str]:
    """Seconds by phase and GiB of the fullest rank by phase, planned and measured."""
    lines = [f"{'phase':<12}{'planned s':>12}{'measured s':>12}"]
    for name in (*PHASES, "total"):
        seconds = sum(planned["phases_s"].values()) if name == "total" else planned["phases_s"][name]
        lines.append(f"{name:<12}{seconds:>12.2f}{medians.get(f'phase_s/{name}', 0.0):>12.2f}")
    lines.append(f"{'phase':<12}{'planned GiB':>12}{'peak GiB':>12}")
    for name, parts in planned["policy_bytes"].items():
        peak = medians.get(f"memory/{name}/peak_gib")  # of a GPU only
        lines.append(f"{name:<12}{sum(parts.values()) / 2**30:>12.2f}{'-' if peak is None else f'{peak:.2f}':>12}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a toy of the same architecture, on a CPU")
    parser.add_argument("--tensor", type=int, help="cards; default 4, tiny 2")
    parser.add_argument("--layers", type=int, help="in place of the shape's")
    parser.add_argument("--cluster", help="what to plan for; default 1x4xH200, tiny 1x2xcpu")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--prompts", type=int, help="of a step, 8 samples each; default 16, tiny 2")
    parser.add_argument("--tokens", type=int, help="of a response; default 1024, tiny 16")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    args = parser.parse_intermixed_args()
    args.out = args.out.resolve()
    args.tensor = args.tensor or (2 if args.tiny else 4)
    args.prompts, args.tokens = args.prompts or (2 if args.tiny else 16), args.tokens or (16 if args.tiny else 1024)
    args.cluster = args.cluster or f"1x{args.tensor}x{'cpu' if args.tiny else 'H200'}"
    shape: ModelShape = find_shape(SHAPE, "the shape")[0]
    shape = dataclasses.replace(shape, dtype="float32", **TINY) if args.tiny else shape
    shape = dataclasses.replace(shape, layers=args.layers or shape.layers)
    (args.out / "model").mkdir(parents=True, exist_ok=True)
    write_shape(shape, args.out / "model")
    write_testbed(args.out / "data", args.prompts * args.steps, 8, seed=0)
    config = load_config([], [*runs.words(overrides(args)), *args.overrides], "train").config
    with (
        mock.patch("megatron_fapo.training.cluster.PolicyActor", RandomPolicy),
        mock.patch.object(Run, "save", no_checkpoint),
    ):
        code = train_command(config, resume=None)
    records = runs.records_of(args.out / "run")
    faults = [f"the run ended with exit code {code}: see {args.out}/run/logs"] if code else []
    faults += runs.step_faults(records, args.steps, MISMATCH["tiny" if args.tiny else "whole"])
    faults += runs.ledger_faults(records, args.out / "run")
    if not records:
        return runs.finish(args.out, "whole_step_32b", {}, faults)
    medians = runs.medians(records[1:] or records, ("phase_s/", "weight_sync/", "memory/", "mismatch/", "response/"))
    planned = plan(config, args)
    print("\n".join([*table(planned["configured"], medians), *runs.ledger_table(medians)]))
    result = {"parameters": shape.parameters, "plan": planned, "medians": medians, "steps": records}
    return runs.finish(args.out, "whole_step_32b", result, faults)


if __name__ == "__main__":
    sys.exit(main())
