"""`policy`: the model that is trained, its parallel layout and its optimizer."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from megatron_fapo.config.section import Section


class ParallelConfig(Section):
    """Ranks in megatron's order: tensor fastest, then context, data and pipeline; experts over the first three."""

    tensor: int = Field(1, ge=1)
    """Tensor-parallel ranks. Attention heads, KV groups and the FFN size must divide by it."""
    pipeline: int = Field(1, ge=1)
    """Pipeline stages. Layers must divide by it, unless the split is uneven by one of the four fields below."""
    virtual_pipeline: int = Field(1, ge=1)
    """Model chunks per stage (interleaved schedule): a smaller pipeline bubble for more messages. 1: off."""
    first_stage_layers: int | None = Field(None, ge=1)
    """Layers of the first stage, where the embedding makes it heavier; the other stages share the rest evenly."""
    last_stage_layers: int | None = Field(None, ge=1)
    """Likewise of the last stage, which has the output layer and the loss."""
    embedding_in_split: bool = False
    """Count the embedding as one layer when layers are dealt to stages."""
    loss_in_split: bool = False
    """Count the output layer with the loss as one layer when layers are dealt to stages."""
    context: int = Field(1, ge=1)
    """Context-parallel ranks: each sequence is split over them (two slices per rank, so that causal work is equal)."""
    expert: int = Field(1, ge=1)
    """Expert-parallel ranks of a mixture of experts, taken out of tensor x context x data."""
    expert_tensor: int = Field(1, ge=1)
    """Tensor-parallel ranks within each expert; 1 suits the many small experts of Qwen3-MoE."""
    data: int = Field(1, ge=1)
    """Data-parallel replicas. The policy takes tensor x pipeline x context x data ranks."""
    sequence_parallel: bool = False
    """Shard activations of norms and dropouts over the tensor ranks (needs tensor > 1)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data ranks while the last micro-batch's backward still runs: faster, and its order of
    summation is the network's. Off: they are reduced after it."""

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data


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
    offload_fraction: float = Field(0.0, ge=0, le=1)
    """Share of the optimizer's state that stays in host memory and is stepped there: 12 bytes per parameter less on the
    GPU at 1, for an update as slow as the host's memory. For bfloat16 parameters."""
    main_dtype: str = Field("float32", pattern="^(float32|float16)$")
    """Type of the weights that the optimizer keeps; float16 needs Transformer Engine."""
    moments_dtype: str = Field("float32", pattern="^(float32|bfloat16|float16|fp8)$")
    """Type of Adam's two moments; any other than float32 needs Transformer Engine. With fp8 the second is float16."""

    @property
    def low_precision(self) -> bool:
        """Whether the state is narrower than float32, which takes mcore's precision-aware optimizer."""
        return (self.main_dtype, self.moments_dtype) != ("float32", "float32")


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
    """Most tokens in one forward-backward pass of a data-parallel replica, which its context ranks share; lower it to
    save memory. Samples are packed to it; one that is longer goes alone."""
    logprob_micro_batch_tokens: int = Field(32768, gt=0)
    """Likewise for forward-only log-probability passes."""
    recompute: str = Field("none", pattern="^(none|selective|full)$")
    """Activation recomputation: less memory for more time."""
    output_layer: str = Field("recompute", pattern="^(recompute|keep)$")
    """Where training's backward has the logits from: worked out again, or kept by the forward: a quarter fewer FLOPs of
    the output layer for 4 bytes per response token of a micro-batch and vocabulary row of a tensor rank (10 GB for
    16,384 tokens and 151,936 rows). Results are the same bits."""
    attention: str = Field("auto", pattern="^(auto|flash|fused|unfused)$")
    """Transformer Engine's attention: the flash-attn package, cuDNN (`fused`) or plain; `auto` is flash where that
    package is installed, else fused. Without Transformer Engine it is PyTorch's, and only `auto` is accepted."""
    fp8: str = Field("none", pattern="^(none|e4m3|hybrid)$")
    """FP8 matrix products of the layers (Transformer Engine, H100 and later); weights stay in `dtype`."""
    fp8_recipe: str = Field("blockwise", pattern="^(delayed|tensorwise|blockwise|mxfp8)$")
    """How FP8 scales are chosen; mxfp8 needs Blackwell."""
    offload: bool = False
    """Keep weights, gradients and optimizer state in host memory while a phase does not need them on the GPU. Together
    with rollout.colocated: engines use the room."""
    megatron: dict[str, Any] = {}
    """Passed through to megatron-core's TransformerConfig, after everything derived from the model and this section."""
