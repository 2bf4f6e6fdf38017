"""The optimizer of a policy rank: mcore's distributed AdamW and its learning-rate schedule."""

from __future__ import annotations

from typing import Any

import torch

from megatron_fapo.config.policy import OptimizerConfig

_FOREVER = 2**40
"""Decay steps of a constant schedule: mcore wants a number."""


def ddp_config() -> Any:
    """Gradients are reduced in float32 and only once per update, after the last micro-batch."""
    from megatron.core.distributed import DistributedDataParallelConfig

    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=True
    )


def make_optimizer(model: Any, cfg: OptimizerConfig, dtype: torch.dtype) -> tuple[Any, Any]:
    """(optimizer, scheduler) for a DDP-wrapped model. Norm weights and biases do not decay, as is mcore's rule."""
    from megatron.core.optimizer import OptimizerConfig as McoreConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

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
        ),
        [model],
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


def _create_state(optimizer: Any) -> None:
    """Give torch's AdamW its (zero) state now rather than in its first step.

    mcore asks the state for its step count when it saves or loads and fails on an optimizer that has not stepped.
    Fused optimizers of Transformer Engine and apex keep the count elsewhere and are left alone.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam = part.optimizer
        if not isinstance(adam, torch.optim.AdamW):
            continue
        for group in adam.param_groups:
            for parameter in group["params"]:
                adam.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
