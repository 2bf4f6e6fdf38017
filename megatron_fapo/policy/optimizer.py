"""The optimizer of a policy rank: mcore's distributed AdamW and its learning-rate schedule."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from megatron_fapo.config.policy import OptimizerConfig
from megatron_fapo.errors import UserError

_FOREVER = 2**40
"""Decay steps of a constant schedule: mcore wants a number."""
_STATE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8": torch.uint8,  # mcore's and Transformer Engine's name for it
}


def ddp_config(*, overlap: bool = False) -> Any:
    """Gradients are reduced in float32 and only once per update: after the last micro-batch, or `overlap` its backward
    pass."""
    from megatron.core.distributed import DistributedDataParallelConfig

    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, use_distributed_optimizer=True
    )


def make_optimizer(chunks: list[Any], cfg: OptimizerConfig, dtype: torch.dtype) -> tuple[Any, Any]:
    """(optimizer, scheduler) for a rank's DDP-wrapped chunks. Norm weights and biases do not decay, as is mcore's rule.

    Raises:
        UserError: the optimizer cannot train such parameters, or not here.
    """
    from megatron.core.optimizer import OptimizerConfig as McoreConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    if problem := optimizer_problem(cfg, str(dtype).removeprefix("torch.")):
        raise UserError(problem)
    hybrid = cfg.offload_fraction > 0
    moments = _STATE_DTYPES[cfg.moments_dtype]
    optimizer = get_megatron_optimizer(
        McoreConfig(
            optimizer="adam",
            lr=cfg.lr,
            min_lr=cfg.min_lr,
            weight_decay=cfg.weight_decay,
            adam_beta1=cfg.beta1,
            adam_beta2=cfg.beta2,
            adam_eps=cfg.eps,
            clip_grad=cfg.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
            # The hybrid optimizer keeps float32 weights of its own; without this mcore would keep them once more, on
            # the device.
            use_precision_aware_optimizer=cfg.low_precision or hybrid,
            main_params_dtype=_STATE_DTYPES[cfg.main_dtype],
            exp_avg_dtype=moments,
            # Squares span twice as many orders of magnitude: in FP8 the small ones are 0, and their weights jump.
            exp_avg_sq_dtype=torch.float16 if cfg.moments_dtype == "fp8" else moments,
            optimizer_cpu_offload=hybrid,
            optimizer_offload_fraction=cfg.offload_fraction,
            overlap_cpu_optimizer_d2h_h2d=hybrid,
        ),
        chunks,
    )
    _create_state(optimizer)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=cfg.lr,
        min_lr=cfg.min_lr,
        lr_warmup_steps=cfg.warmup_steps,
        lr_decay_steps=cfg.decay_steps or _FOREVER,
        lr_decay_style=cfg.schedule,
        start_wd=cfg.weight_decay,
        end_wd=cfg.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


def optimizer_problem(cfg: OptimizerConfig, dtype: str, device: str | None = None) -> str | None:
    """Why this optimizer cannot train parameters of `dtype`, with the remedy.

    Args:
        device: where the policy will run; None: here.
    """
    if cfg.offload_fraction > 0 and dtype == "float32":
        return (
            f"policy.optimizer.offload_fraction={cfg.offload_fraction:g}: mcore's hybrid optimizer takes no float32 "
            "parameters; set policy.dtype to bfloat16, or offload_fraction to 0"
        )
    if not cfg.low_precision or (device != "cpu" and find_spec("transformer_engine") is not None):
        return None
    where = "does not run on a CPU" if device == "cpu" else "is not installed"
    return (
        f"policy.optimizer.main_dtype={cfg.main_dtype}, moments_dtype={cfg.moments_dtype}: only the Adam of "
        f"Transformer Engine keeps such state, and it {where}; set both to float32"
    )


def _create_state(optimizer: Any) -> None:
    """Give the optimizer its (zero) state now rather than in its first step.

    mcore asks the state for its step count when it saves or loads and fails on an AdamW that has not stepped. That of
    Transformer Engine it would ask for state in a way of earlier versions, where its types can be chosen.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        for adam in getattr(inner, "sub_optimizers", [inner]):
            for group in adam.param_groups:
                for parameter in group["params"]:
                    if isinstance(adam, torch.optim.AdamW):
                        adam.state[parameter] = {
                            "step": torch.tensor(0.0, device=parameter.device if group.get("fused") else "cpu"),
                            "exp_avg": torch.zeros_like(parameter),
                            "exp_avg_sq": torch.zeros_like(parameter),
                        }
                    elif part.config.use_precision_aware_optimizer:
                        bits = adam.store_param_remainders and parameter.dtype == torch.bfloat16
                        adam.initialize_state(parameter, bits)
        if hasattr(inner, "sub_optimizers"):
            inner._sync_sub_optimizers_state_to_hdo()
