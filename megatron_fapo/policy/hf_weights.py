"""HF checkpoint <-> this rank's megatron shards, both ways, bit for bit.

In: HF safetensors and a `ModelShape`; or the model chunks of a rank. Out: filled parameters; or HF-named full tensors.

Each mcore parameter follows one `Rule` of hf_rules.py.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_fapo.errors import UserError
from megatron_fapo.policy.hf_config import ModelShape
from megatron_fapo.policy.hf_rules import Rule, rule_of

_LAYERS = "decoder.layers."


def named_parameters(chunk: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters of a model chunk by megatron's names, with the number of a layer over the whole model: asked of
    mcore, and so unique over the chunks of a rank."""
    for name, parameter in chunk.named_parameters():
        if name.startswith(_LAYERS):
            local, within = name.removeprefix(_LAYERS).split(".", 1)
            name = f"{_LAYERS}{chunk.decoder.layers[int(local)].layer_number - 1}.{within}"
        yield name, parameter


def model_rules(model: Any, shape: ModelShape) -> list[tuple[torch.nn.Parameter, Rule]]:
    """Every parameter of a model chunk of this rank with its rule, in a fixed order."""
    from megatron.core import parallel_state as state

    expert = state.get_expert_model_parallel_rank(), state.get_expert_model_parallel_world_size()
    return [(parameter, rule_of(name, shape, *expert)) for name, parameter in named_parameters(model)]


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
        for (name, tensor), expected in zip(whole.items(), rule.hf_shapes, strict=True):
            if tuple(tensor.shape) != expected:
                raise UserError(
                    f"{path}: {name} has shape {tuple(tensor.shape)} where the model of config.json has "
                    f"{expected}; do they belong together?"
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
