"""What we need to know of a model, read from its HF config.json; and which layouts it allows.

Pure: no torch, no megatron. Unknown architectures and features are refused by name, before any process starts.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fapo.config.policy import ParallelConfig
from megatron_fapo.errors import UserError

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
ROPE_KINDS = ("default", "linear", "llama3", "yarn")

_NEEDED = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size",
    "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip
_NEEDED_BY_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
_LLAMA3_IN_MCORE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_ONLY_VLLM = ("attn_factor", "extrapolation_factor", "apply_yarn_scaling")
"""YaRN settings that vLLM reads and transformers does not: the model means something else in each."""


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies other than the plain ones. Positions are never rescaled by the length that is in use."""

    kind: str
    """linear, llama3 or yarn."""
    factor: float
    original_positions: int = 0
    """Positions before scaling; yarn only."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """Whether yarn rounds the bounds of its ramp to whole dimensions."""

    @property
    def model_arguments(self) -> dict[str, Any]:
        """What mcore's GPTModel takes for it."""
        match self.kind:
            case "linear":
                return {"position_embedding_type": "rope", "seq_len_interpolation_factor": self.factor}
            case "llama3":
                return {"position_embedding_type": "rope", "rope_scaling": True, "rope_scaling_factor": self.factor}
        return {"position_embedding_type": self.kind}

    @property
    def config_attributes(self) -> dict[str, Any]:
        """What mcore looks for on its TransformerConfig, mostly not a field of it: to be set before the model is built.

        Fused RoPE on packed sequences leaves out yarn's attention factor without a word (mcore 0.19).
        """
        if self.kind != "yarn":
            return {}
        return {
            "apply_rope_fusion": False,
            "yarn_rotary_scaling_factor": self.factor,
            "yarn_original_max_position_embeddings": self.original_positions,
            "yarn_beta_fast": self.beta_fast,
            "yarn_beta_slow": self.beta_slow,
            "yarn_mscale": 1.0,
            "yarn_mscale_all_dim": 0.0,
            "yarn_correction_range_round_to_int": self.truncate,
        }


@dataclass(frozen=True)
class Experts:
    """The mixture of experts that every layer of a Qwen3-MoE has in place of an MLP."""

    count: int
    per_token: int
    ffn: int
    """FFN size of one expert."""
    normalised: bool
    """Whether the weights of a token's experts are scaled to sum to 1 (norm_topk_prob)."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes and features of a decoder."""

    architecture: str
    layers: int
    hidden: int
    ffn: int
    """FFN size of a dense layer; no layer of a model with `experts` has it."""
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    norm_eps: float
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    dtype: str
    """Type of the checkpoint's weights."""
    experts: Experts | None = None

    def padded_vocab(self, tensor_parallel: int) -> int:
        """Vocabulary rows that mcore holds: a multiple of the tensor ranks. The extra rows never reach a softmax."""
        return -(-self.vocab // tensor_parallel) * tensor_parallel

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return self._parameters(self.experts.count if self.experts else 0)

    @property
    def active_parameters(self) -> int:
        """Weights that one token meets: of the experts, those that it is sent to."""
        return self._parameters(self.experts.per_token if self.experts else 0)

    def _parameters(self, experts: int) -> int:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = self.hidden * (2 * q + 2 * kv) + 2 * self.hidden
        layer += (q + 2 * kv) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        if self.experts:
            layer += self.hidden * (self.experts.count + 3 * experts * self.experts.ffn)
        else:
            layer += 3 * self.hidden * self.ffn
        return self.layers * layer + self.hidden * (1 + self.vocab * (1 if self.tied else 2))


def read_model_shape(model_path: str | Path, max_positions: int | None = None) -> ModelShape:
    """Read `<model_path>/config.json`; `max_positions` replaces its max_position_embeddings.

    Raises:
        UserError: the file is missing, or the architecture or a feature of it is not supported.
    """
    path = Path(model_path) / "config.json"
    if not path.is_file():
        raise UserError(f"{path} not found: policy.model_path must be an HF checkpoint directory")
    try:
        raw = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error}); download the checkpoint again") from error
    architecture = (raw.get("architectures") or ["?"])[0]
    if architecture not in ARCHITECTURES:
        raise UserError(f"{path}: architecture {architecture} is not supported; supported: {', '.join(ARCHITECTURES)}")
    sparse = architecture == "Qwen3MoeForCausalLM"
    if sparse and "num_local_experts" in raw:  # as transformers 5 writes it
        raw.setdefault("num_experts", raw["num_local_experts"])
    if missing := [key for key in (*_NEEDED, *(_NEEDED_BY_EXPERTS if sparse else ())) if not raw.get(key)]:
        raise UserError(f"{path}: {', '.join(missing)} missing; is it the config.json of a {architecture}?")
    # transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling.
    rope = dict(raw.get("rope_parameters") or {})
    scaling = dict(raw.get("rope_scaling") or {}) or rope
    kind = str(scaling.get("rope_type", scaling.get("type", "default")))
    is_qwen2 = architecture.startswith("Qwen2")
    if problems := _rope_problems(kind, scaling, max_positions or raw["max_position_embeddings"]) + _feature_problems(
        raw, bias=is_qwen2
    ):
        raise UserError(f"{path}: not supported: {'; '.join(problems)}")
    return ModelShape(
        architecture=architecture,
        layers=raw["num_hidden_layers"],
        hidden=raw["hidden_size"],
        ffn=raw["intermediate_size"],
        heads=raw["num_attention_heads"],
        kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        vocab=raw["vocab_size"],
        max_positions=max_positions or raw["max_position_embeddings"],
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
        rope_scaling=None if kind == "default" else _rope_scaling(kind, scaling),
        norm_eps=raw["rms_norm_eps"],
        tied=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=is_qwen2,
        qk_norm=architecture.startswith("Qwen3"),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        experts=_experts(raw) if sparse else None,
    )


