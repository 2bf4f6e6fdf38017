"""What we need to know of a model, read from its HF config.json; and which layouts it allows.

Pure: no torch, no megatron. Unknown architectures and features are refused by name, before any process starts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fapo.config.policy import ParallelConfig
from megatron_fapo.errors import UserError

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


_NEEDED = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size",
    "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip


@dataclass(frozen=True)
class ModelShape:
    """Sizes and features of a dense decoder."""

    architecture: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    norm_eps: float
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    dtype: str
    """Type of the checkpoint's weights."""

    def padded_vocab(self, tensor_parallel: int) -> int:
        """Vocabulary rows that mcore holds: a multiple of the tensor ranks. The extra rows never reach a softmax."""
        return -(-self.vocab // tensor_parallel) * tensor_parallel

    @property
    def parameters(self) -> int:
        """Number of weights."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = self.hidden * (2 * q + 2 * kv) + 3 * self.hidden * self.ffn + 2 * self.hidden
        layer += (q + 2 * kv) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        return self.layers * layer + self.hidden * (1 + self.vocab * (1 if self.tied else 2))


def read_model_shape(model_path: str | Path, max_positions: int | None = None) -> ModelShape:
    """Read `<model_path>/config.json`; `max_positions` replaces its max_position_embeddings.

    Raises:
        UserError: the file is missing, or the architecture or a feature of it is not supported.
    """
    path = Path(model_path) / "config.json"
    if not path.is_file():
        raise UserError(f"{path} not found: policy.model_path must be an HF checkpoint directory")
    try:
        raw = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error}); download the checkpoint again") from error
    architecture = (raw.get("architectures") or ["?"])[0]
    if architecture not in ARCHITECTURES:
        raise UserError(f"{path}: architecture {architecture} is not supported; supported: {', '.join(ARCHITECTURES)}")
    # transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling.
    rope = dict(raw.get("rope_parameters") or {})
    scaling = dict(raw.get("rope_scaling") or {}) or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    problems = []
    if kind == "llama3":
        fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        problems += [
            f"RoPE scaling llama3 with {key} {scaling.get(key)} (mcore fixes it at {value})"
            for key, value in fixed.items()
            if scaling.get(key) != value
        ]
    elif kind != "default":
        problems.append(f"RoPE scaling {kind!r} (supported: default, llama3)")
    if raw.get("use_sliding_window"):
        problems.append("use_sliding_window")
    if raw.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {raw['hidden_act']!r} (supported: silu)")
    if raw.get("mlp_bias"):
        problems.append("mlp_bias")
    is_qwen2, is_qwen3 = architecture.startswith("Qwen2"), architecture.startswith("Qwen3")
    if raw.get("attention_bias") and not is_qwen2:
        problems.append("attention_bias (output projection bias)")
    if problems:
        raise UserError(f"{path}: not supported: {'; '.join(problems)}")
    if missing := [key for key in _NEEDED if key not in raw]:
        raise UserError(f"{path}: {', '.join(missing)} missing; is it the config.json of a {architecture}?")
    return ModelShape(
        architecture=architecture,
        layers=raw["num_hidden_layers"],
        hidden=raw["hidden_size"],
        ffn=raw["intermediate_size"],
        heads=raw["num_attention_heads"],
        kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        vocab=raw["vocab_size"],
        max_positions=max_positions or raw["max_position_embeddings"],
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
        rope_scaling=scaling if kind != "default" else None,
        norm_eps=raw["rms_norm_eps"],
        tied=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=is_qwen2,
        qk_norm=is_qwen3,
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
    )


def layout_problems(shape: ModelShape, parallel: ParallelConfig) -> list[str]:
    """Why this model cannot be laid out like that; empty when it can."""
    t, p = parallel.tensor, parallel.pipeline
    checks = (
        (shape.heads % t, f"{shape.heads} attention heads do not divide by policy.parallel.tensor={t}"),
        (shape.kv_heads % t, f"{shape.kv_heads} KV heads do not divide by policy.parallel.tensor={t}"),
        (shape.ffn % t, f"FFN size {shape.ffn} does not divide by policy.parallel.tensor={t}"),
        (shape.layers % p, f"{shape.layers} layers do not divide by policy.parallel.pipeline={p}"),
    )
    return [problem for remainder, problem in checks if remainder]
