"""What a policy rank holds of the HF checkpoint: of live model chunks, and of any rank of a layout by arithmetic.

In: the chunks of this rank, or a `ModelShape` and a layout. Out: the `Index` from which a refit is planned, whose
tensors have megatron's names with layers counted over the whole model; and the live tensors of these names.
A refit is planned once: offsets stay, storages move (policy/memory.py), so the tensors are looked up at every refit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_fapo.config.policy import ParallelConfig
from megatron_fapo.errors import UserError
from megatron_fapo.policy.hf_config import ModelShape, layout_problems, stage_layers
from megatron_fapo.policy.hf_rules import Rule, rule_of
from megatron_fapo.weight_sync.protocol import RefitError
from megatron_fapo.weight_sync.regions import Index, LocalTensor, Region, View, contiguous_stride

if TYPE_CHECKING:
    import torch


class Place(NamedTuple):
    """Where a rank stands, as far as its weights depend on it."""

    stage: int
    tensor: int
    expert: int
    expert_tensor: int


def place_of(parallel: ParallelConfig, rank: int) -> Place:
    """megatron numbers a stage's ranks tensor fastest, and cuts the groups of experts out of the same row
    (expert-tensor fastest)."""
    stage, in_stage = divmod(rank, parallel.tensor * parallel.context * parallel.data)
    expert, expert_tensor = divmod(in_stage, parallel.expert_tensor)
    return Place(stage, in_stage % parallel.tensor, expert % parallel.expert, expert_tensor)


def planned_indexes(shape: ModelShape, parallel: ParallelConfig, dtype: str) -> list[Index]:
    """Of every rank of the layout, in their order; ranks that hold the same share one object.

    Raises:
        UserError: the model cannot be laid out like that.
    """
    if problems := layout_problems(shape, parallel):
        raise UserError("\n  ".join(["the policy's ranks cannot be laid out:", *problems]))
    places = [place_of(parallel, rank) for rank in range(parallel.world_size)]
    found = {place: planned_index(shape, parallel, place, dtype) for place in dict.fromkeys(places)}
    return [found[place] for place in places]


def planned_index(shape: ModelShape, parallel: ParallelConfig, place: Place, dtype: str) -> Index:
    """Of one rank, made of megatron's own modules (Transformer Engine's have other names and order for the same).

    Args:
        dtype: of the parameters, as torch names it.
    """
    tensors = []
    for name in _parameter_names(shape, parallel, place.stage):
        rule = rule_of(name, shape, place.expert, parallel.expert)
        expert = place.expert_tensor, parallel.expert_tensor
        rank, ranks = expert if rule.by_expert_rank else (place.tensor, parallel.tensor)
        tensors.append((name, LocalTensor(rule.shape(ranks), dtype), rule, ranks, rank))
    return _index(tensors)


def _parameter_names(shape: ModelShape, parallel: ParallelConfig, stage: int) -> Iterator[str]:
    """In the order of megatron's modules."""
    first, last = stage == 0, stage == parallel.pipeline - 1
    if first:
        yield "embedding.word_embeddings.weight"
    for layer in layers_of(shape.layers, parallel, stage):
        for name in _layer_names(shape, parallel):
            yield f"decoder.layers.{layer}.{name}"
    if last:
        yield "decoder.final_layernorm.weight"
        if not (shape.tied and first):
            yield "output_layer.weight"


def layers_of(layers: int, parallel: ParallelConfig, stage: int) -> list[int]:
    """Numbers of a stage's layers: they are dealt chunk by chunk, each to all stages in turn."""
    by_stage = stage_layers(layers, parallel)
    found: list[int] = []
    begin = 0
    for chunk in range(len(by_stage[0])):
        for other, counts in enumerate(by_stage):
            if other == stage:
                found += range(begin, begin + counts[chunk])
            begin += counts[chunk]
    return found