def _experts(raw: dict[str, Any]) -> Experts:
    normalised = bool(raw.get("norm_topk_prob", False))
    return Experts(raw["num_experts"], raw["num_experts_per_tok"], raw["moe_intermediate_size"], normalised)


def _rope_scaling(kind: str, scaling: dict[str, Any]) -> RopeScaling:
    if kind != "yarn":
        return RopeScaling(kind, float(scaling["factor"]))
    return RopeScaling(
        kind,
        float(scaling["factor"]),
        original_positions=scaling["original_max_position_embeddings"],
        beta_fast=float(scaling.get("beta_fast") or 32),
        beta_slow=float(scaling.get("beta_slow") or 1),
        truncate=bool(scaling.get("truncate", True)),
    )


def _rope_problems(kind: str, settings: dict[str, Any], positions: int) -> list[str]:
    """What policy (mcore), engines (vLLM) and transformers would not all compute alike."""
    problems = []
    if kind not in ROPE_KINDS:
        problems.append(f"RoPE scaling {kind!r} (supported: {', '.join(ROPE_KINDS)})")
    elif kind != "default" and not settings.get("factor"):
        problems.append(f"RoPE scaling {kind} without factor")
    if kind == "llama3":
        problems += [
            f"RoPE scaling llama3 with {key} {settings.get(key)} (mcore fixes it at {value})"
            for key, value in _LLAMA3_IN_MCORE.items()
            if settings.get(key) != value
        ]
    if kind == "yarn":
        if not settings.get("original_max_position_embeddings"):
            problems.append("RoPE scaling yarn without original_max_position_embeddings")
        problems += [
            f"RoPE scaling yarn with {key} (transformers does not know it)" for key in _ONLY_VLLM if key in settings
        ]
        problems += _yarn_factor_problems(settings)
        reach = (settings.get("original_max_position_embeddings") or 0) * (settings.get("factor") or 0)
        if 0 < reach < positions:
            problems.append(
                f"RoPE scaling yarn to {reach:g} positions (vLLM has no more) with {positions} max_position_embeddings"
            )
    return problems


