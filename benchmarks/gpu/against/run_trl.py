"""TRL's GRPOTrainer with colocated vLLM on the step of model.py, with the settings that its documentation advises.

    python benchmarks/gpu/against/run_trl.py OUT [--variant liger] [--set per_device_train_batch_size=16]

Needs trl with datasets and accelerate, vLLM, and for `liger` liger-kernel; no megatron_fapo. Variants: `plain`; `liger`
replaces layers by Liger's kernels; `uncorrected` leaves out the weights against the engine, and with them the pass for
the policy's own log-probabilities; `sleep` lets vLLM sleep during updates; `fp32` keeps float32 weights under bfloat16
autocast (TRL alone updates bfloat16 weights and moments: less memory and time, and less exact than the others).
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from typing import Any

import model
import reward

VARIANTS = {
    "plain": [],
    "liger": ["use_liger_kernel=true"],
    "uncorrected": ["vllm_importance_sampling_correction=false"],
    "sleep": ["vllm_enable_sleep_mode=true", "vllm_gpu_memory_utilization=0.6"],
    "fp32": ["model_init_kwargs.dtype=float32", "per_device_train_batch_size=16"],
}
TIMED = {"vLLM.generate": "rollout", "sync_weights": "refit", "_get_per_token_logps_and_entropies": "logprobs"}


def settings(args: Any) -> dict[str, Any]:
    """GRPOConfig's arguments. TRL samples all groups of an update at once by itself, and sizes vLLM's batch by that."""
    import yaml

    step, gpu = args.step, args.device == "gpu"
    chosen: dict[str, Any] = {
        "output_dir": str(args.out / "trl"),
        "max_steps": args.steps,
        "per_device_train_batch_size": 32 if gpu else step.samples,
        "num_generations": step.samples,
        "max_completion_length": step.tokens,
        "generation_kwargs": {"ignore_eos": True},
        "temperature": 1.0,
        "beta": 0.0,
        "loss_type": "dapo",
        "epsilon": model.CLIP_LOW,
        "epsilon_high": model.CLIP_HIGH,
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_max": model.TIS_CAP,
        "learning_rate": model.LR,
        "lr_scheduler_type": "constant",
        "weight_decay": model.WEIGHT_DECAY,
        "max_grad_norm": model.CLIP_GRAD,
        "optim": "adamw_torch_fused" if gpu else "adamw_torch",
        "gradient_checkpointing": False,
        "bf16": gpu,
        "use_cpu": not gpu,
        "model_init_kwargs": {"attn_implementation": "sdpa"},
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.2,
        "vllm_max_model_length": args.prompt_tokens + step.tokens,
        "shuffle_dataset": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "seed": 0,
    }
    for setting in args.chosen:
        name, _, value = setting.partition("=")
        name, _, inner = name.partition(".")
        read = yaml.safe_load(value)
        chosen[name] = chosen.get(name, {}) | {inner: read} if inner else read
    samples = step.prompts * step.samples
    chosen["gradient_accumulation_steps"] = samples // chosen["per_device_train_batch_size"]
    return chosen


class Clock:
    """Seconds by phase of the step under way. Only the passes before the updates wait for the card: the updates' own
    calls of the same functions go on as they are."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def install(self) -> None:
        import torch
        from trl.extras.profiling import ProfilingContext

        clock = self

        def leave(context: Any, *_: Any) -> bool:
            name = context.name.partition(".")[2]
            if name == "_prepare_inputs":
                clock.seconds["prepare"] += time.perf_counter() - context._start_time
            elif name in TIMED and (name != "_get_per_token_logps_and_entropies" or not torch.is_grad_enabled()):
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                clock.seconds[TIMED[name]] += time.perf_counter() - context._start_time
            return False

        ProfilingContext.__exit__ = leave

    def take(self, total: float) -> dict[str, float]:
        """By model.PHASES; all of the step that is not preparation is the update."""
        taken, self.seconds = self.seconds, defaultdict(float)
        return {name: taken[name] for name in TIMED.values()} | {"update": total - taken["prepare"]}


def main() -> None:
    args = model.arguments(__doc__, VARIANTS, "plain")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "WANDB_MODE": "disabled"}
    try:
        from datasets import Dataset
        from transformers import TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        raise SystemExit(f"{error}: install trl==1.16.0 (with datasets, accelerate) into this environment") from error
    import pyarrow.parquet as pq
    import torch

    clock, records = Clock(), []
    clock.install()

    class Steps(TrainerCallback):
        began, logged = 0.0, None

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.time()
            records.append(model.Record(now, clock.take(now - self.began), 0.0, 0.0, now - self.began))

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "reward" not in logs:
                return
            records[-1].reward, records[-1].response_tokens = logs["reward"], logs["completions/mean_length"]
            kept = ("completions/min_length", "sampling/sampling_logp_difference/mean", "grad_norm")
            records[-1].more = {name: float(logs[name]) for name in kept if name in logs}

    def share_of_letters(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
        return [reward.compute_score(model.DATA_SOURCE, each[0]["content"], "") for each in completions]

    chosen = settings(args)
    prompts = Dataset.from_list(
        [{"prompt": prompt} for prompt in pq.read_table(args.out / "prompts.parquet")["prompt"].to_pylist()]
    )
    trainer = GRPOTrainer(
        model=str(args.out / "model"), reward_funcs=share_of_letters, args=GRPOConfig(**chosen), train_dataset=prompts,
        callbacks=[Steps()],
    )  # fmt: skip
    weights = next(trainer.model.parameters()).dtype
    trainer.train()
    model.report(args.out, "trl", {**chosen, "weights": str(weights)}, records)


if __name__ == "__main__":
    main()