def _layer_names(shape: ModelShape, parallel: ParallelConfig) -> Iterator[str]:
    yield "input_layernorm.weight"
    yield "self_attention.linear_proj.weight"
    yield "self_attention.linear_qkv.weight"
    if shape.qkv_bias:
        yield "self_attention.linear_qkv.bias"
    if shape.qk_norm:
        yield "self_attention.q_layernorm.weight"
        yield "self_attention.k_layernorm.weight"
    yield "pre_mlp_layernorm.weight"
    if shape.experts is None:
        yield "mlp.linear_fc1.weight"
        yield "mlp.linear_fc2.weight"
        return
    yield "mlp.router.weight"
    for expert in range(shape.experts.count // parallel.expert):
        yield f"mlp.experts.local_experts.{expert}.linear_fc1.weight"
        yield f"mlp.experts.local_experts.{expert}.linear_fc2.weight"


def _index(tensors: Iterable[tuple[str, LocalTensor, Rule, int, int]]) -> Index:
    """Of parameters with their names, rules, and (size, place) of the ranks that each is split over."""
    held: dict[str, LocalTensor] = {}
    regions = []
    for name, tensor, rule, ranks, rank in tensors:
        held[name] = tensor
        stride = contiguous_stride(tensor.shape)
        start = View(name, 0, stride)
        regions += [
            Region(rule.hf_names[box.hf], box.start, box.shape, start.moved(box.at)) for box in rule.boxes(ranks, rank)
        ]
    return Index(held, tuple(regions))


def source_index(chunks: Sequence[Any], shape: ModelShape) -> Index:
    """Of this rank's model chunks, in their order; ranks and layers are asked of mcore.

    Raises:
        RefitError: a parameter or a persistent buffer that no rule knows, or a parameter of another shape than its
            rule's, or kept in another form than its elements: engines would go on with something else than what is
            trained.
    """
    import torch
    from megatron.core import parallel_state as state

    from megatron_fapo.policy.hf_weights import named_parameters, place_in_tensor_group

    expert = state.get_expert_model_parallel_rank(), state.get_expert_model_parallel_world_size()
    tensors = []
    problems = [f"buffer {name} is in no HF checkpoint" for chunk in chunks for name in _persistent_buffers(chunk)]
    for name, parameter in (pair for chunk in chunks for pair in named_parameters(chunk)):
        try:
            rule = rule_of(name, shape, *expert)
        except KeyError as unknown:
            problems.append(unknown.args[0])
            continue
        ranks, rank = place_in_tensor_group(rule)
        if type(parameter.data) not in (torch.Tensor, torch.nn.Parameter):  # Transformer Engine's FP8 parameters
            problems.append(f"parameter {name} is a {type(parameter.data).__name__}, whose memory is not its elements")
        tensor = LocalTensor(tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."))
        if tensor.shape != rule.shape(ranks):
            problems.append(f"parameter {name} has shape {tensor.shape}, and by its rule {rule.shape(ranks)}")
        tensors.append((name, tensor, rule, ranks, rank))
    if problems:
        raise RefitError("engines cannot be given this policy's weights:\n  " + "\n  ".join(problems))
    return _index(tensors)


def _persistent_buffers(chunk: Any) -> Iterator[str]:
    for prefix, module in chunk.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name} {tuple(buffer.shape)}"


def source_tensors(chunks: Sequence[Any]) -> dict[str, torch.Tensor]:
    """The live tensors of a `source_index`, by its names. For one refit: an offload takes their memory away.

    Raises:
        RefitError: tensors that are in host memory, or not contiguous, with their names.
    """
    from megatron_fapo.policy.hf_weights import named_parameters

    tensors = {name: parameter.detach() for chunk in chunks for name, parameter in named_parameters(chunk)}
    problems = []
    for name, tensor in tensors.items():
        if tensor.untyped_storage().nbytes() < tensor.nbytes:
            problems.append(f"{name} is in host memory: enter the phase refit first")
        elif not tensor.is_contiguous():
            problems.append(f"{name} is not contiguous: its strides are {tensor.stride()} for {tuple(tensor.shape)}")
    if problems:
        raise RefitError("the policy's weights cannot be read:\n  " + "\n  ".join(problems))
    return tensors