def _yarn_factor_problems(settings: dict[str, Any]) -> list[str]:
    """vLLM scales yarn's attention by 0.1 ln(factor) + 1 whatever transformers' keys for it say."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(max(float(settings.get("factor") or 1.0), 1.0)) + 1.0

    given, mscale, all_dim = (settings.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is None and mscale and all_dim:
        given = scale(mscale) / scale(all_dim)
    if given is None or math.isclose(given, scale(1.0), rel_tol=1e-6):
        return []
    return [
        f"RoPE scaling yarn with an attention factor of {given:g} (vLLM fixes it at {scale(1.0):g} for this factor)"
    ]


def _feature_problems(raw: dict[str, Any], *, bias: bool) -> list[str]:
    problems = []
    if (raw.get("rope_parameters") or raw).get("partial_rotary_factor", 1.0) != 1.0:
        problems.append("partial_rotary_factor")
    if raw.get("use_sliding_window"):
        problems.append("use_sliding_window")
    if raw.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {raw['hidden_act']!r} (supported: silu)")
    if raw.get("mlp_bias"):
        problems.append("mlp_bias")
    if raw.get("attention_bias") and not bias:
        problems.append("attention_bias (output projection bias)")
    if raw.get("mlp_only_layers") or raw.get("decoder_sparse_step", 1) != 1:
        problems.append("dense layers among sparse ones (mlp_only_layers, decoder_sparse_step)")
    if raw.get("norm_topk_prob") and raw.get("num_experts_per_tok") == 1:
        problems.append("norm_topk_prob with num_experts_per_tok 1 (the router would learn nothing)")
    return problems


def layout_problems(shape: ModelShape, parallel: ParallelConfig) -> list[str]:
    """Why this model cannot be laid out like that, each with a remedy; empty when it can.

    Every sequence is padded to whole slices of its context-parallel ranks, so nothing here asks about their number.
    """
    t = parallel.tensor
    over_tensor = {"attention heads": shape.heads, "KV heads": shape.kv_heads}
    if shape.experts is None:
        over_tensor["FFN columns"] = shape.ffn
    legal = [str(n) for n in range(1, shape.kv_heads + 1) if not any(size % n for size in over_tensor.values())]
    problems = [
        f"{size} {what} do not divide by policy.parallel.tensor={t}: it can be {', '.join(legal)}"
        for what, size in over_tensor.items()
        if size % t
    ]
    return problems + _split(shape.layers, parallel)[1] + _expert_problems(shape, parallel)


def _expert_problems(shape: ModelShape, parallel: ParallelConfig) -> list[str]:
    ep, etp = parallel.expert, parallel.expert_tensor
    if shape.experts is None:
        return [
            f"policy.parallel.{name}={value}: {shape.architecture} has no experts; set it to 1"
            for name, value in (("expert", ep), ("expert_tensor", etp))
            if value > 1
        ]
    problems = []
    if shape.experts.count % ep:
        problems.append(f"{shape.experts.count} experts do not divide by policy.parallel.expert={ep}: choose a divisor")
    if shape.experts.ffn % etp:
        size = shape.experts.ffn
        problems.append(f"an expert's FFN size {size} does not divide by policy.parallel.expert_tensor={etp}: lower it")
    if (ranks := parallel.tensor * parallel.context * parallel.data) % (ep * etp):
        problems.append(
            f"policy.parallel: expert x expert_tensor = {ep * etp} ranks are taken out of tensor x context x data ="
            f" {ranks}, which they do not divide: lower expert or raise data"
        )
    if parallel.tensor > 1 and not parallel.sequence_parallel:
        problems.append(
            f"policy.parallel.tensor={parallel.tensor} with experts: megatron trains them only with"
            " policy.parallel.sequence_parallel=true"
        )
    return problems


def stage_layers(layers: int, parallel: ParallelConfig) -> list[list[int]]:
    """How many transformer layers each model chunk of each pipeline stage has, dealt as megatron deals them.

    Raises:
        UserError: they cannot be dealt so; `layout_problems` says the same.
    """
    split, problems = _split(layers, parallel)
    if problems:
        raise UserError("; ".join(problems))
    return split


def _split(layers: int, parallel: ParallelConfig) -> tuple[list[list[int]], list[str]]:
    """(layers by stage and chunk, why there are none)."""
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline
    first, last = parallel.first_stage_layers, parallel.last_stage_layers
    if stages == 1:
        default = ParallelConfig()
        names = ("virtual_pipeline", "first_stage_layers", "last_stage_layers", "embedding_in_split", "loss_in_split")
        idle = [name for name in names if getattr(parallel, name) != getattr(default, name)]
        why = f"policy.parallel: {', '.join(idle)} without a pipeline; unset it or set pipeline > 1"
        return [[layers]], [why] if idle else []
    given = [n for n in (first, last) if n is not None]
    counted = parallel.embedding_in_split + parallel.loss_in_split
    if given and counted:
        return [], [
            "policy.parallel: first_stage_layers or last_stage_layers and embedding_in_split or loss_in_split are two"
            " ways to deal layers unevenly; unset one pair"
        ]
    rest, others = layers + counted - sum(given), stages - len(given)
    if rest % others if others else rest:
        asked = f" as asked ({rest} for {others} stages)" if given or counted else ""
        return [], [
            f"{layers} layers do not divide by policy.parallel.pipeline={stages}{asked}: choose another number of"
            " stages, or what the first or last holds (first_stage_layers, ...)"
        ]
    even = rest // others if others else 0
    totals = [even if first is None else first, *[even] * (stages - 2), even if last is None else last]
    if wrong := [str(total) for total in totals if total % chunks]:
        return [], [
            f"policy.parallel.virtual_pipeline={chunks} does not divide the layers of every stage"
            f" ({', '.join(wrong)}): choose a divisor"
        ]
    split = [[total // chunks] * chunks for total in totals]
    split[0][0] -= parallel.embedding_in_split
    split[-1][-1] -= parallel.loss_in_split
    if any(n < 1 for stage in split for n in stage):
        return [], [f"policy.parallel: some stage or chunk would have no layers ({split}): lower pipeline"]
    return split, []
