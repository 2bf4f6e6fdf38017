"""The memory of a vLLM worker's model during refits. Knows no plan and no transport.

Where kernels read a layer's parameters in the very form of the checkpoint, new weights are written in place: addresses
stay, so CUDA graphs and compiled code keep working, and nothing is left to do. Other layers (oneDNN's packed copies on
CPUs, permuted experts on some GPUs) are written into staging memory in checkpoint form; when all their elements are
there, vLLM's own post-load step runs on it, its results are copied into the tensors that kernels use, and the staging
memory is freed. Targets are planned in model order, so that few layers are staged at once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megatron_fapo.weight_sync.mapped import viewed
from megatron_fapo.weight_sync.protocol import RefitError
from megatron_fapo.weight_sync.regions import Index, Ints, View, volume
from megatron_fapo.weight_sync.trace import (
    Checkpoint,
    CheckpointForm,
    checkpoint_form,
    parameters_replaced,
    some,
    trace_target,
)


def is_plain(layer: nn.Module, form: Mapping[str, Tensor]) -> bool:
    """Whether kernels read this layer's parameters exactly as the checkpoint fills them, and from nowhere else.

    True only where vLLM 0.26's code leaves no doubt; all of these must hold:

    - No post-load step: no `quant_method` (norms), or one whose step does nothing here. On CUDA these are
      UnquantizedLinearMethod and UnquantizedEmbeddingMethod (they pack on CPUs only), and UnquantizedFusedMoEMethod
      with a Triton backend (FlashInfer's swap or tile w13 and w2; Triton's takes them as loaded). Exact classes:
      subclasses may do anything. No platform but CUDA and CPU.
    - No packed copy (`cpu_linear`).
    - Each live parameter has the shape, strides and dtype of the checkpoint form, and is row-major.

    Args:
        form: the layer's parameters in checkpoint form, on the meta device.
    """
    from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
    from vllm.platforms import current_platform

    method: Any = getattr(layer, "quant_method", None)
    if type(method) is UnquantizedFusedMoEMethod:
        nothing_to_do = current_platform.is_cuda() and method.unquantized_backend.name in ("TRITON", "BATCHED_TRITON")
    elif type(method) in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
        nothing_to_do = current_platform.is_cuda()
    else:
        nothing_to_do = method is None
    live = {name: parameter for name, parameter in layer._parameters.items() if parameter is not None}
    return (
        nothing_to_do
        and not hasattr(layer, "cpu_linear")
        and live.keys() == form.keys()
        and all(_same_layout(live[name], tensor) for name, tensor in form.items())
    )


def _same_layout(live: Tensor, form: Tensor) -> bool:
    return (live.shape, live.stride(), live.dtype) == (form.shape, form.stride(), form.dtype) and not live.is_meta


@dataclass(eq=False)
class _Unit:
    """Layers that are completed together: one, or several that share a parameter."""

    layers: list[nn.Module]
    tensors: list[str]
    plain: bool
    staged: dict[str, Tensor] = field(default_factory=dict)
    """In checkpoint form, from the first view of a refit until the post-load step."""
    done: bool = False
    """Whether this refit's post-load step has run."""


def _units(form: CheckpointForm) -> dict[str, _Unit]:
    """The unit of each tensor."""
    units: dict[str, _Unit] = {}
    for layer, names in form.layers.items():
        plain = is_plain(layer, {own: form.tensors[full] for own, full in names.items()})
        unit = _Unit([layer], list(names.values()), plain)
        for other in {id(found): found for name in unit.tensors if (found := units.get(name))}.values():
            tensors = list(dict.fromkeys([*other.tensors, *unit.tensors]))
            unit = _Unit([*other.layers, *unit.layers], tensors, other.plain and unit.plain)
        units |= dict.fromkeys(unit.tensors, unit)
    return units


