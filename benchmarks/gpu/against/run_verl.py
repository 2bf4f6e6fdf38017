"""verl's main_ppo with colocated vLLM on the step of model.py, with the settings that its performance guide advises.

    python benchmarks/gpu/against/run_verl.py OUT [--variant packed+fused] [--set actor_rollout_ref.actor.strategy=fsdp]

Needs verl with its requirements (TransferQueue among them), vLLM, and flash-attn, or for `padded` none; TRL 1.x must
not be importable (verl's patches ask it for a class that 0.27 had); no megatron_fapo. Variants, joined by +: `packed`
removes padding, which needs flash-attn; `padded` computes whole micro-batches with PyTorch's attention, which costs
nothing here, where all samples are equally long; `fused` computes log-probabilities without keeping logits; `bypass`
takes the engine's log-probabilities for the policy's, without a pass; `resident` keeps the engine on the card during
updates; `megatron` trains with megatron-core through mbridge in place of FSDP2.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import model

ACTOR, ROLLOUT, MODEL = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "model"))
VARIANTS = {
    "packed": [f"{MODEL}.use_remove_padding=True"],
    "padded": [f"{MODEL}.use_remove_padding=False", f"+{MODEL}.override_config.attn_implementation=sdpa"],
    "fused": [f"{MODEL}.use_fused_kernels=True"],
    "bypass": ["algorithm.rollout_correction.bypass_mode=True", "algorithm.rollout_correction.rollout_is=null"],
    "resident": [
        *(f"{ROLLOUT}.free_cache_engine=False", f"+{ROLLOUT}.enable_sleep_mode=False"),
        f"{ROLLOUT}.gpu_memory_utilization=0.2",
    ],
    "megatron": ["--config-name=ppo_megatron_trainer", f"{ACTOR}.megatron.use_mbridge=True"],
}
PHASES = {"rollout": "gen", "logprobs": "old_log_prob", "update": "update_actor", "refit": "update_weights"}
NEEDS = {"verl": "verl==0.9.1", "transfer_queue": "TransferQueue>=0.1.10", "hydra": "hydra-core", "vllm": "vllm"}


def overrides(args: Any) -> list[str]:
    """What main_ppo is told, beside its defaults: float32 weights and AdamW state under bfloat16 mixed precision."""
    step, prompts, out = args.step, args.out / "prompts.parquet", args.out / "verl"
    megatron = "megatron" in args.variant.split("+")
    values: dict[str, Any] = {
        "algorithm.adv_estimator": "grpo",
        "algorithm.rollout_correction.rollout_is": "token",
        "algorithm.rollout_correction.rollout_is_threshold": model.TIS_CAP,
        "data.train_files": prompts,
        "data.val_files": prompts,
        "data.train_batch_size": step.prompts,
        "data.max_prompt_length": args.prompt_tokens,
        "data.max_response_length": step.tokens,
        "data.shuffle": False,
        "data.dataloader_num_workers": 0,
        f"{MODEL}.path": args.out / "model",
        f"{ACTOR}.optim.lr": model.LR,
        f"{ACTOR}.optim.weight_decay": model.WEIGHT_DECAY,
        f"{ACTOR}.optim.clip_grad": model.CLIP_GRAD,
        f"{ACTOR}.ppo_mini_batch_size": step.prompts,
        f"{ACTOR}.use_dynamic_bsz": True,
        f"{ACTOR}.ppo_max_token_len_per_gpu": 16384,
        f"{ACTOR}.clip_ratio_low": model.CLIP_LOW,
        f"{ACTOR}.clip_ratio_high": model.CLIP_HIGH,
        f"{ACTOR}.clip_ratio_c": 10.0,
        f"{ROLLOUT}.name": "vllm",
        f"{ROLLOUT}.n": step.samples,
        f"{ROLLOUT}.tensor_model_parallel_size": 1,
        f"{ROLLOUT}.gpu_memory_utilization": 0.6,
        f"{ROLLOUT}.max_num_seqs": 512,
        f"{ROLLOUT}.max_num_batched_tokens": 16384,
        f"{ROLLOUT}.max_model_len": args.prompt_tokens + step.tokens,
        f"{ROLLOUT}.log_prob_max_token_len_per_gpu": 32768,
        f"{ROLLOUT}.ignore_eos": True,
        "reward.custom_reward_function.path": Path(__file__).resolve().parent / "reward.py",
        "trainer.n_gpus_per_node": 1,
        "trainer.total_training_steps": args.steps,
        "trainer.total_epochs": 1,
        "trainer.logger": "[console,file]",
        "trainer.val_before_train": False,
        "trainer.resume_mode": "disable",
        "trainer.default_local_dir": out / "checkpoints",
        "hydra.run.dir": out,
        "hydra.output_subdir": "null",
    }
    if not megatron:
        values |= {f"{ACTOR}.strategy": "fsdp2", f"{MODEL}.enable_gradient_checkpointing": False}
    return [*(f"{key}={value}" for key, value in values.items()), *args.chosen]


def main() -> None:
    args = model.arguments(__doc__, VARIANTS, "packed")
    needed = NEEDS | ({"mbridge": "mbridge"} if "megatron" in args.variant else {})
    needed |= {} if "padded" in args.variant else {"flash_attn": "flash-attn (or take --variant padded)"}
    if missing := [package for name, package in needed.items() if importlib.util.find_spec(name) is None]:
        raise SystemExit(f"verl's step needs {', '.join(missing)}: install into this environment")
    if importlib.util.find_spec("trl") and not importlib.metadata.version("trl").startswith("0."):
        raise SystemExit("verl 0.9.1 fails where TRL 1.x can be imported: give it an environment or a path without TRL")
    settings, lines = overrides(args), args.out / "verl.jsonl"
    lines.unlink(missing_ok=True)
    # This directory must not come first on the workers' path, nor the one that the command is given in.
    command, where = [sys.executable, "-m", "verl.trainer.main_ppo", *settings], args.out / "verl"
    where.mkdir(exist_ok=True)
    environment = os.environ | {"VERL_FILE_LOGGER_PATH": str(lines), "HF_HUB_OFFLINE": "1", "HYDRA_FULL_ERROR": "1"}
    records = []
    for ended_s, line in model.follow(command, lines, env=environment, cwd=where):
        said = line["data"]
        phases = {name: said.get(f"timing_s/{own}", 0.0) for name, own in PHASES.items()}
        kept = ("response_length/min", "rollout_corr/log_ppl_abs_diff", "perf/mfu/actor", "actor/grad_norm")
        more = {name: said[name] for name in kept if name in said}
        reward, length = said["critic/rewards/mean"], said["response_length/mean"]
        records.append(model.Record(ended_s, phases, reward, length, said["timing_s/step"], more))
    model.report(args.out, "verl", settings, records)


if __name__ == "__main__":
    main()
