"""HF checkpoint <-> this rank's megatron shards, both ways, bit for bit.

In: HF safetensors and a `ModelShape`; or the model chunks of a rank. Out: filled parameters; or HF-named full tensors.

Each mcore parameter follows one `Rule`: which HF tensors it is made of and how they are laid out over tensor ranks.
Rules are pure (`split` and `merge` work on plain tensors), so the round trip is tested without processes.

Layouts that need care: linear_qkv holds, per KV group, its query heads, then its key, then its value; every tensor
shard of linear_fc1 is [gate; up] of that shard; the embedding is padded with rows that stand for no token; expert
parallel ranks hold runs of experts, each of which is split over the expert-tensor ranks, not the tensor ranks.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_fapo.errors import UserError
from megatron_fapo.policy.hf_config import ModelShape

_EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(\d+)\.)?linear_fc([12])\.weight(\d*)")
"""A parameter of one expert: megatron's own modules name it local_experts.N..., Transformer Engine's ...weightN."""


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
    by_expert_rank: tuple[tuple[str, ...], ...] = ()
    """Of an expert's parameter: the hf_names that the same parameter has on each expert-parallel rank."""
    exported: bool = True
    """False: another stage holds the same and exports it."""


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


def _expert(name: str, prefix: str, experts: int, rank: int, ranks: int) -> Rule:
    matched = _EXPERT.fullmatch(name)
    if matched is None:
        raise KeyError(f"no rule for megatron parameter {name!r} of {prefix}")
    each, local = experts // ranks, int(matched[1] or matched[3])
    names = [f"{prefix}.experts.{other * each + local}" for other in range(ranks)]
    rules = [_gate_up(name) if matched[2] == "1" else _rows(f"{name}.down_proj.weight") for name in names]
    return replace(rules[rank], by_expert_rank=tuple(rule.hf_names for rule in rules))


def layer_rule(name: str, layer: int, shape: ModelShape, expert_rank: int = 0, expert_ranks: int = 1) -> Rule:
    """The rule of a parameter of a transformer layer, made of megatron's own or Transformer Engine's modules.

    Args:
        name: within the layer.
        layer: from 0, over the whole model.

    Raises:
        KeyError: no such parameter is known.
    """
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
        case "mlp.router.weight":
            return _replicated(f"{hf}.mlp.gate.weight")
    return _expert(name, f"{hf}.mlp", shape.experts.count if shape.experts else 0, expert_rank, expert_ranks)


def model_rules(model: Any, shape: ModelShape) -> list[tuple[torch.nn.Parameter, Rule]]:
    """Every parameter of a model chunk of this rank with its rule, in a fixed order; layer numbers are asked of mcore.

    The output layer of a tied model on the last of several stages is a copy of the embedding: it is filled here, and
    exported by the stage that owns the embedding.
    """
    from megatron.core import parallel_state as state

    expert = state.get_expert_model_parallel_rank(), state.get_expert_model_parallel_world_size()
    rules: list[tuple[torch.nn.Parameter, Rule]] = []
    if model.pre_process:
        rules.append((model.embedding.word_embeddings.weight, _vocabulary("model.embed_tokens.weight", shape)))
    for layer in model.decoder.layers:
        for name, parameter in layer.named_parameters():
            rules.append((parameter, layer_rule(name, layer.layer_number - 1, shape, *expert)))
    if model.post_process:
        rules.append((model.decoder.final_layernorm.weight, _replicated("model.norm.weight")))
        if not shape.tied:
            rules.append((model.output_layer.weight, _vocabulary("lm_head.weight", shape)))
        elif not model.pre_process:
            copy = replace(_vocabulary("model.embed_tokens.weight", shape), exported=False)
            rules.append((model.output_layer.weight, copy))
    covered = {id(parameter) for parameter, _ in rules}
    if missing := [name for name, p in model.named_parameters() if id(p) not in covered]:
        raise KeyError(f"megatron parameters without a rule: {', '.join(missing)}")
    return rules


