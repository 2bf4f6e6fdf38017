"""Construction of the megatron-core model: the one file to change when mcore's model class does.

In: a `ModelShape`, the policy section of the configuration, an initialised parallel state.
Out: this rank's `GPTModel` (one pipeline stage, one tensor shard), with weights not yet loaded.

Transformer Engine modules are used where TE can be imported and there is a GPU, megatron's own modules elsewhere.
mcore 0.19 announces HybridModel in place of GPTModel; only `build_model` names the class.
"""

from __future__ import annotations

import dataclasses
import logging
from importlib.util import find_spec
from typing import Any

import torch

from megatron_fapo.config.policy import PolicyConfig
from megatron_fapo.errors import UserError
from megatron_fapo.policy.hf_config import ModelShape

logger = logging.getLogger(__name__)


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight gradient is summed over tensor ranks under sequence parallelism.

    mcore's wrapper of torch.nn.RMSNorm refuses sequence parallelism; the mark on the weight is all that it lacks.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


def use_transformer_engine() -> bool:
    """TE needs a GPU; its absence changes speed, never results beyond rounding."""
    return torch.cuda.is_available() and find_spec("transformer_engine") is not None


def transformer_config(shape: ModelShape, cfg: PolicyConfig, dtype: torch.dtype) -> Any:
    """mcore's TransformerConfig for this model and layout; `policy.megatron` overrides fields by name.

    Raises:
        UserError: `policy.megatron` names a field that TransformerConfig does not have.
    """
    from megatron.core.transformer import TransformerConfig

    fields: dict[str, Any] = {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "ffn_hidden_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.kv_heads,
        "kv_channels": shape.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_eps,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": shape.qkv_bias,
        "qk_layernorm": shape.qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": cfg.parallel.tensor,
        "pipeline_model_parallel_size": cfg.parallel.pipeline,
        "sequence_parallel": cfg.parallel.sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "use_cpu_initialization": True,
        "perform_initialization": False,  # weights always come from a checkpoint
        "variable_seq_lengths": True,  # micro-batches are padded to their own longest sample
        "moe_token_dispatcher_type": "alltoall",  # the default refuses variable lengths, dense model or not
        "calculate_per_token_loss": True,  # token-mean over the global mini-batch, however it is split
        "attention_softmax_in_fp32": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "bias_activation_fusion": use_transformer_engine(),
        "apply_rope_fusion": use_transformer_engine(),
        "bias_dropout_fusion": False,
    }
    if cfg.recompute == "full":
        fields |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif cfg.recompute == "selective":
        fields |= {"recompute_granularity": "selective"}
    known = {f.name for f in dataclasses.fields(TransformerConfig)}
    if unknown := sorted(set(cfg.megatron) - known):
        raise UserError(f"policy.megatron: TransformerConfig has no field {', '.join(unknown)}")
    return TransformerConfig(**(fields | cfg.megatron))


def _block_spec(config: Any, shape: ModelShape) -> Any:
    """The layers of this pipeline stage."""
    if use_transformer_engine():
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=shape.qk_norm)

    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    layer = get_gpt_layer_local_spec(qk_layernorm=shape.qk_norm, normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    if shape.qk_norm:
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)


def build_model(shape: ModelShape, cfg: PolicyConfig, dtype: torch.dtype) -> Any:
    """This rank's part of the model, on its device, in `dtype`; megatron's parallel state must be initialised."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)  # the deprecation notice, per rank
    config = transformer_config(shape, cfg, dtype)
    model = GPTModel(
        config,
        _block_spec(config, shape),
        vocab_size=shape.padded_vocab(cfg.parallel.tensor),
        max_sequence_length=shape.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
        rope_scaling=shape.rope_scaling is not None,
        rope_scaling_factor=(shape.rope_scaling or {}).get("factor", 8.0),
    )
    logger.info("attention and norms: %s", "Transformer Engine" if use_transformer_engine() else "megatron-core local")
    return model.cuda().to(dtype)
