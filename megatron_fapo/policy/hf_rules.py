"""What each mcore parameter is made of: boxes of HF tensors. Pure: names and numbers; no megatron, no processes.

Loading, conversion, export and the plan of a refit all follow the one `Rule` of a parameter.

Layouts that need care: linear_qkv holds, per KV group, its query heads, then its key, then its value; every tensor
shard of linear_fc1 is [gate; up] of that shard; the embedding is padded with rows that stand for no token; expert
parallel ranks hold runs of experts, each of which is split over the expert-tensor ranks, not the tensor ranks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING

from megatron_fapo.policy.hf_config import ModelShape
from megatron_fapo.weight_sync.regions import Ints, volume

if TYPE_CHECKING:
    import torch

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(\d+)\.)?linear_fc([12])\.weight(\d*)")
"""A parameter of one expert: megatron's own modules name it local_experts.N..., Transformer Engine's ...weightN."""


@dataclass(frozen=True, slots=True)
class Box:
    """A box of an HF tensor, which is one of a rank's parameter too."""

    hf: int
    """Which of the rule's HF tensors."""
    start: Ints
    """First corner in the HF tensor."""
    shape: Ints
    at: Ints
    """First corner in the parameter."""


@dataclass(frozen=True)
class Rule:
    """How one mcore parameter is made of HF tensors.

    Along `dim` the parameters of all its ranks, in order, are a row of equal blocks, and each block has the next slice
    of every HF tensor. The last slices are short where the row is longer than the tensor: zeros fill the parameter up.
    """

    hf_names: tuple[str, ...]
    hf_shapes: tuple[Ints, ...]
    dim: int = 0
    blocks: int | None = None
    """None: one per rank."""
    sharded: bool = True
    """False: every tensor rank holds the same."""
    by_expert_rank: tuple[tuple[str, ...], ...] = ()
    """Of an expert's parameter: the hf_names that the same parameter has on each expert-parallel rank."""
    exported: bool = True
    """False: another stage holds the same and exports it."""

    def _sizes(self, ranks: int) -> tuple[int, list[int]]:
        """(blocks of a rank, size of each HF tensor's slice in a block)."""
        blocks = (self.blocks or ranks) if self.sharded else 1
        each = blocks // ranks if self.sharded else 1
        return each, [-(-shape[self.dim] // blocks) for shape in self.hf_shapes]

    def shape(self, ranks: int) -> Ints:
        """Of the parameter on each of so many tensor ranks."""
        each, sizes = self._sizes(ranks)
        return self._along(each * sum(sizes), self.hf_shapes[0])

    def boxes(self, ranks: int, rank: int) -> list[Box]:
        """What the parameter of this tensor rank is, in its order. No two boxes lie side by side in both places.

        Args:
            ranks: tensor-parallel ranks; for an expert's parameter, expert-tensor ranks.
        """
        each, sizes = self._sizes(ranks)
        origin = (0,) * len(self.hf_shapes[0])
        boxes, at = [], 0
        first = each * rank if self.sharded else 0
        for block in range(first, first + each):
            for hf, (size, shape) in enumerate(zip(sizes, self.hf_shapes, strict=True)):
                if (held := min(size, shape[self.dim] - block * size)) > 0:
                    start = self._along(block * size, origin)
                    boxes.append(Box(hf, start, self._along(held, shape), self._along(at, origin)))
                at += size
        return boxes

    def _along(self, value: int, ints: Ints) -> Ints:
        return (*ints[: self.dim], value, *ints[self.dim + 1 :])

    def split(self, hf: Sequence[torch.Tensor], ranks: int, rank: int) -> torch.Tensor:
        """This rank's parameter from the HF tensors, which are in order of hf_names; where it can be, a view of one."""
        import torch

        boxes, shape = self.boxes(ranks, rank), self.shape(ranks)
        if [box.shape for box in boxes] == [shape]:
            return hf[boxes[0].hf][_place(boxes[0].start, shape)]
        new = torch.empty if sum(volume(box.shape) for box in boxes) == volume(shape) else torch.zeros
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in hf))
        parameter = new(shape, dtype=dtype, device=hf[0].device)
        for box in boxes:
            parameter[_place(box.at, box.shape)] = hf[box.hf][_place(box.start, box.shape)]
        return parameter

    def merge(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """New HF tensors, in order of hf_names, from the parameter of every tensor rank, in order."""
        whole = [shards[0].new_empty(shape) for shape in self.hf_shapes]
        for rank, shard in enumerate(shards):
            for box in self.boxes(len(shards), rank):
                whole[box.hf][_place(box.start, box.shape)] = shard[_place(box.at, box.shape)]
        return whole


def _place(start: Ints, shape: Ints) -> tuple[slice, ...]:
    return tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))