def place_in_tensor_group(rule: Rule) -> tuple[int, int]:
    """(size, this rank's place) of the group of ranks that a parameter is split over."""
    from megatron.core import parallel_state as state

    if rule.by_expert_rank:
        return state.get_expert_tensor_parallel_world_size(), state.get_expert_tensor_parallel_rank()
    return state.get_tensor_model_parallel_world_size(), state.get_tensor_model_parallel_rank()


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


def load_hf(chunks: Sequence[Any], shape: ModelShape, path: str | Path) -> None:
    """Fill the parameters of this rank's model chunks from the HF checkpoint at `path`, cast to each one's type.

    Raises:
        UserError: a tensor is missing or has another shape than config.json says.
    """
    checkpoint = HFCheckpoint(path)
    for parameter, rule in itertools.chain.from_iterable(model_rules(chunk, shape) for chunk in chunks):
        ranks, rank = place_in_tensor_group(rule)
        whole = {name: checkpoint[name] for name in rule.hf_names}
        # Merging is asked for the shapes, without data, because splitting would fail midway on some wrong ones.
        wanted = rule.merge([torch.empty_like(parameter, device="meta")] * (ranks if rule.sharded else 1))
        for (name, tensor), expected in zip(whole.items(), wanted, strict=True):
            if tensor.shape != expected.shape:
                raise UserError(
                    f"{path}: {name} has shape {tuple(tensor.shape)} where the model of config.json has "
                    f"{tuple(expected.shape)}; do they belong together?"
                )
        parameter.data.copy_(rule.split(list(whole.values()), ranks, rank))


def exports(state: Any) -> bool:
    """Whether this rank takes part in `export_hf`. `state`: megatron's parallel_state.

    megatron numbers a stage's ranks tensor fastest, then context, then data, and cuts the groups of experts out of the
    same row (expert-tensor fastest). Tensor groups and expert groups both begin at its start, so the first
    lcm(tensor, expert x expert_tensor) ranks are whole groups of either kind and hold all weights of the stage.
    """
    expert_ranks = state.get_expert_tensor_and_model_parallel_world_size()
    return _place_in_stage(state) < math.lcm(state.get_tensor_model_parallel_world_size(), expert_ranks)


def owns_export(state: Any) -> bool:
    """Whether this rank is the one of its stage that uses what all exporting ranks are given."""
    return _place_in_stage(state) == 0


def _place_in_stage(state: Any) -> int:
    row = state.get_context_parallel_rank() + state.get_context_parallel_world_size() * state.get_data_parallel_rank()
    return int(state.get_tensor_model_parallel_rank() + state.get_tensor_model_parallel_world_size() * row)


def gather(rule: Rule, local: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The HF tensors that `local` is this rank's part of (the parameter, or its gradient), with their names.

    Collective over the tensor-parallel group; for an expert's parameter over the expert-tensor x expert group.
    """
    from megatron.core import parallel_state as state

    shards = [local]
    if rule.by_expert_rank or rule.sharded:
        group = (
            state.get_expert_tensor_and_model_parallel_group()
            if rule.by_expert_rank
            else state.get_tensor_model_parallel_group()
        )
        if group.size() > 1:
            shards = [torch.empty_like(local) for _ in range(group.size())]
            torch.distributed.all_gather(shards, local.contiguous(), group=group)
    names = rule.by_expert_rank or (rule.hf_names,)
    each = len(shards) // len(names)
    for i, hf_names in enumerate(names):
        yield from zip(hf_names, rule.merge(shards[i * each : (i + 1) * each]), strict=True)


def export_hf(chunks: Sequence[Any], shape: ModelShape) -> Iterator[tuple[str, torch.Tensor]]:
    """HF-named full tensors of this pipeline stage, in a fixed order. Collective over its ranks that `exports` names.

    They all iterate in step and all get the tensors; each HF tensor comes from exactly one stage.
    """
    for parameter, rule in itertools.chain.from_iterable(model_rules(chunk, shape) for chunk in chunks):
        if rule.exported:
            yield from gather(rule, parameter.data)


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
