"""`policy`: the model that is trained, its parallel layout and its optimizer."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from megatron_fapo.config.section import Section


class ParallelConfig(Section):
    tensor: int = Field(1, ge=1)
    """Tensor-parallel ranks. Attention heads, KV groups and the FFN size must divide by it."""
    pipeline: int = Field(1, ge=1)
    """Pipeline stages. Layers must divide by it."""
    data: int = Field(1, ge=1)
    """Data-parallel replicas. The policy takes tensor x pipeline x data ranks."""
    sequence_parallel: bool = False
    """Shard activations of norms and dropouts over the tensor ranks (needs tensor > 1)."""

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data


class OptimizerConfig(Section):
    lr: float = Field(1e-6, gt=0)
    """Peak learning rate of AdamW."""
    warmup_steps: int = Field(10, ge=0)
    """Optimizer updates of linear warm-up from 0; the first update has learning rate 0."""
    schedule: str = Field("constant", pattern="^(constant|cosine|linear)$")
    """Shape after warm-up; cosine and linear reach min_lr at decay_steps."""
    decay_steps: int | None = Field(None, gt=0)
    """Optimizer updates until min_lr; required by cosine and linear."""
    min_lr: float = Field(0.0, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    clip_grad: float = Field(1.0, ge=0)
    """Gradient norm above which gradients are scaled down; 0 turns clipping off."""


class PolicyConfig(Section):
    model_path: str = ""
    """HF checkpoint directory: config.json, safetensors, tokenizer files."""
    max_position_embeddings: int | None = Field(None, gt=0)
    """Positions of the model, in place of config.json's, for policy, engines and exported models. RoPE is not rescaled:
    what the model makes of positions that it has not seen is up to its training. Unset: config.json's."""
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    dtype: str = Field("auto", pattern="^(auto|float32|bfloat16)$")
    """Parameter and compute type; `auto` is bfloat16 on GPUs and float32 on CPUs. Gradients and Adam stay float32."""
    micro_batch_tokens: int = Field(16384, gt=0)
    """Most tokens (padding included) in one forward-backward pass of a data-parallel rank; lower it to save memory."""
    logprob_micro_batch_tokens: int = Field(32768, gt=0)
    """Likewise for forward-only log-probability passes."""
    recompute: str = Field("none", pattern="^(none|selective|full)$")
    """Activation recomputation: less memory for more time."""
    megatron: dict[str, Any] = {}
    """Passed through to megatron-core's TransformerConfig, after everything derived from the model and this section."""
