"""Do the two forms of a model say the same? Log-probabilities by megatron-core and by transformers, side by side.

Both compute in float32 on the CPU, whatever type the weights are kept in: what they differ by is then rounding, and a
tensor that went to the wrong place shows as a difference of whole nats. Each layer has weights only while it runs, so a
model that does not fit into memory can be compared too; embedding, final norm and output layer stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_fapo.policy.batch import Padding, TrainSample, build_micro_batch
from megatron_fapo.policy.describe import WHOLE, ParametersOnMeta, chunks_on_meta, contents_of, taking_the_part_of
from megatron_fapo.policy.hf_config import ModelShape, read_model_shape
from megatron_fapo.policy.hf_weights import HFCheckpoint
from megatron_fapo.policy.stored import StoredWeights

LIMIT = 1e-3
"""Largest difference of a log-probability, in nats, that passes."""
_TOKENS = 64


@dataclass(frozen=True)
class Agreement:
    """How far the log-probabilities of the same tokens are apart, in nats."""

    tokens: int
    largest: float
    mean: float


def compare(hf: Path, weights: Path) -> Agreement:
    """Log-probabilities of random tokens under the HF model `hf` and the megatron checkpoint `weights`."""
    shape = read_model_shape(hf)
    tokens = torch.randint(shape.vocab, (_TOKENS + 1,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), taking_the_part_of(0, WHOLE):
        apart = (_by_transformers(hf, shape, tokens) - _by_megatron(weights, shape, tokens)).abs()
    return Agreement(_TOKENS, float(apart.max()), float(apart.mean()))


def _assign(module: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    module.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=False, assign=True)


def _stream(layer: torch.nn.Module, fetch: Callable[[], Mapping[str, torch.Tensor]]) -> None:
    """Give a layer its weights when it runs, and take them back."""
    empty = dict(layer.named_parameters())
    layer.register_forward_pre_hook(lambda *_: _assign(layer, fetch()))
    layer.register_forward_hook(lambda *_: _assign(layer, empty))


def _by_megatron(weights: Path, shape: ModelShape, tokens: torch.Tensor) -> torch.Tensor:
    from megatron_fapo.policy.vocab_parallel import logprob_entropy

    (model,) = chunks_on_meta(shape, WHOLE, torch.float32)
    parameters = {id(parameter.entry.data): parameter for parameter in contents_of([model], shape).parameters}
    stored = StoredWeights(weights, [*parameters.values()])

    def reader(names: Mapping[str, torch.nn.Parameter]) -> Callable[[], Mapping[str, torch.Tensor]]:
        wanted = [parameters[id(parameter)] for parameter in names.values()]
        return lambda: dict(zip(names, stored.load(wanted), strict=True))

    for layer in model.decoder.layers:
        _stream(layer, reader(dict(layer.named_parameters())))
    outside = {name: p for name, p in model.named_parameters() if ".layers." not in name}
    _assign(model, reader(outside)())

    first, *rest = tokens.tolist()
    batch = build_micro_batch([TrainSample((first,), tuple(rest), 0.0)], Padding(), device="cpu")

    def head(hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, **_: Any) -> torch.Tensor:
        weight = output_layer.weight if output_weight is None else output_weight
        hidden, vocab = hidden_states[:, 0], shape.vocab
        return logprob_entropy(hidden, weight, batch.index_N, batch.target_N, temperature=1.0, vocab=vocab, rank=0)[0]

    packed = batch.packed_seq_params()
    result: torch.Tensor = model.eval()(batch.tokens_1t, None, None, packed_seq_params=packed, output_processor=head)
    return result


def _by_transformers(hf: Path, shape: ModelShape, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoConfig, AutoModelForCausalLM

    with ParametersOnMeta():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(hf), dtype=torch.float32)
    source = HFCheckpoint(hf)

    def reader(layer: torch.nn.Module, number: int) -> Callable[[], Mapping[str, torch.Tensor]]:
        names = {name: f"model.layers.{number}.{name}" for name, _ in layer.named_parameters()}
        return lambda: {key: _tensor(source, name, shape) for key, name in names.items()}

    for number, layer in enumerate(model.model.layers):
        _stream(layer, reader(layer, number))
    _assign(model, {name: source[name] for name, _ in model.named_parameters() if ".layers." not in name})
    model.tie_weights()
    logits = model.eval()(tokens[None, :-1], use_cache=False).logits[0]
    return logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]


def _tensor(source: HFCheckpoint, name: str, shape: ModelShape) -> torch.Tensor:
    """A parameter of transformers' model; files have one tensor per expert where it has one for all."""
    prefix, experts, kind = name.partition(".experts.")
    if not experts or shape.experts is None:
        return source[name]
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
    each = [[source[f"{prefix}.experts.{i}.{part}.weight"] for part in parts] for i in range(shape.experts.count)]
    return torch.stack([torch.cat(tensors) for tensors in each])
