"""Construction of the megatron-core model: the one file to change when mcore's model class does.

In: a `ModelShape`, the policy section of the configuration, an initialised parallel state.
Out: this rank's model chunks (`GPTModel`): its tensor shard of its pipeline stage, with weights not yet loaded. There
is one chunk, or with a virtual pipeline several.

Transformer Engine modules are used where TE can be imported and there is a GPU, megatron's own modules elsewhere.
mcore 0.19 announces HybridModel in place of GPTModel; only `build_chunks` names the class.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch

from megatron_fapo.config.policy import PolicyConfig
from megatron_fapo.errors import UserError
from megatron_fapo.policy.attention import PackedAttention
from megatron_fapo.policy.hf_config import Experts, ModelShape

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


def choose_attention(wanted: str) -> str:
    """Who computes attention: `flash`, `fused` or `unfused` within Transformer Engine, or `torch` without it.

    Left to itself, TE chooses per shape and says so only in its debug log; a kernel that is missing then shows as a
    slow run that nobody can explain.

    Raises:
        UserError: `policy.attention` names what is not installed.
    """
    if not use_transformer_engine():
        if wanted != "auto":
            raise UserError(f"policy.attention={wanted} needs Transformer Engine and a GPU: install it, or set auto")
        return "torch"
    installed = any(find_spec(name) is not None for name in ("flash_attn", "flash_attn_3", "flash_attn_interface"))
    if wanted == "flash" and not installed:
        raise UserError("policy.attention=flash needs the package flash-attn: install it, or set fused (cuDNN)")
    return wanted if wanted != "auto" else "flash" if installed else "fused"


def transformer_config(shape: ModelShape, cfg: PolicyConfig, dtype: torch.dtype) -> Any:
    """mcore's TransformerConfig for this model and layout; `policy.megatron` overrides fields by name.

    Raises:
        UserError: `policy.megatron` names a field that TransformerConfig does not have; mcore refuses the combination.
    """
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnBackend

    attention = choose_attention(cfg.attention)
    fused = use_transformer_engine()
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
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "perform_initialization": False,  # weights come from a checkpoint
        "variable_seq_lengths": True,  # a pack is as long as its samples
        "calculate_per_token_loss": True,  # token-mean over the global mini-batch, however it is split
        "attention_softmax_in_fp32": True,
        "attention_backend": AttnBackend.unfused if attention == "torch" else AttnBackend[attention],
        # Transformer Engine adds weight gradients to the float32 buffer within the matrix product.
        "gradient_accumulation_fusion": fused,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "bias_activation_fusion": fused,
        "apply_rope_fusion": fused,
        "bias_dropout_fusion": False,
        **_layout_fields(cfg),
        **(_expert_fields(shape.experts) if shape.experts else {}),
    }
    if cfg.fp8 != "none":
        if not fused:
            raise UserError(f"policy.fp8={cfg.fp8} needs Transformer Engine and a GPU: install it, or set none")
        fields |= {"fp8": cfg.fp8, "fp8_recipe": cfg.fp8_recipe}
    if cfg.recompute == "full":
        fields |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif cfg.recompute == "selective":
        fields |= {"recompute_granularity": "selective"}
    known = {f.name for f in dataclasses.fields(TransformerConfig)}
    if unknown := sorted(set(cfg.megatron) - known):
        raise UserError(f"policy.megatron: TransformerConfig has no field {', '.join(unknown)}")
    try:
        config = TransformerConfig(**(fields | cfg.megatron))
    except (ValueError, AssertionError) as error:
        raise UserError(f"megatron-core refuses this policy configuration: {error}") from error
    for name, value in (shape.rope_scaling.config_attributes if shape.rope_scaling else {}).items():
        setattr(config, name, value)
    return config


def _layout_fields(cfg: PolicyConfig) -> dict[str, Any]:
    p = cfg.parallel
    interleaved = p.virtual_pipeline > 1
    return {
        # One message at a time: in a batch, two between the same two stages of an interleaved schedule would be taken
        # for one another.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "tensor_model_parallel_size": p.tensor,
        "pipeline_model_parallel_size": p.pipeline,
        "virtual_pipeline_model_parallel_size": p.virtual_pipeline if interleaved else None,
        "num_layers_in_first_pipeline_stage": p.first_stage_layers,
        "num_layers_in_last_pipeline_stage": p.last_stage_layers,
        "account_for_embedding_in_pipeline_split": p.embedding_in_split,
        "account_for_loss_in_pipeline_split": p.loss_in_split,
        "context_parallel_size": p.context,
        "expert_model_parallel_size": p.expert,
        "expert_tensor_parallel_size": p.expert_tensor,
        "sequence_parallel": p.sequence_parallel,
        "moe_token_dispatcher_type": "alltoall",  # the default refuses variable lengths, dense model or not
    }


def _expert_fields(experts: Experts) -> dict[str, Any]:
    fused = use_transformer_engine()
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn,
        "moe_router_topk": experts.per_token,
        # Softmax over the chosen experts alone is the same as over all, scaled to sum to 1.
        "moe_router_pre_softmax": not experts.normalised,
        "moe_router_dtype": "fp32",
        # RL moves the router by its reward alone: a balance loss would weigh prompts by how they route.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": fused,
        "moe_permute_fusion": fused,
    }


def _layer_spec(config: Any, shape: ModelShape) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )

    kinds = {"num_experts": shape.experts and shape.experts.count, "moe_grouped_gemm": config.moe_grouped_gemm}
    if use_transformer_engine():
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=shape.qk_norm, **kinds)
    layer = get_gpt_layer_local_spec(qk_layernorm=shape.qk_norm, normalization="RMSNorm", **kinds)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if shape.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if shape.experts:
        # TE fuses the second norm into a dense MLP only: without this, checkpoints of experts would differ in a name.
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return layer


@contextlib.contextmanager
def _output_layer_without_apex() -> Iterator[None]:
    """megatron's linear layer refuses fused gradient accumulation without NVIDIA apex, and the output layer is one.

    Its forward and backward are never run (`policy/vocab_parallel.py` does its work), so the refusal is beside the
    point; all other layers are Transformer Engine's, which brings its own kernel.
    """
    from megatron.core.tensor_parallel import layers

    available = layers._grad_accum_fusion_available
    layers._grad_accum_fusion_available = True
    try:
        yield
    finally:
        layers._grad_accum_fusion_available = available


def build_chunks(shape: ModelShape, cfg: PolicyConfig, dtype: torch.dtype) -> list[Any]:
    """This rank's part of the model, on its device, in `dtype`; megatron's parallel state must be initialised."""
    from megatron.core import parallel_state as state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)  # the deprecation notice, per rank
    config = transformer_config(shape, cfg, dtype)
    layer = _layer_spec(config, shape)
    chunks = []
    virtual = cfg.parallel.virtual_pipeline
    for stage in range(virtual) if virtual > 1 else [None]:
        spec = layer
        if not use_transformer_engine():
            layers = [layer] * get_num_layers_to_build(config, vp_stage=stage)
            spec = TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
        with _output_layer_without_apex():
            chunk = GPTModel(
                config,
                spec,
                vocab_size=shape.padded_vocab(cfg.parallel.tensor),
                max_sequence_length=shape.max_positions,
                pre_process=state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                post_process=state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
                share_embeddings_and_output_weights=shape.tied,
                rotary_base=shape.rope_theta,
                vp_stage=stage,
                **(shape.rope_scaling.model_arguments if shape.rope_scaling else {"position_embedding_type": "rope"}),
            )
        chunks.append(chunk.cuda().to(dtype))
    logger.info(
        "layers: %s; attention: %s; matrix products: %s; %s",
        "Transformer Engine" if use_transformer_engine() else "megatron-core local",
        choose_attention(cfg.attention),
        f"FP8 ({cfg.fp8}, {cfg.fp8_recipe})" if cfg.fp8 != "none" else str(dtype).removeprefix("torch."),
        "NVIDIA apex found" if find_spec("amp_C") is not None else "without NVIDIA apex",
    )
    return chunks
