"""Floating-point operations of a model: what MFU counts and what balancing goes by. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_fapo.policy.hf_config import ModelShape


def layer_flops(shape: ModelShape, tokens: int, width: int) -> float:
    """Forward FLOPs of all layers for tokens of sequences of `width`: two per weight and token, and the causal half of
    the attention scores."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    experts = shape.experts
    ffn = 3 * shape.ffn if experts is None else 3 * experts.per_token * experts.ffn + experts.count  # and the router
    weights = shape.hidden * (2 * q + 2 * kv + ffn)
    return float(tokens) * shape.layers * (2 * weights + 2 * width * q)


def head_flops(shape: ModelShape, tokens: int) -> float:
    """Forward FLOPs of the output layer for so many tokens."""
    return 2.0 * tokens * shape.hidden * shape.vocab


def train_flops(shape: ModelShape, lengths: Sequence[int], responses: int) -> float:
    """Of forward and backward over samples of these lengths, without padding and recomputation: what MFU counts.

    Args:
        responses: tokens of all responses: only they reach the output layer.
    """
    return 3 * (sum(layer_flops(shape, n, n) for n in lengths) + head_flops(shape, responses))
