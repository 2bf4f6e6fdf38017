"""HF checkpoint <-> this rank's megatron shards, both ways, bit for bit.

In: HF safetensors and a `ModelShape`; or a live mcore model. Out: filled parameters; or HF-named full tensors.

Each mcore parameter follows one `Rule`: which HF tensors it is made of and how they are laid out over tensor ranks.
Rules are pure (`split` and `merge` work on plain tensors), so the round trip is tested without processes.

Layouts that need care: linear_qkv holds, per KV group, its query heads, then its key, then its value; every tensor
shard of linear_fc1 is [gate; up] of that shard; the embedding is padded with rows that stand for no token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_fapo.errors import UserError
from megatron_fapo.policy.hf_config import ModelShape

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Rule:
    """How one mcore parameter is made of HF tensors."""

    hf_names: tuple[str, ...]
    split: Callable[[list[torch.Tensor], int, int], torch.Tensor]
    """(HF tensors in order of hf_names, tensor-parallel size, tensor rank) -> this rank's parameter."""
    merge: Callable[[list[torch.Tensor]], list[torch.Tensor]]
    """(the parameter of every tensor rank, in order) -> HF tensors in order of hf_names."""
    sharded: bool
    """False: every tensor rank holds the same."""


def _replicated(name: str) -> Rule:
    return Rule((name,), lambda hf, tp, rank: hf[0], lambda shards: [shards[0]], sharded=False)


def _rows(name: str) -> Rule:
    """Split along dim 1: row-parallel linears (output and down projections)."""
    return Rule((name,), lambda hf, tp, r: hf[0].chunk(tp, dim=1)[r], lambda s: [torch.cat(s, dim=1)], sharded=True)


def _vocabulary(name: str, shape: ModelShape) -> Rule:
    def split(hf: list[torch.Tensor], tp: int, rank: int) -> torch.Tensor:
        padding = shape.padded_vocab(tp) - shape.vocab
        return torch.nn.functional.pad(hf[0], (0, 0, 0, padding)).chunk(tp, dim=0)[rank]

    return Rule((name,), split, lambda s: [torch.cat(s, dim=0)[: shape.vocab]], sharded=True)


