"""What a rank says it holds: by arithmetic over random layouts, and of live parameters that move.

That live ranks of every kind of layout hold what they say, and what was planned of them, is in test_hf_weights.py.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fapo.config.policy import ParallelConfig, PolicyConfig
from megatron_fapo.errors import UserError
from megatron_fapo.policy.hf_config import Experts, ModelShape, layout_problems
from megatron_fapo.policy.hf_rules import rule_of
from megatron_fapo.policy.parallel import Rank
from megatron_fapo.policy.source_index import planned_indexes, source_index, source_tensors
from megatron_fapo.weight_sync.protocol import RefitError
from megatron_fapo.weight_sync.regions import Index, Region, contiguous_stride, volume
from tests.policy.ranks import Ranks, make_worker, policy_config
from tests.policy.test_hf_config import DENSE, MOE


def box_of(region: Region) -> tuple[slice, ...]:
    """Of the HF tensor."""
    return tuple(slice(start, start + size) for start, size in zip(region.start, region.shape, strict=True))


def part_of(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    """The view of a local tensor, which may itself lie somewhere in a larger storage."""
    return tensor.as_strided(region.shape, region.view.stride, tensor.storage_offset() + region.view.offset)


def holders(indexes: list[Index], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """How many processes have each element of an HF tensor."""
    count = np.zeros(shape, int)
    for region in (region for index in indexes for region in index.regions if region.name == name):
        count[box_of(region)] += 1
    return count


def expected_holders(name: str, shape: ModelShape, parallel: ParallelConfig) -> int:
    """How many ranks of a layout have each element."""
    in_stage = parallel.world_size // parallel.pipeline
    if ".experts." in name:
        return in_stage // (parallel.expert * parallel.expert_tensor)
    if "norm" in name or name.endswith("mlp.gate.weight"):
        return in_stage
    copies = 2 if "embed_tokens" in name and shape.tied and parallel.pipeline > 1 else 1
    return copies * in_stage // parallel.tensor


@st.composite
def laid_out(draw: Any) -> tuple[ModelShape, ParallelConfig]:
    few, flag = st.integers(1, 3), st.booleans()
    tensor, pipeline, experts = draw(st.sampled_from((1, 2, 4))), draw(few), draw(st.sampled_from((0, 0, 2, 4)))
    chunks = draw(few) if pipeline > 1 else 1
    parallel = ParallelConfig(
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=chunks,
        context=draw(st.integers(1, 2)),
        data=draw(few),
        sequence_parallel=tensor > 1,
        expert=draw(st.sampled_from((1, 2))) if experts else 1,
        expert_tensor=draw(st.sampled_from((1, 2))) if experts else 1,
        loss_in_split=pipeline > 1 and draw(flag),
    )
    kv_heads, head_dim = tensor * draw(few), draw(few)
    shape = replace(
        MOE if experts else DENSE,
        layers=pipeline * chunks * draw(few) - parallel.loss_in_split,
        hidden=draw(few),
        ffn=tensor * draw(few),
        heads=kv_heads * draw(few),
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=draw(st.integers(1, 11)),
        tied=draw(flag),
        qkv_bias=draw(flag),
        qk_norm=draw(flag),
        experts=Experts(experts, 1, 2 * draw(few), normalised=False) if experts else None,
    )
    return shape, parallel


def _hf_tensors(shape: ModelShape, names: list[str], parallel: ParallelConfig) -> dict[str, torch.Tensor]:
    """Every element of every tensor another number; none is 0."""
    tensors: dict[str, torch.Tensor] = {}
    end = 1
    for rule in (rule_of(name, shape, rank, parallel.expert) for name in names for rank in range(parallel.expert)):
        for name, size in zip(rule.hf_names, rule.hf_shapes, strict=True):
            if name not in tensors:
                tensors[name] = torch.arange(end, end := end + volume(size)).view(size)
    return tensors


@settings(max_examples=60, deadline=None)
@given(laid_out())
def test_all_ranks_together_hold_every_element_as_often_as_the_layout_says(case: tuple[Any, Any]) -> None:
    shape, parallel = case
    if layout_problems(shape, parallel):
        with pytest.raises(UserError, match="cannot be laid out"):
            planned_indexes(shape, parallel, "float32")
        return
    indexes = planned_indexes(shape, parallel, "float32")
    assert len(indexes) == parallel.world_size
    hf = _hf_tensors(shape, [name for index in indexes for name in index.tensors], parallel)
    assert sum(tensor.numel() for tensor in hf.values()) == shape.parameters
    assert {region.name for index in indexes for region in index.regions} == hf.keys()
    for name, tensor in hf.items():
        count = holders(indexes, name, tuple(tensor.shape))
        assert np.array_equal(np.unique(count), [expected_holders(name, shape, parallel)]), name


@settings(max_examples=60, deadline=None)
@given(laid_out())
def test_regions_split_and_merge_say_the_same(case: tuple[Any, Any]) -> None:
    """The parameter that `split` cuts has, region by region, the HF tensors' elements, and zeros elsewhere; `merge` of
    all ranks' gives the HF tensors back; and neighbours in both places are one region."""
    shape, parallel = case
    if layout_problems(shape, parallel):
        return
    indexes = planned_indexes(shape, parallel, "int64")
    hf = _hf_tensors(shape, [name for index in indexes for name in index.tensors], parallel)
    in_stage = len(indexes) // parallel.pipeline
    for index in {id(index): index for index in indexes}.values():  # others hold the same
        rank = indexes.index(index)
        expert, expert_tensor = divmod(rank % in_stage, parallel.expert_tensor)
        expert %= parallel.expert
        for name, local in index.tensors.items():
            rule = rule_of(name, shape, expert, parallel.expert)
            ranks = parallel.expert_tensor if rule.by_expert_rank else parallel.tensor
            place = expert_tensor if rule.by_expert_rank else rank % in_stage % parallel.tensor
            whole = [hf[hf_name] for hf_name in rule.hf_names]
            shards = [rule.split(whole, ranks, other) for other in range(ranks)]
            for merged, tensor in zip(rule.merge(shards if rule.sharded else shards[:1]), whole, strict=True):
                assert torch.equal(merged, tensor)
            assert tuple(shards[place].shape) == local.shape
            left = shards[place].clone()
            regions = [region for region in index.regions if region.view.tensor == name]
            for region in regions:
                assert region.view.stride == contiguous_stride(local.shape)
                part = part_of(left, region)
                assert torch.equal(part, hf[region.name][box_of(region)])
                part.zero_()
            assert not left.any()
            for one, other in itertools.combinations(regions, 2):
                if one.name == other.name:
                    steps = [b - a for a, b in zip(one.start, other.start, strict=True)]
                    assert other.view != one.view.moved(tuple(steps))


