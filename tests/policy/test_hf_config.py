"""What config.json says of a model, and which layouts it allows: held to transformers' and megatron's own answers."""

from __future__ import annotations

import itertools
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fapo.config.policy import ParallelConfig
from megatron_fapo.errors import UserError
from megatron_fapo.policy.hf_config import Experts, ModelShape, layout_problems, read_model_shape, stage_layers
from megatron_fapo.policy.source_index import layers_of
from tests.policy.models import FAMILIES, ROPES, write_config

DENSE = ModelShape(
    architecture="Qwen3ForCausalLM", layers=24, hidden=64, ffn=96, heads=12, kv_heads=4, head_dim=16, vocab=99,
    max_positions=128, rope_theta=1e4, rope_scaling=None, norm_eps=1e-6, tied=False, qkv_bias=False, qk_norm=True,
    dtype="float32",
)  # fmt: skip
MOE = replace(
    DENSE, architecture="Qwen3MoeForCausalLM", experts=Experts(count=12, per_token=2, ffn=32, normalised=True)
)


def _write(directory: Path, **changes: Any) -> Path:
    """A Qwen3 config with changes; None removes a key."""
    write_config(directory, "qwen3")
    raw = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    return directory


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_transformers(tmp_path: Path, family: str, tied: bool) -> None:
    import transformers

    config = write_config(tmp_path, family, tied)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shape = read_model_shape(tmp_path)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    idle = (4 - 2) * 3 * 128 * 64 * 4 if family == "qwen3_moe" else 0  # 2 of 4 experts of 64 columns, in 4 layers
    assert shape.active_parameters == shape.parameters - idle


