"""What tracing accepts and refuses, on a model of one tensor; and what it finds in vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_fapo.weight_sync.protocol import RefitError
from megatron_fapo.weight_sync.regions import Fill, Index, Region, View
from megatron_fapo.weight_sync.trace import trace_target
from tests.weight_sync.vllm_ranks import FFN, HEADS, HIDDEN, VOCAB, Case, VllmRanks, build

Loader = Callable[[nn.Parameter, Tensor], None]


class OneTensor(nn.Module):
    """`layer.weight` of 6 x 4, loaded by `loader`; and a buffer."""

    def __init__(self, loader: Loader):
        super().__init__()
        self.layer = nn.Module()
        self.layer.weight = nn.Parameter(torch.empty(6, 4))
        self.layer.weight.weight_loader = loader  # type: ignore[attr-defined]
        self.layer.register_buffer("scale", torch.ones(6, 4))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for _, tensor in weights:
            self.layer.weight.weight_loader(self.layer.weight, tensor)  # type: ignore[attr-defined, operator]


def trace(loader: Loader, shape: tuple[int, ...] = (6, 4), change: Callable[[OneTensor], Any] = id) -> Index | str:
    """The index, or why there is none; in either case the model must have what it had."""
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    model = OneTensor(loader)
    record_metadata_for_reloading(model)
    change(model)
    before = dict(model.layer._parameters)
    try:
        return trace_target(model, {"hf": (shape, "float32")})
    except RefitError as error:
        return str(error)
    finally:
        after = model.layer._parameters
        assert list(after.items()) == list(before.items())
        assert torch.equal(model.layer.scale, torch.ones(6, 4))  # type: ignore[arg-type]


def plain(p: nn.Parameter, w: Tensor) -> None:
    p.data.copy_(w)


def in_halves(p: nn.Parameter, w: Tensor) -> None:
    for target, source in zip(p.data.chunk(2), w.split(3), strict=True):
        target[:, :].copy_(source)


def transposed(p: nn.Parameter, w: Tensor) -> None:
    p.data.copy_(w.t())


def one_of_two(p: nn.Parameter, w: Tensor) -> None:
    p.data.copy_(w.transpose(1, 2).unbind()[1])


def padded(p: nn.Parameter, w: Tensor) -> None:
    p[:5].data.copy_(w)
    p[5:].data.fill_(7)


def whole(start: tuple[int, ...], shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> Region:
    return Region("hf", start, shape, View("layer.weight", offset, stride))


@pytest.mark.parametrize(
    ("loader", "shape", "regions"),
    [
        (plain, (6, 4), [whole((0, 0), (6, 4), (4, 1))]),
        (in_halves, (6, 4), [whole((0, 0), (3, 4), (4, 1)), whole((3, 0), (3, 4), (4, 1), 12)]),
        (transposed, (4, 6), [whole((0, 0), (4, 6), (1, 4))]),
        (one_of_two, (2, 4, 6), [whole((1, 0, 0), (1, 4, 6), (1, 1, 4))]),
        (padded, (5, 4), [whole((0, 0), (5, 4), (4, 1))]),
    ],
)
def test_views_copies_and_constants_are_traced(
    loader: Loader, shape: tuple[int, ...], regions: list[Region], vllm_ranks: VllmRanks
) -> None:
    found = vllm_ranks.run(trace, loader, shape)[0]
    assert isinstance(found, Index), found
    assert list(found.regions) == regions
    assert found.fills == ((Fill((1, 4), View("layer.weight", 20, (4, 1)), 7.0),) if loader is padded else ())


def scaled(p: nn.Parameter, w: Tensor) -> None:
    p.data.copy_(w * 2)


def scaled_in_place(p: nn.Parameter, w: Tensor) -> None:
    p.data.copy_(w.mul_(2))


def scaled_afterwards(p: nn.Parameter, w: Tensor) -> None:
    p.data.copy_(w)
    p.data.mul_(2)


def cast(p: nn.Parameter, w: Tensor) -> None:
    p.data.copy_(w.to(torch.bfloat16))


def through_a_temporary(p: nn.Parameter, w: Tensor) -> None:
    p.data.copy_(torch.empty_like(w).copy_(w))


def value_read(p: nn.Parameter, w: Tensor) -> None:
    if w[0, 0].item() != 0:
        p.data.copy_(w)


def one_row_for_all(p: nn.Parameter, w: Tensor) -> None:
    p.data.copy_(w[:1])


def reshaped(p: nn.Parameter, w: Tensor) -> None:
    p.data.view(-1).copy_(w.view(-1))


def skipped(p: nn.Parameter, w: Tensor) -> None:
    pass


def swapped(p: nn.Parameter, w: Tensor) -> None:
    p.data = w


def without_the_last_row(p: nn.Parameter, w: Tensor) -> None:
    p.data[:5].copy_(w[:5])


def twice(p: nn.Parameter, w: Tensor) -> None:
    p.data[:4].copy_(w[:4])
    p.data[2:].copy_(w[2:])


REFUSED: list[tuple[Loader, str]] = [
    (scaled, "the loader of layer.weight cannot be traced: aten.mul.Tensor on hf"),
    (scaled_in_place, "the loader of layer.weight cannot be traced: aten.mul_.Tensor on hf"),
    (scaled_afterwards, "the loader of layer.weight cannot be traced: aten.mul_.Tensor on itself"),
    (cast, "the loader of layer.weight cannot be traced: aten._to_copy.default on hf"),
    (through_a_temporary, "the loader of layer.weight cannot be traced: aten.copy_.default on hf"),
    (value_read, "load_weights cannot be traced; it failed near hf"),
    (one_row_for_all, "the loader of layer.weight cannot be traced: it copies (4,) of hf (6, 4) into (6, 4)"),
    (reshaped, "the loader of layer.weight cannot be traced: it copies (24,) of hf (6, 4) into (24,)"),
    (skipped, "layer.weight: 24 of 24 elements are never loaded"),
    (swapped, "layer.weight: 24 of 24 elements are never loaded"),
    (without_the_last_row, "layer.weight: 4 of 24 elements are never loaded"),
    (twice, "layer.weight: elements are written twice"),
]


@pytest.mark.parametrize(("loader", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_what_no_copy_can_replay_is_refused_by_name(loader: Loader, message: str, vllm_ranks: VllmRanks) -> None:
    assert message in str(vllm_ranks.run(trace, loader)[0])


class SomeQuantMethod:
    pass


def quantise(model: OneTensor) -> None:
    model.layer.quant_method = SomeQuantMethod()


def adapt(model: OneTensor) -> None:
    model.layer.lora_a = nn.Parameter(torch.zeros(2))


def write_buffer(model: OneTensor) -> None:
    model.load_weights = lambda weights: [model.layer.scale.copy_(w) for _, w in weights]  # type: ignore


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (quantise, "layers use SomeQuantMethod: such weights cannot be refitted"),
        (adapt, "layer: vLLM recorded no checkpoint form of lora_a"),
        (write_buffer, "load_weights cannot be traced; it failed near hf"),
    ],
)
def test_models_that_are_more_than_their_checkpoint_are_refused(
    change: Callable[[OneTensor], Any], message: str, vllm_ranks: VllmRanks
) -> None:
    assert message in str(vllm_ranks.run(trace, plain, (6, 4), change)[0])


def trace_model(case: Case, path: str, workers: int) -> Index:
    return trace_target(build(path, workers)[0], case.checkpoint())


def test_what_two_workers_want_of_qwen2(vllm_ranks: VllmRanks, tmp_path: Path) -> None:
    """Fused and sharded projections, one KV head for both, a vocabulary that is padded on the last worker."""
    case = Case("qwen2", tied=True, kv_heads=1)
    for rank, index in enumerate(vllm_ranks.run(trace_model, case, case.write(tmp_path / "model", 0), 2)):
        assert "lm_head.weight" not in index.tensors
        wanted = {region.name: region for region in index.regions}
        qkv, q = "model.layers.1.self_attn.qkv_proj", HEADS // 2 * case.head_dim
        stride = (HIDDEN, 1)
        assert [region for region in index.regions if qkv in region.view.tensor] == [
            Region(f"{qkv.replace('qkv', part)}.{kind}", start, shape, View(f"{qkv}.{kind}", *view))
            for kind, parts in {
                "weight": [
                    ("q", (rank * q, 0), (q, HIDDEN), (0, stride)),
                    ("k", (0, 0), (case.head_dim, HIDDEN), (q * HIDDEN, stride)),
                    ("v", (0, 0), (case.head_dim, HIDDEN), ((q + case.head_dim) * HIDDEN, stride)),
                ],
                "bias": [
                    ("q", (rank * q,), (q,), (0, (1,))),
                    ("k", (0,), (case.head_dim,), (q, (1,))),
                    ("v", (0,), (case.head_dim,), (q + case.head_dim, (1,))),
                ],
            }.items()
            for part, start, shape, view in parts
        ]
        up = wanted["model.layers.0.mlp.up_proj.weight"]
        assert (up.start, up.shape) == ((rank * FFN // 2, 0), (FFN // 2, HIDDEN))
        assert up.view == View("model.layers.0.mlp.gate_up_proj.weight", FFN // 2 * HIDDEN, stride)
        down = wanted["model.layers.0.mlp.down_proj.weight"]
        assert (down.start, down.shape) == ((0, rank * FFN // 2), (HIDDEN, FFN // 2))
        rows = 576 // 2  # 515 padded to a multiple of 64
        embedding, held = wanted["model.embed_tokens.weight"], (rows, VOCAB - rows)[rank]
        assert (embedding.start, embedding.shape) == ((rank * rows, 0), (held, HIDDEN))
        padding = Fill((rows - held, HIDDEN), View("model.embed_tokens.weight", held * HIDDEN, stride), 0.0)
        assert index.fills == ((padding,) if rank else ())
        layers = [region.view.tensor.split(".")[2] for region in index.regions if ".layers." in region.view.tensor]
        assert layers == sorted(layers), "layers must complete one after another"
        assert Index.from_json(index.to_json()) == index
