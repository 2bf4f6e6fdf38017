"""Models to refit that nobody has to download: a tiny real one, and checkpoints of a shape without weights.

A checkpoint of a shape has config.json, the testbed's tokenizer and one safetensors file whose header is real and whose
data are a hole: terabytes would take no disk. vLLM reads it as zeros; policy ranks draw each tensor from a seed of its
name instead of reading it, so that every layout has the same model.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import torch

from megatron_fapo.config.policy import ParallelConfig
from megatron_fapo.data.tokenizer import build_testbed_tokenizer, init_tiny_model
from megatron_fapo.plan.shapes import find_shape
from megatron_fapo.policy.hf_config import ModelShape
from megatron_fapo.policy.source_index import Place, planned_index

NAMES = {"8B": "Qwen3-8B", "14B": "Qwen2.5-14B", "32B": "Qwen2.5-32B"}
_SAFETENSORS = {"bfloat16": "BF16", "float32": "F32"}
_HOLE = "model-of-a-shape.safetensors"


def make_model(name: str, directory: Path, *, layers: int | None, dtype: str, positions: int) -> Path:
    """The checkpoint directory of `--model`.

    Args:
        layers: in place of the model's, where weights are random.
        positions: tokens that the model is to take at most, where weights are random.

    Raises:
        UserError: no such model.
    """
    if (Path(name) / "config.json").is_file():
        return Path(name)
    if name == "tiny":
        init_tiny_model(directory, 0, max_position_embeddings=positions, **({"num_hidden_layers": layers or 4}))
        return directory
    shape, _ = find_shape(NAMES.get(name, name), "--model", positions)
    write_shape(dataclasses.replace(shape, layers=layers or shape.layers, dtype=dtype), directory)
    return directory


def is_hole(directory: str | Path) -> bool:
    """Whether the checkpoint has no weights of its own."""
    return (Path(directory) / _HOLE).exists()


def write_shape(shape: ModelShape, directory: Path) -> None:
    """The checkpoint of a shape."""
    from transformers import AutoConfig

    tokenizer = build_testbed_tokenizer(directory)
    kind = {"Qwen2": "qwen2", "Qwen3": "qwen3", "Llama": "llama"}[shape.architecture.removesuffix("ForCausalLM")]
    config = AutoConfig.for_model(
        kind, architectures=[shape.architecture], vocab_size=shape.vocab, hidden_size=shape.hidden,
        intermediate_size=shape.ffn, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, max_position_embeddings=shape.max_positions,
        rms_norm_eps=shape.norm_eps, tie_word_embeddings=shape.tied, dtype=shape.dtype,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    config.save_pretrained(directory)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end, width = 0, getattr(torch, shape.dtype).itemsize
    for name, size in hf_shapes(shape).items():
        begin, end = end, end + torch.Size(size).numel() * width
        header[name] = {"dtype": _SAFETENSORS[shape.dtype], "shape": size, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (directory / _HOLE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)


def hf_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the HF checkpoint: what a policy of one rank holds of each goes from corner to corner."""
    sizes: dict[str, tuple[int, ...]] = {}
    for region in planned_index(shape, ParallelConfig(), Place(0, 0, 0, 0), shape.dtype).regions:
        end = tuple(a + b for a, b in zip(region.start, region.shape, strict=True))
        sizes[region.name] = tuple(map(max, end, sizes.get(region.name, end)))
    return sizes


class RandomCheckpoint:
    """In place of hf_weights.HFCheckpoint: tensors of the checkpoint's names and shapes, drawn from their names."""

    def __init__(self, path: str | Path) -> None:
        with (Path(path) / _HOLE).open("rb") as file:
            self._header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._dtypes = {code: getattr(torch, name) for name, code in _SAFETENSORS.items()}

    def names(self) -> list[str]:
        return sorted(self._header.keys() - {"__metadata__"})

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self._header[name]
        options: dict[str, Any] = {"device": self._device, "dtype": self._dtypes[entry["dtype"]]}
        if len(entry["shape"]) == 1:
            return torch.ones(entry["shape"], **options) * (0.01 if name.endswith("bias") else 1)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        return torch.randn(entry["shape"], generator=generator, **options).mul_(0.02)