@pytest.mark.parametrize("rope", ROPES)
def test_megatron_rotates_as_transformers_does(tmp_path: Path, rope: str) -> None:
    """Cosines and sines of every position, attention factor included, through the arguments the policy passes on."""
    from types import SimpleNamespace

    from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
        _yarn_get_concentration_factor_from_config as scale_of,
    )
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    hf = LlamaRotaryEmbedding(write_config(tmp_path, "llama", rope=rope))
    cos, sin = (t[0] for t in hf(torch.zeros(1), torch.arange(512)[None]))
    shape = read_model_shape(tmp_path)
    scaling = shape.rope_scaling
    arguments: dict[str, Any] = {"kv_channels": shape.head_dim, "rotary_base": shape.rope_theta}
    arguments |= {"rotary_percent": 1.0, "use_cpu_initialization": True}
    scale = 1.0
    if scaling is not None and scaling.kind == "yarn":
        attributes = {name.removeprefix("yarn_"): value for name, value in scaling.config_attributes.items()}
        assert attributes.pop("apply_rope_fusion") is False
        attributes["scaling_factor"] = attributes.pop("rotary_scaling_factor")
        # The constructor asks its forward for a cache, which wants a CUDA device to move to; frequencies need none.
        embedding = YarnRotaryEmbedding.__new__(YarnRotaryEmbedding)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "current_device", lambda: "cpu")
            YarnRotaryEmbedding.__init__(embedding, **arguments, **attributes)
            angles, scale = embedding.get_emb(512)
        assert scale == scale_of(SimpleNamespace(**scaling.config_attributes)) != 1.0
    else:
        extra = dict(scaling.model_arguments) if scaling else {}
        assert extra.pop("position_embedding_type", "rope") == "rope"
        angles = torch.cat([RotaryEmbedding(**arguments, **extra).get_freqs_non_repeated(512)] * 2, dim=-1)
    angles = angles.reshape(512, -1)
    torch.testing.assert_close(angles.cos() * scale, cos, rtol=0, atol=2e-5)
    torch.testing.assert_close(angles.sin() * scale, sin, rtol=0, atol=2e-5)
    if rope != "default":
        plain = (torch.arange(512.0)[:, None] * shape.rope_theta ** (-torch.arange(0, 32, 2) / 32)).cos()
        assert (plain - cos[:, :16]).abs().max() > 0.1  # the variant shows at these positions


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "longrope"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "linear"}}, "linear without factor"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "without original_max_position_embeddings"),
        ({"rope_parameters": ROPES["yarn"] | {"attention_factor": 1.5}}, "vLLM fixes it at 1.13863"),
        ({"rope_parameters": ROPES["yarn"] | {"mscale": 1.0, "mscale_all_dim": 1.0}}, "attention factor of 1 "),
        ({"rope_parameters": ROPES["yarn"] | {"attn_factor": 1.0}}, "attn_factor"),
        ({"rope_parameters": ROPES["yarn"], "max_position_embeddings": 513}, "yarn to 512 positions"),
        ({"rope_parameters": ROPES["llama3"] | {"low_freq_factor": 2.0}}, "low_freq_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"mlp_only_layers": [1]}, "mlp_only_layers"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({"hidden_size": None, "rms_norm_eps": None}, "hidden_size, rms_norm_eps missing"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "num_experts, num_experts_per_tok, moe_intermediate_size missing"),
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        read_model_shape(_write(tmp_path, **changes))


def test_an_attention_factor_that_is_the_engines_own_is_no_obstacle(tmp_path: Path) -> None:
    rope = ROPES["yarn"] | {"attention_factor": 1.1386294361}
    assert read_model_shape(_write(tmp_path, rope_parameters=rope)).rope_scaling is not None


@pytest.mark.parametrize(
    ("shape", "parallel", "named"),
    [
        (DENSE, {"tensor": 8}, ("12 attention heads", "4 KV heads", "can be 1, 2, 4")),
        (replace(DENSE, ffn=90), {"tensor": 4}, ("90 FFN columns", "can be 1, 2")),
        (DENSE, {"pipeline": 5}, ("24 layers do not divide by policy.parallel.pipeline=5",)),
        (DENSE, {"pipeline": 2, "virtual_pipeline": 5}, ("virtual_pipeline=5", "(12, 12)")),
        (DENSE, {"virtual_pipeline": 2, "first_stage_layers": 3}, ("virtual_pipeline, first_stage_layers without",)),
        (DENSE, {"pipeline": 3, "first_stage_layers": 5}, ("19 for 2 stages",)),
        (DENSE, {"pipeline": 2, "first_stage_layers": 5, "last_stage_layers": 5}, ("14 for 0 stages",)),
        (DENSE, {"pipeline": 2, "first_stage_layers": 30}, ("no layers", "-6")),
        (DENSE, {"pipeline": 2, "first_stage_layers": 8, "loss_in_split": True}, ("two ways",)),
        (DENSE, {"pipeline": 5, "embedding_in_split": True, "virtual_pipeline": 5}, ("no layers",)),
        (DENSE, {"expert": 2, "expert_tensor": 2}, ("expert=2: Qwen3ForCausalLM has no experts", "expert_tensor=2")),
        (MOE, {"expert": 8, "data": 8}, ("12 experts",)),
        (MOE, {"expert_tensor": 3, "data": 3}, ("FFN size 32",)),
        (
            MOE,
            {"expert": 4, "expert_tensor": 2, "tensor": 2, "sequence_parallel": True, "context": 2},
            ("8 ranks", "4,"),
        ),
        (MOE, {"tensor": 2}, ("sequence_parallel=true",)),
    ],
)
def test_illegal_layouts_are_refused_with_reason_and_remedy(
    shape: ModelShape, parallel: dict[str, Any], named: tuple[str, ...]
) -> None:
    problems = layout_problems(shape, ParallelConfig(**parallel))
    text = "\n".join(problems)
    assert all(part in text for part in named), text
    assert all(": " in problem for problem in problems)  # each ends in what to do


def test_all_reasons_come_at_once() -> None:
    parallel = ParallelConfig(tensor=8, pipeline=5, expert=5, expert_tensor=3)
    # Heads, KV heads, layers, experts, an expert's columns, ranks for experts, sequence parallelism.
    assert len(layout_problems(MOE, parallel)) == 7


LAYOUTS = st.fixed_dictionaries(
    {
        "pipeline": st.integers(1, 4),
        "virtual_pipeline": st.integers(1, 3),
        "first_stage_layers": st.none() | st.integers(1, 9),
        "last_stage_layers": st.none() | st.integers(1, 9),
        "embedding_in_split": st.booleans(),
        "loss_in_split": st.booleans(),
    }
)


def _ask_megatron(layers: int, parallel: ParallelConfig) -> list[list[tuple[int, int]]]:
    """(layers, layers before) of every chunk of every stage."""
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    virtual = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_dtype=torch.float32,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        num_layers_in_last_pipeline_stage=parallel.last_stage_layers,
        account_for_embedding_in_pipeline_split=parallel.embedding_in_split,
        account_for_loss_in_pipeline_split=parallel.loss_in_split,
    )
    chunks = range(virtual) if virtual else [None]
    return [
        [(get_num_layers_to_build(config, c, stage), get_transformer_layer_offset(config, c, stage)) for c in chunks]
        for stage in range(parallel.pipeline)
    ]


@settings(max_examples=400, deadline=None)
@given(layers=st.integers(1, 24), layout=LAYOUTS)
def test_layers_are_dealt_as_megatron_deals_them(layers: int, layout: dict[str, Any]) -> None:
    """The same numbers where both allow a layout; what we refuse, it refuses too or leaves a chunk without layers."""
    parallel = ParallelConfig(**layout)
    refused = layout_problems(replace(DENSE, layers=layers), parallel)
    try:
        with warnings.catch_warnings(action="ignore"):
            theirs = _ask_megatron(layers, parallel)
    except (ValueError, AssertionError):
        assert refused or parallel.pipeline == 1
        return
    if refused:
        assert parallel.pipeline == 1 or any(count < 1 for stage in theirs for count, _ in stage)
        return
    assert stage_layers(layers, parallel) == [[count for count, _ in stage] for stage in theirs]
    numbers = [[offset + i for count, offset in stage for i in range(count)] for stage in theirs]
    assert [layers_of(layers, parallel, stage) for stage in range(parallel.pipeline)] == numbers
    assert sorted(itertools.chain(*numbers)) == list(range(layers))  # every layer once
