"""Shapes of models that are not on disk, as their config.json has them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_fapo.errors import UserError
from megatron_fapo.policy.hf_config import ModelShape, read_model_shape


def _shape(
    kind: str, layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int, positions: int,
    theta: float = 1e6, *, tied: bool = False, head_dim: int | None = None,
) -> ModelShape:  # fmt: skip
    return ModelShape(
        architecture=f"{kind}ForCausalLM", layers=layers, hidden=hidden, ffn=ffn, heads=heads, kv_heads=kv_heads,
        head_dim=head_dim or hidden // heads, vocab=vocab, max_positions=positions, rope_theta=theta, rope_scaling=None,
        norm_eps=1e-6, tied=tied, qkv_bias=kind == "Qwen2", qk_norm=kind == "Qwen3", dtype="bfloat16",
    )  # fmt: skip


_QWEN3_4B = _shape("Qwen3", 36, 2560, 9728, 32, 8, 151936, 262144, 5e6, tied=True, head_dim=128)
BUILT_IN: dict[str, ModelShape] = {
    "Qwen2.5-0.5B": _shape("Qwen2", 24, 896, 4864, 14, 2, 151936, 32768, tied=True),
    "Qwen2.5-7B": _shape("Qwen2", 28, 3584, 18944, 28, 4, 152064, 131072),
    "Qwen2.5-Math-7B": _shape("Qwen2", 28, 3584, 18944, 28, 4, 152064, 4096, 1e4),
    "Qwen2.5-14B": _shape("Qwen2", 48, 5120, 13824, 40, 8, 152064, 131072),
    "Qwen2.5-32B": _shape("Qwen2", 64, 5120, 27648, 40, 8, 152064, 131072),
    "Qwen3-4B": dataclasses.replace(_QWEN3_4B, max_positions=40960, rope_theta=1e6),
    "Qwen3-4B-Instruct-2507": _QWEN3_4B,
    "FAPO-GenRM-4B": _QWEN3_4B,
    "Qwen3-8B": _shape("Qwen3", 36, 4096, 12288, 32, 8, 151936, 40960, head_dim=128),
    "Qwen3-32B": _shape("Qwen3", 64, 5120, 25600, 64, 8, 151936, 40960, head_dim=128),
    "Llama-3.1-8B": _shape("Llama", 32, 4096, 14336, 32, 8, 128256, 131072, 5e5),
}


def find_shape(name_or_path: str, key: str, max_positions: int | None = None) -> tuple[ModelShape, str]:
    """(the shape, where it comes from): config.json of a directory, or a built-in shape by the path's last part.

    Raises:
        UserError: neither is there; `key` is what the user would change.
    """
    if (Path(name_or_path) / "config.json").is_file():
        return read_model_shape(name_or_path, max_positions), f"{name_or_path}/config.json"
    asked = Path(name_or_path).name.lower()
    name = next((name for name in BUILT_IN if name.lower() == asked), None)
    if name is None:
        raise UserError(
            f"{key} = {name_or_path or '(empty)'}: no config.json there, and no built-in shape of that name: "
            f"give a directory, or one of {', '.join(BUILT_IN)}"
        )
    shape = BUILT_IN[name]
    return dataclasses.replace(shape, max_positions=max_positions or shape.max_positions), f"built-in shape {name}"