def _gate_up(prefix: str) -> Rule:
    def split(hf: list[torch.Tensor], tp: int, rank: int) -> torch.Tensor:
        return torch.cat([t.chunk(tp, dim=0)[rank] for t in hf], dim=0)

    def merge(shards: list[torch.Tensor]) -> list[torch.Tensor]:
        halves = [shard.chunk(2, dim=0) for shard in shards]
        return [torch.cat([half[i] for half in halves], dim=0) for i in (0, 1)]

    return Rule((f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight"), split, merge, sharded=True)


def _qkv(prefix: str, kind: str, shape: ModelShape) -> Rule:
    groups, per_group, dim = shape.kv_heads, shape.heads // shape.kv_heads, shape.head_dim
    sizes = (per_group * dim, dim, dim)

    def split(hf: list[torch.Tensor], tp: int, rank: int) -> torch.Tensor:
        rest = hf[0].shape[1:]
        by_group = [t.reshape(groups, size, *rest) for t, size in zip(hf, sizes, strict=True)]
        local = torch.cat(by_group, dim=1).chunk(tp, dim=0)[rank]
        return local.reshape(-1, *rest)

    def merge(shards: list[torch.Tensor]) -> list[torch.Tensor]:
        rest = shards[0].shape[1:]
        by_group = torch.cat(shards, dim=0).reshape(groups, sum(sizes), *rest)
        return [part.reshape(-1, *rest) for part in by_group.split(sizes, dim=1)]

    return Rule(tuple(f"{prefix}.{p}_proj.{kind}" for p in "qkv"), split, merge, sharded=True)


def _layer_rule(name: str, layer: int, shape: ModelShape) -> Rule:
    """`name` is the mcore parameter name within a transformer layer (local or Transformer Engine modules)."""
    hf = f"model.layers.{layer}"
    match name:
        case "input_layernorm.weight" | "self_attention.linear_qkv.layer_norm_weight":
            return _replicated(f"{hf}.input_layernorm.weight")
        case "pre_mlp_layernorm.weight" | "mlp.linear_fc1.layer_norm_weight":
            return _replicated(f"{hf}.post_attention_layernorm.weight")
        case "self_attention.q_layernorm.weight":
            return _replicated(f"{hf}.self_attn.q_norm.weight")
        case "self_attention.k_layernorm.weight":
            return _replicated(f"{hf}.self_attn.k_norm.weight")
        case "self_attention.linear_qkv.weight" | "self_attention.linear_qkv.bias":
            return _qkv(f"{hf}.self_attn", name.rsplit(".", 1)[1], shape)
        case "self_attention.linear_proj.weight":
            return _rows(f"{hf}.self_attn.o_proj.weight")
        case "mlp.linear_fc1.weight":
            return _gate_up(f"{hf}.mlp")
        case "mlp.linear_fc2.weight":
            return _rows(f"{hf}.mlp.down_proj.weight")
    raise KeyError(f"no rule for megatron parameter {name!r} of layer {layer}")


def model_rules(model: Any, shape: ModelShape) -> list[tuple[torch.nn.Parameter, Rule]]:
    """Every parameter of this rank with its rule, in a fixed order; layer numbers are asked of mcore.

    The output layer of a tied model on the last stage is a copy of the embedding: it is filled, and on a model of
    several stages exported by the stage that owns the embedding only.
    """
    rules: list[tuple[torch.nn.Parameter, Rule]] = []
    if model.pre_process:
        rules.append((model.embedding.word_embeddings.weight, _vocabulary("model.embed_tokens.weight", shape)))
    for layer in model.decoder.layers:
        for name, parameter in layer.named_parameters():
            rules.append((parameter, _layer_rule(name, layer.layer_number - 1, shape)))
    if model.post_process:
        rules.append((model.decoder.final_layernorm.weight, _replicated("model.norm.weight")))
        if not shape.tied:
            rules.append((model.output_layer.weight, _vocabulary("lm_head.weight", shape)))
        elif not model.pre_process:
            rules.append((model.output_layer.weight, _vocabulary("model.embed_tokens.weight", shape)))
    covered = {id(parameter) for parameter, _ in rules}
    if missing := [name for name, p in model.named_parameters() if id(p) not in covered]:
        raise KeyError(f"megatron parameters without a rule: {', '.join(missing)}")
    return rules


class HFCheckpoint:
    """Tensors of an HF directory by name, read lazily from its safetensors files.

    Raises:
        UserError: no safetensors files, or a tensor asked for that no file holds.
    """

    def __init__(self, path: str | Path) -> None:
        from safetensors import safe_open

        self.path = Path(path)
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise UserError(f"{self.path}: no *.safetensors files; convert the checkpoint to safetensors first")
        handles = [safe_open(str(file), framework="pt") for file in files]
        self._where = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118

    def names(self) -> list[str]:
        return sorted(self._where)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._where:
            raise UserError(f"{self.path}: tensor {name} is missing; is config.json of this checkpoint's model?")
        return self._where[name].get_tensor(name)


def load_hf(model: Any, shape: ModelShape, path: str | Path) -> None:
    """Fill this rank's parameters from the HF checkpoint at `path`, cast to each parameter's type.

    Raises:
        UserError: a tensor is missing or has another shape than config.json says.
    """
    from megatron.core import parallel_state

    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    checkpoint = HFCheckpoint(path)
    for parameter, rule in model_rules(model, shape):
        local = rule.split([checkpoint[name] for name in rule.hf_names], tp, rank)
        if local.shape != parameter.shape:
            raise UserError(
                f"{path}: {', '.join(rule.hf_names)} gives shape {tuple(local.shape)} where the model of config.json "
                f"has {tuple(parameter.shape)}"
            )
        parameter.data.copy_(local)


def export_hf(model: Any, shape: ModelShape) -> Iterator[tuple[str, torch.Tensor]]:
    """HF-named full tensors of this pipeline stage, in a fixed order. Collective over the tensor-parallel group.

    Every rank of the group iterates in step and gets the tensors; each HF tensor comes from exactly one stage.
    """
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    tp = group.size()
    for parameter, rule in model_rules(model, shape):
        if shape.tied and model.post_process and not model.pre_process and parameter is model.output_layer.weight:
            continue
        local = parameter.data
        if rule.sharded and tp > 1:
            shards = [torch.empty_like(local) for _ in range(tp)]
            torch.distributed.all_gather(shards, local.contiguous(), group=group)
        else:
            shards = [local]
        yield from zip(rule.hf_names, rule.merge(shards), strict=True)


def save_stage(tensors: Iterator[tuple[str, torch.Tensor]], directory: Path, stage: int, stages: int) -> list[str]:
    """Write one stage's tensors as `model-0000s-of-0000n.safetensors`; returns their names."""
    from safetensors.torch import save_file

    state = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors}
    path = directory / shard_name(stage, stages)
    save_file(state, str(path), metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors leaves it to its owner alone; checkpoints are shared
    return sorted(state)


def shard_name(stage: int, stages: int) -> str:
    """The file of an HF checkpoint that is number `stage` (from 0) of `stages`."""
    return f"model-{stage + 1:05d}-of-{stages:05d}.safetensors"


def write_index(directory: Path, names_by_stage: list[list[str]]) -> None:
    """The index file that ties the stages' files together, as HF loaders and vLLM expect."""
    stages = len(names_by_stage)
    weight_map = {name: shard_name(stage, stages) for stage, names in enumerate(names_by_stage) for name in names}
    total = sum((directory / shard_name(stage, stages)).stat().st_size for stage in range(stages))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