def test_no_rank_and_no_library_is_needed() -> None:
    code = "import sys, megatron_fapo.policy.source_index; assert not {'torch', 'megatron.core'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def moves_job(rank: Rank, cfg: PolicyConfig) -> None:
    worker = make_worker(rank, cfg)
    index, exported = source_index(worker.chunks, worker.shape), dict(worker.export())

    def read() -> dict[str, torch.Tensor]:
        tensors, whole = source_tensors(worker.chunks), {n: torch.full_like(t, torch.nan) for n, t in exported.items()}
        for region in index.regions:
            whole[region.name][box_of(region)] = part_of(tensors[region.view.tensor], region)
        return whole

    def refused() -> str:
        with pytest.raises(RefitError) as error:
            source_tensors(worker.chunks)
        return str(error.value)

    worker.memory.enter("rollout")
    assert all(f"{name} is in host memory" in refused() for name in index.tensors)
    worker.memory.enter("refit")
    assert [name for name, tensor in read().items() if not torch.equal(tensor, exported[name])] == []

    parameter = worker.chunks[0].decoder.layers[0].mlp.linear_fc2.weight
    before = source_tensors(worker.chunks)["decoder.layers.0.mlp.linear_fc2.weight"]
    parameter.data = parameter.data + 1  # new storage
    changed = read()["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(changed, exported["model.layers.0.mlp.down_proj.weight"] + 1)
    assert not torch.equal(before, changed)
    parameter.data = parameter.data.T.contiguous().T
    assert "decoder.layers.0.mlp.linear_fc2.weight is not contiguous: its strides are (1, 128)" in refused()
    worker.close()


def test_tensors_are_found_wherever_they_have_moved(ranks: Ranks, qwen3: str) -> None:
    ranks.run(1, moves_job, policy_config(qwen3, offload=True))


def unknown_job(rank: Rank, cfg: PolicyConfig) -> str:
    worker = make_worker(rank, cfg)
    layer = worker.chunks[0].decoder.layers[1]
    layer.mlp.register_buffer("expert_bias", torch.zeros(4))
    layer.mlp.register_buffer("scratch", torch.zeros(4), persistent=False)
    layer.mlp.gain = torch.nn.Parameter(torch.ones(2))
    layer.input_layernorm.weight.data = torch.ones(64)
    with pytest.raises(RefitError) as error:
        source_index(worker.chunks, worker.shape)
    worker.close()
    return str(error.value)


def test_what_no_checkpoint_has_is_refused_by_name(ranks: Ranks, qwen3: str) -> None:
    (message,) = ranks.run(1, unknown_job, policy_config(qwen3))
    assert message.split("\n  ")[1:] == [
        "buffer decoder.layers.1.mlp.expert_bias (4,) is in no HF checkpoint",
        "parameter decoder.layers.1.input_layernorm.weight has shape (64,), and by its rule (128,)",
        "no rule for megatron parameter 'mlp.gain' of model.layers.1.mlp",
    ]