def _whole(name: str, *shape: int) -> Rule:
    return Rule((name,), (shape,), sharded=False)


def _columns(name: str, *shape: int) -> Rule:
    """Row-parallel linears (output and down projections): a rank has some of the inputs, that is columns."""
    return Rule((name,), (shape,), dim=1)


def _gate_up(prefix: str, ffn: int, hidden: int) -> Rule:
    return Rule((f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight"), ((ffn, hidden),) * 2)


def _qkv(prefix: str, kind: str, shape: ModelShape) -> Rule:
    names = tuple(f"{prefix}.{part}_proj.{kind}" for part in "qkv")
    columns = (shape.hidden,) if kind == "weight" else ()
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    return Rule(names, tuple((n * shape.head_dim, *columns) for n in heads), blocks=shape.kv_heads)


def _expert(name: str, prefix: str, shape: ModelShape, rank: int, ranks: int) -> Rule:
    matched = _EXPERT.fullmatch(name)
    if matched is None or shape.experts is None:
        raise KeyError(f"no rule for megatron parameter {name!r} of {prefix}")
    each, local, ffn = shape.experts.count // ranks, int(matched[1] or matched[3]), shape.experts.ffn
    prefixes = [f"{prefix}.experts.{other * each + local}" for other in range(ranks)]
    rules = [
        _gate_up(p, ffn, shape.hidden) if matched[2] == "1" else _columns(f"{p}.down_proj.weight", shape.hidden, ffn)
        for p in prefixes
    ]
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
            return _whole(f"{hf}.input_layernorm.weight", shape.hidden)
        case "pre_mlp_layernorm.weight" | "mlp.linear_fc1.layer_norm_weight":
            return _whole(f"{hf}.post_attention_layernorm.weight", shape.hidden)
        case "self_attention.q_layernorm.weight":
            return _whole(f"{hf}.self_attn.q_norm.weight", shape.head_dim)
        case "self_attention.k_layernorm.weight":
            return _whole(f"{hf}.self_attn.k_norm.weight", shape.head_dim)
        case "self_attention.linear_qkv.weight" | "self_attention.linear_qkv.bias":
            return _qkv(f"{hf}.self_attn", name.rsplit(".", 1)[1], shape)
        case "self_attention.linear_proj.weight":
            return _columns(f"{hf}.self_attn.o_proj.weight", shape.hidden, shape.heads * shape.head_dim)
        case "mlp.linear_fc1.weight":
            return _gate_up(f"{hf}.mlp", shape.ffn, shape.hidden)
        case "mlp.linear_fc2.weight":
            return _columns(f"{hf}.mlp.down_proj.weight", shape.hidden, shape.ffn)
        case "mlp.router.weight" if shape.experts is not None:
            return _whole(f"{hf}.mlp.gate.weight", shape.experts.count, shape.hidden)
    return _expert(name, f"{hf}.mlp", shape, expert_rank, expert_ranks)


def rule_of(name: str, shape: ModelShape, expert_rank: int = 0, expert_ranks: int = 1) -> Rule:
    """The rule of a parameter by megatron's name of it, in which layers count over the whole model.

    The output layer of a tied model on the last of several stages is a copy of the embedding: the stage that owns the
    embedding exports it.

    Raises:
        KeyError: no such parameter is known.
    """
    vocabulary = (shape.vocab, shape.hidden)
    match name:
        case "embedding.word_embeddings.weight":
            return Rule(("model.embed_tokens.weight",), (vocabulary,))
        case "output_layer.weight" if shape.tied:
            return Rule(("model.embed_tokens.weight",), (vocabulary,), exported=False)
        case "output_layer.weight":
            return Rule(("lm_head.weight",), (vocabulary,))
        case "decoder.final_layernorm.weight":
            return _whole("model.norm.weight", shape.hidden)
    if (matched := _LAYER.fullmatch(name)) is None:
        raise KeyError(f"no rule for megatron parameter {name!r}")
    return layer_rule(matched[2], int(matched[1]), shape, expert_rank, expert_ranks)
