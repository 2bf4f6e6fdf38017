"""Configurations of the smallest real runs: the demo's models, a few prompts."""

from __future__ import annotations

import functools
from pathlib import Path

from megatron_fapo.data.datasets import write_prompts, write_testbed
from megatron_fapo.data.demonstrations import critic_rows
from megatron_fapo.genrm.prompts import judge_messages
from tests.training.runs import write_config

EXAMPLES = Path(__file__).parents[2] / "examples"


def policy_config(root: Path, steps: int) -> Path:
    """FAPO with the tiny policy and GenRM, in `root`/runs/policy."""
    write_testbed(root / "data", 32, 8, 1)
    return write_config(
        root / "policy.yaml",
        {
            "extends": str(EXAMPLES / "tiny_cpu.yaml"),
            "run_dir": str(root / "runs" / "policy"),
            "data": {"train": [str(root / "data" / "train.jsonl")], "eval": {"testbed": str(root / "data/eval.jsonl")}},
            "policy": {"model_path": str(EXAMPLES / "models" / "policy"), "parallel": {"tensor": 1}},
            "rollout": {"samples_per_prompt": 2},
            "genrm": {"model_path": str(EXAMPLES / "models" / "genrm")},
            "training": {
                "steps": steps,
                "prompts_per_step": 2,
                "prompts_per_mini_batch": 2,
                "evaluation": {"every_steps": 0},
            },
        },
    )


def genrm_config(root: Path) -> Path:
    """GenRM training of two steps, each evaluated, so that there is a best checkpoint, in `root`/runs/genrm."""
    build = functools.partial(judge_messages, form="tagged")
    write_prompts(root / "critic.parquet", critic_rows(16, 1, build))
    write_prompts(root / "held.jsonl", critic_rows(4, 2, build))
    return write_config(
        root / "genrm.yaml",
        {
            "run_dir": str(root / "runs" / "genrm"),
            "device": "cpu",
            "data": {
                "train": [str(root / "critic.parquet")],
                "eval": {"fpb": str(root / "held.jsonl")},
                "max_prompt_tokens": 512,
            },
            "policy": {"model_path": str(EXAMPLES / "models" / "genrm")},
            "rollout": {"samples_per_prompt": 2, "max_response_tokens": 96},
            "reward": {"overlong": {"enabled": False}},
            "training": {
                "steps": 2,
                "prompts_per_step": 2,
                "prompts_per_mini_batch": 2,
                "evaluation": {"every_steps": 1, "temperature": 0.0},
                "checkpoint": {"every_steps": 1, "best_metric": "eval/fpb/f1"},
            },
        },
    )
