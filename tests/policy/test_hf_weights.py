"""HF -> megatron -> HF is bitwise: by the rules alone, and with real ranks of every kind of layout."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_fapo.config.policy import ParallelConfig, PolicyConfig
from megatron_fapo.errors import UserError
from megatron_fapo.policy.hf_config import read_model_shape
from megatron_fapo.policy.hf_rules import layer_rule
from megatron_fapo.policy.hf_weights import (
    HFCheckpoint,
    export_hf,
    exports,
    load_hf,
    model_rules,
    owns_export,
    save_stage,
    write_index,
)
from megatron_fapo.policy.parallel import Rank, join
from megatron_fapo.policy.source_index import planned_indexes, source_index, source_tensors
from megatron_fapo.weight_sync.regions import Index, LocalTensor
from tests.policy.models import FAMILIES, write_model
from tests.policy.ranks import Ranks
from tests.policy.test_source_index import box_of, expected_holders, holders, part_of

ATTENTION = ["self_attention.linear_qkv.weight", "self_attention.linear_proj.weight"]
DENSE = [*ATTENTION, "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
OWN_NORMS = ["input_layernorm.weight", "pre_mlp_layernorm.weight"]
TE_NORMS = ["self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"]
QK_NORMS = ["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"]


def _layer_names(family: str, transformer_engine: bool, experts: int) -> list[str]:
    """The parameters of a layer on one rank, which has `experts` of a Qwen3-MoE."""
    norms = TE_NORMS if transformer_engine else OWN_NORMS
    if family != "qwen3_moe":
        extra = {"qwen2": ["self_attention.linear_qkv.bias"], "qwen3": QK_NORMS, "llama": []}[family]
        return [*DENSE, *norms, *extra]
    form = "linear_fc{0}.weight{1}" if transformer_engine else "local_experts.{1}.linear_fc{0}.weight"
    names = [f"mlp.experts.{form.format(half, i)}" for i in range(experts) for half in (1, 2)]
    return [*ATTENTION, norms[0], "pre_mlp_layernorm.weight", *QK_NORMS, "mlp.router.weight", *names]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], str]:
    """Checkpoints of every family, tied and untied, in bfloat16 and with an odd vocabulary."""
    root = tmp_path_factory.mktemp("families")
    kinds = [(family, tied) for family in FAMILIES for tied in (True, False)]
    return {(f, tied): write_model(root / f"{f}-{tied}", f, tied, dtype="bfloat16") for f, tied in kinds}


@pytest.mark.parametrize("transformer_engine", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_rules_lose_nothing(models: Any, family: str, ranks: int, transformer_engine: bool) -> None:
    """Every tensor of a layer is in one rule, and comes back from its shards; `ranks` of tensors and of experts."""
    shape, checkpoint = read_model_shape(models[family, True]), HFCheckpoint(models[family, True])
    found: list[str] = []
    for expert_rank in range(ranks):
        for name in _layer_names(family, transformer_engine, 4 // ranks):
            rule = layer_rule(name, 2, shape, expert_rank, ranks)
            if expert_rank and not rule.by_expert_rank:
                continue
            whole = [checkpoint[hf] for hf in rule.hf_names]
            shards = [rule.split(whole, ranks, rank).clone() for rank in range(ranks)]
            assert all(
                shard.numel() * (ranks if rule.sharded else 1) == sum(t.numel() for t in whole) for shard in shards
            )
            for merged, original in zip(rule.merge(shards if rule.sharded else shards[:1]), whole, strict=True):
                assert torch.equal(merged, original)
            found += rule.hf_names
            if rule.by_expert_rank:
                assert rule.by_expert_rank[expert_rank] == rule.hf_names
    assert sorted(found) == [name for name in checkpoint.names() if name.startswith("model.layers.2.")]


def test_a_parameter_without_a_rule_is_an_error(models: Any) -> None:
    shape = read_model_shape(models["qwen3", True])
    for name in ("mlp.shared_experts.linear_fc1.weight", "mlp.experts.local_experts.0.linear_fc3.weight"):
        with pytest.raises(KeyError, match="no rule"):
            layer_rule(name, 0, shape)


def _digests(tensors: Any) -> dict[str, str]:
    return {n: hashlib.sha256(t.contiguous().view(torch.int16).numpy().tobytes()).hexdigest() for n, t in tensors}


def round_trip_job(rank: Rank, parallel: ParallelConfig, paths: list[str]) -> Any:
    """(index of its source by model; (stage, whether it owns the export, its tensors by model) if it exports)."""
    state = join(rank, parallel, "cpu", seed=1)
    from megatron_fapo.policy.model import build_chunks

    results, indexes = [], []
    expert = state.get_expert_model_parallel_rank(), state.get_expert_model_parallel_world_size()
    for path in paths:
        shape = read_model_shape(path)
        chunks = build_chunks(shape, PolicyConfig(model_path=path, parallel=parallel), torch.bfloat16)
        for chunk in chunks:
            for parameter, _ in model_rules(chunk, shape):
                parameter.data.fill_(float("nan"))
        load_hf(chunks, shape, path)
        for layer in (layer for chunk in chunks for layer in chunk.decoder.layers if shape.experts):
            # The router counts experts as megatron does: an export could be right and the model another.
            local = [
                layer_rule(n, 0, shape, *expert).hf_names[0] for n, _ in layer.named_parameters() if ".experts." in n
            ]
            assert {int(name.split(".")[5]) for name in local} == set(layer.mlp.local_expert_indices)
        # Padding stands for no token, so nothing of it may be left over from before.
        assert all(p.isfinite().all() for chunk in chunks for p in chunk.parameters())
        indexes.append(source_index(chunks, shape))
        _holds_what_it_says(indexes[-1], source_tensors(chunks), HFCheckpoint(path))
        if exports(state):
            results.append(_digests(export_hf(chunks, shape)))
    stage, owns = state.get_pipeline_model_parallel_rank(), owns_export(state)
    torch.distributed.barrier()
    state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    return indexes, (stage, owns, results) if results else None


def _holds_what_it_says(index: Index, tensors: dict[str, torch.Tensor], checkpoint: HFCheckpoint) -> None:
    assert list(index.tensors) == list(tensors)
    for name, tensor in tensors.items():
        assert index.tensors[name] == LocalTensor(tuple(tensor.shape), "bfloat16")
    for region in index.regions:
        held = part_of(tensors[region.view.tensor], region)
        assert torch.equal(held, checkpoint[region.name][box_of(region)]), region


LAYOUTS: dict[str, tuple[dict[str, Any], int]] = {
    "one rank": ({}, 1),
    "TP2": ({"tensor": 2}, 2),
    "PP2": ({"pipeline": 2}, 2),
    "TP2xPP2": ({"tensor": 2, "pipeline": 2}, 4),
    "PP2+VPP2": ({"pipeline": 2, "virtual_pipeline": 2}, 2),
    "PP2, 1+3 layers": ({"pipeline": 2, "first_stage_layers": 1}, 2),
    "TP2xCP2": ({"tensor": 2, "context": 2}, 2),
}
EXPERT_LAYOUTS: dict[str, tuple[dict[str, Any], int]] = {
    "EP2": ({"data": 2, "expert": 2}, 2),
    "EP2 over TP2": ({"tensor": 2, "expert": 2}, 2),
    "ETP2 over TP2, DP2": ({"tensor": 2, "data": 2, "expert_tensor": 2}, 2),
    "EP2xETP2 over TP2, CP2": ({"tensor": 2, "context": 2, "expert": 2, "expert_tensor": 2}, 4),
    "EP2xPP2+VPP2": ({"data": 2, "expert": 2, "pipeline": 2, "virtual_pipeline": 2}, 4),
}
"""Layouts, and how many of their ranks take part in an export."""


@pytest.mark.parametrize("layout", [*LAYOUTS, *EXPERT_LAYOUTS])
def test_round_trip_is_bitwise(ranks: Ranks, models: Any, layout: str) -> None:
    fields, exporting = (LAYOUTS | EXPERT_LAYOUTS)[layout]
    # megatron asks for sequence parallelism where experts meet tensor ranks; the weights are the same.
    parallel = ParallelConfig(sequence_parallel="tensor" in fields, **fields)
    paths = [path for (family, _), path in models.items() if layout in LAYOUTS or family == "qwen3_moe"]
    answers = ranks.run(parallel.world_size, round_trip_job, parallel, paths)
    results = [result for _, result in answers if result is not None]
    assert len(results) == exporting
    assert sorted(stage for stage, owns, _ in results if owns) == list(range(parallel.pipeline))
    owners = {stage: found for stage, owns, found in results if owns}
    for stage, _, found in results:
        assert found == owners[stage]  # every exporting rank of a stage gets all of its tensors, in step
    for i, path in enumerate(paths):
        names = [name for stage in owners.values() for name in stage[i]]
        assert len(names) == len(set(names))  # each tensor from one stage
        source = HFCheckpoint(path)
        exported = {name: digest for stage in owners.values() for name, digest in stage[i].items()}
        assert exported == _digests((name, source[name]) for name in source.names())
        shape, indexes = read_model_shape(path), [indexes[i] for indexes, _ in answers]
        planned = planned_indexes(shape, parallel, "bfloat16")
        assert [index.to_json() for index in indexes] == [index.to_json() for index in planned]
        for name in source.names():
            expected = expected_holders(name, shape, parallel)
            assert np.array_equal(np.unique(holders(indexes, name, tuple(source[name].shape))), [expected]), name


def load_job(rank: Rank, path: str) -> str:
    state = join(rank, ParallelConfig(), "cpu", seed=1)
    from megatron_fapo.policy.model import build_chunks

    shape = read_model_shape(path)
    try:
        load_hf(build_chunks(shape, PolicyConfig(model_path=path), torch.bfloat16), shape, path)
    except UserError as error:
        return str(error)
    finally:
        state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    return ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 4}, "k_proj.weight has shape (64, 128) where the model of config.json has (128, 128)"),
        ({"vocab_size": 516}, "embed_tokens.weight has shape (515, 128)"),
        ({"num_hidden_layers": 5}, "tensor model.layers.4.input_layernorm.weight is missing"),
    ],
)
def test_weights_of_another_model_are_refused(ranks: Ranks, tmp_path: Path, changes: Any, message: str) -> None:
    path = Path(write_model(tmp_path))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    assert message in ranks.run(1, load_job, str(path))[0]


def test_stages_are_files_that_loaders_find(tmp_path: Path) -> None:
    stages = [{"a": torch.arange(3.0)}, {"b": torch.arange(4.0), "c": torch.zeros(2)[::2]}]
    names = [save_stage(iter(stage.items()), tmp_path, i, 2) for i, stage in enumerate(stages)]
    write_index(tmp_path, names)
    assert [*load_file(tmp_path / "model-00002-of-00002.safetensors")] == ["b", "c"]
    checkpoint = HFCheckpoint(tmp_path)
    assert checkpoint.names() == ["a", "b", "c"]
    assert torch.equal(checkpoint["b"], torch.arange(4.0))
    with pytest.raises(UserError, match="tensor d is missing"):
        checkpoint["d"]