class Landing:
    """Where a refit's elements are written, and what turns them into what kernels compute with."""

    def __init__(self, model: nn.Module, model_config: Any, checkpoint: Checkpoint):
        """
        Args:
            model: as vLLM built and loaded it.
            model_config: vLLM's; attention layers ask for its dtype.
            checkpoint: HF name -> (shape, dtype) of all tensors that refits may bring.
        """
        self._model = model
        self._model_config = model_config
        self._checkpoint = checkpoint
        self._index: Index | None = None
        self._form: CheckpointForm
        self._unit_of: dict[str, _Unit] = {}
        self._places: dict[str, tuple[nn.Module, str]] = {}
        self._wanted: dict[str, int] = {}
        self._missing: dict[str, int] | None = None
        """Elements that the refit under way has not brought yet; None: no refit is under way."""
        self._flat: dict[str, Tensor] = {}
        """The memory of tensors that this refit has asked for."""

    def index(self) -> Index:
        """What this worker wants. Traced at the first call.

        Raises:
            RefitError: the model's loader cannot be traced.
        """
        if self._index is None:
            _require_refittable(self._model)
            index = trace_target(self._model, self._checkpoint)
            self._form = checkpoint_form(self._model)
            self._unit_of = _units(self._form)
            for layer, names in self._form.layers.items():
                for own, full in names.items():
                    self._places.setdefault(full, (layer, own))
            self._wanted = dict.fromkeys(self._form.tensors, 0)
            for region in index.regions:
                self._wanted[region.view.tensor] += volume(region.shape)
            self._index = index
        return self._index

    def in_place(self) -> frozenset[str]:
        """The tensors that are written where kernels read them."""
        self.index()
        return frozenset(name for name, unit in self._unit_of.items() if unit.plain)

    def begin(self) -> None:
        """Make ready for every element once. What an unfinished refit staged is dropped."""
        self.index()
        self.abort()
        self._missing = dict(self._wanted)

    def view(self, tensor: str, offset: int, shape: Ints, stride: Ints) -> Tensor:
        """Memory to write a part of a tensor into, valid until `wrote` completes its layer.

        Raises:
            RefitError: no refit is under way, no such tensor, its layer is complete, or its layout has changed.
        """
        if tensor not in self._flat:
            self._flat[tensor] = self._memory(tensor)
        return viewed(self._flat[tensor], View(tensor, offset, stride), shape)

    def _memory(self, tensor: str) -> Tensor:
        if self._missing is None:
            raise RefitError(f"{tensor} cannot be written: no refit is under way")
        if (unit := self._unit_of.get(tensor)) is None:
            raise RefitError(f"this model has no tensor {tensor}: the plan is of another model")
        if unit.plain:
            layer, own = self._places[tensor]
            live = getattr(layer, own)
            if not _same_layout(live, self._form.tensors[tensor]):
                raise RefitError(f"{tensor} has another layout than when this engine started: start it anew")
            return _plain_tensor(live)
        if unit.done:
            raise RefitError(f"{tensor} is complete: nothing more can be written into it in this refit")
        if not unit.staged:
            unit.staged = self._stage(unit)
        return _plain_tensor(unit.staged[tensor])

    def _stage(self, unit: _Unit) -> dict[str, Tensor]:
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
        from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor

        with get_layerwise_info(unit.layers[0]).restore_device:
            return {name: materialize_meta_tensor(self._form.tensors[name]) for name in unit.tensors}

    def wrote(self, tensor: str, elements: int) -> float:
        """Count elements that were written through `view`. A staged layer that has them all goes through vLLM's
        post-load step, on the current stream: the writes must be ordered before.

        Returns:
            Seconds of post-load work on the host, mostly 0.

        Raises:
            RefitError: more elements than the tensor wants, or no refit is under way.
        """
        if self._missing is None or self._missing.get(tensor, 0) < elements:
            wanted = "no refit is under way" if self._missing is None else f"{self._missing.get(tensor, 0)} are missing"
            raise RefitError(f"{elements} elements were written into {tensor}, but {wanted}")
        self._missing[tensor] -= elements
        unit = self._unit_of[tensor]
        if unit.plain or any(self._missing[name] for name in unit.tensors):
            return 0.0
        return self._post_load(unit)

    @torch.no_grad()
    def _post_load(self, unit: _Unit) -> float:
        began = time.monotonic()
        unit.staged = unit.staged or self._stage(unit)
        self._fill(unit.tensors)
        for layer in unit.layers:
            live = {name: parameter for name, parameter in layer._parameters.items() if parameter is not None}
            staged = {own: unit.staged[full] for own, full in self._form.layers[layer].items()}
            with parameters_replaced({layer: staged}):
                if method := getattr(layer, "quant_method", None):
                    method.process_weights_after_loading(layer)
                # Into the tensors that kernels, CUDA graphs among them, know by address.
                for name, parameter in live.items():
                    parameter.data.copy_(getattr(layer, name))
        for name in unit.tensors:
            self._flat.pop(name, None)
        unit.staged, unit.done = {}, True
        return time.monotonic() - began

    def _fill(self, tensors: Sequence[str]) -> None:
        """Constants must be set again at every refit: sleep may have dropped what the memory held."""
        for fill in self.index().fills:
            if fill.view.tensor in tensors:
                self.view(fill.view.tensor, fill.view.offset, fill.shape, fill.view.stride).fill_(fill.value)

    def finish(self) -> float:
        """End the refit: constants of tensors that are written in place, then attention layers' own post-load step.

        Returns:
            Seconds on the host.

        Raises:
            RefitError: elements are missing; names the tensors. The refit stays under way.
        """
        from vllm.model_executor.layers.attention import Attention, MLAAttention

        if self._missing is None:
            raise RefitError("no refit is under way")
        if lacking := [f"{name} ({count} elements)" for name, count in self._missing.items() if count]:
            raise RefitError(f"{len(lacking)} tensors are not complete: {some(lacking)}")
        began = time.monotonic()
        for unit in dict.fromkeys(self._unit_of.values()):
            if not unit.plain and not unit.done:  # a rank whose part of the vocabulary is all padding
                self._post_load(unit)
        with torch.no_grad():
            self._fill([name for name, unit in self._unit_of.items() if unit.plain])
            for layer in self._model.modules():
                if isinstance(layer, Attention | MLAAttention):
                    layer.process_weights_after_loading(self._model_config.dtype)
        self.abort()
        return time.monotonic() - began

    def abort(self) -> None:
        """Give an unfinished refit up, and its staging memory back. Layers keep their kernel tensors, whose contents
        may be of two versions."""
        self._missing = None
        self._flat = {}
        for unit in self._unit_of.values():
            unit.staged, unit.done = {}, False

    def export(self, path: str) -> None:
        """Write what kernels compute with, as HF-named tensors in a safetensors file.

        Weights that were packed are read back by multiplying the identity, which is exact but for the sign of zeros.

        Raises:
            RefitError: a packed layout that cannot be read back, or this worker holds only a part of the model.
        """
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        held: dict[str, int] = {}
        for region in self.index().regions:
            view = region.view
            memory = viewed(self._readable(view.tensor), view, region.shape)
            whole = tensors.setdefault(region.name, torch.empty(self._checkpoint[region.name][0], dtype=memory.dtype))
            box = tuple(slice(first, first + n) for first, n in zip(region.start, region.shape, strict=True))
            whole[box] = memory.cpu()
            held[region.name] = held.get(region.name, 0) + memory.numel()
        if partial := [name for name, tensor in tensors.items() if held[name] != tensor.numel()]:
            raise RefitError(f"this worker holds only a part of {some(partial)}: export from one that holds all")
        save_file(tensors, path)

    def _readable(self, name: str) -> Tensor:
        """What kernels compute with, in checkpoint form."""
        from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod

        form, (place, own) = self._form.tensors[name], self._places[name]
        if type(getattr(place, "quant_method", None)) is UnquantizedFusedMoEMethod and not self._unit_of[name].plain:
            raise RefitError(f"{name} is packed for this machine's kernels and cannot be read back")
        found = getattr(place, own).detach()
        for layer in self._unit_of[name].layers:
            if not hasattr(layer, "cpu_linear") or self._form.layers[layer].get("weight") != name:
                continue
            packed = layer.cpu_linear(torch.eye(form.shape[1], dtype=form.dtype), layer.weight, None).t().contiguous()
            if found.numel() and not torch.equal(packed, found):
                raise RefitError(f"{name}: the packed copy differs from the plain one")
            found = packed
        return _plain_tensor(found)


def _plain_tensor(tensor: Tensor) -> Tensor:
    """Without vLLM's parameter classes, whose hooks every view would go through."""
    return tensor.detach().as_subclass(Tensor)


def _require_refittable(model: nn.Module) -> None:
    """
    Raises:
        RefitError: kernels compute with more than the parameters and what a layer's own post-load step makes of them.
    """
    from vllm.model_executor.layers.attention import Attention, MLAAttention
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.offloader import NoopOffloader, get_offloader

    known = Attention | MLAAttention | QuantizeMethodBase
    odd = {
        type(layer).__name__: path
        for path, layer in model.named_modules()
        if hasattr(layer, "process_weights_after_loading") and not isinstance(layer, known)
    }
    if odd:
        shown = some([f"{path} ({kind})" for kind, path in odd.items()])
        raise RefitError(f"layers with post-load steps of their own cannot be refitted: {shown}")
    if not isinstance(get_offloader(), NoopOffloader):
        # Its copies on the host would overwrite what a refit writes, at the next forward pass.
        raise RefitError(f"vLLM offloads weights ({type(get_offloader()).__name__}): drop its offload options")
