"""What a vLLM worker wants of a checkpoint, found by running the model's own `load_weights` on tensors without data.

The model's parameters are put into their checkpoint form on the meta device, the checkpoint's tensors are meta tensors
too, and a dispatch mode sees every operation on either. Meta tensors keep storage, offset, shape and strides through
any chain of views, so that a `copy_` of a view into a view says which box of which HF tensor goes where. Fused and
sharded projections, replicated KV heads, experts and padding need no rules of ours. Whatever is not a view, a plain
copy or a fill with a constant would have to be computed anew at every refit, and is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_fapo.weight_sync.protocol import RefitError
from megatron_fapo.weight_sync.regions import (
    Fill,
    Index,
    Ints,
    LocalTensor,
    Region,
    View,
    contiguous_stride,
    volume,
)

Checkpoint = Mapping[str, tuple[Ints, str]]
"""HF name -> shape, and dtype as torch names it, without `torch.`."""


@dataclass(frozen=True)
class CheckpointForm:
    """A model's parameters as its checkpoint fills them, before anything is packed or permuted for kernels."""

    tensors: dict[str, Tensor]
    """On the meta device, in model order; shared (tied) ones once, under their first name."""
    layers: dict[nn.Module, dict[str, str]]
    """The tensors of each layer that has any: its own name for it -> name of the tensor."""


def checkpoint_form(model: nn.Module) -> CheckpointForm:
    """The form that vLLM recorded when it built the model.

    Raises:
        RefitError: quantised layers, or parameters that were added after the model was built (names them).
    """
    from vllm.model_executor.model_loader.reload.layerwise import _get_original_loader, get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import to_meta_tensor
    from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

    _refuse_quantised(model)
    tensors: dict[str, Tensor] = {}
    layers: dict[nn.Module, dict[str, str]] = {}
    first_name: dict[int, str] = {}
    for path, layer in model.named_modules():
        live = {name: parameter for name, parameter in layer._parameters.items() if parameter is not None}
        recorded = get_layerwise_info(layer).restore_metadata[0]
        if unknown := sorted(live.keys() - recorded.keys()):
            raise RefitError(
                f"{path}: vLLM recorded no checkpoint form of {', '.join(unknown)}; adapters and other changes to a "
                "model that is built already cannot be refitted"
            )
        for name, meta in recorded.items():
            own_name = f"{path}.{name}" if path else name
            full = first_name.setdefault(id(live[name]), own_name) if name in live else own_name
            layers.setdefault(layer, {})[name] = full
            if full not in tensors:
                # A copy of the record's attributes: a reload of vLLM's leaves its own loaders on the record.
                tensor = restore_layer_refs(to_meta_tensor(meta), layer)
                if hasattr(tensor, "weight_loader"):
                    tensor.weight_loader = _get_original_loader(tensor)
                tensors[full] = tensor
    if odd := [name for name, tensor in tensors.items() if not tensor.is_contiguous()]:
        raise RefitError(f"parameters of the checkpoint form are not row-major: {some(odd)}")
    return CheckpointForm(tensors, layers)


def _refuse_quantised(model: nn.Module) -> None:
    from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    known = (type(None), UnquantizedLinearMethod, UnquantizedEmbeddingMethod, UnquantizedFusedMoEMethod)
    methods = {type(getattr(layer, "quant_method", None)) for layer in model.modules()}
    if odd := sorted(method.__name__ for method in methods.difference(known)):
        raise RefitError(
            f"layers use {', '.join(odd)}: such weights cannot be refitted; serve the policy without quantisation"
        )


@contextmanager
def parameters_replaced(layers: Mapping[nn.Module, Mapping[str, Tensor]]) -> Iterator[None]:
    """Give layers other parameters; at the end every layer has exactly those that it had, the same objects."""
    saved = {layer: dict(layer._parameters) for layer in layers}
    try:
        for layer, replacements in layers.items():
            layer._parameters.update(replacements)
        yield
    finally:
        for layer, parameters in saved.items():
            layer._parameters.clear()
            layer._parameters.update(parameters)


def trace_target(model: nn.Module, checkpoint: Checkpoint) -> Index:
    """Which box of which HF tensor every part of every parameter wants.

    Dtypes are the parameters': a copy that would cast is left to the plan to judge, which knows what sources hold.

    Args:
        model: as vLLM built it. Its parameters are back in place when this returns or raises.

    Raises:
        RefitError: an operation that no copy can replay, or parameters that are not loaded wholly and once; names the
            parameters and HF tensors.
    """
    form = checkpoint_form(model)
    with torch.device("meta"):
        sources = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (shape, dtype) in checkpoint.items()}
    recorder = _Recorder(form.tensors, sources)
    replaced = {layer: {own: form.tensors[full] for own, full in names.items()} for layer, names in form.layers.items()}
    at = "the start"

    def weights() -> Iterator[tuple[str, Tensor]]:
        nonlocal at
        for name, tensor in sources.items():
            at = name
            yield name, tensor

    with parameters_replaced(replaced), torch.no_grad():
        try:
            with recorder:
                model.load_weights(weights())
        except RefitError:
            raise
        except Exception as error:
            raise RefitError(f"vLLM's load_weights cannot be traced; it failed near {at}: {error}") from error
    order = {name: position for position, name in enumerate(form.tensors)}
    index = Index(
        {name: LocalTensor(tuple(tensor.shape), _dtype(tensor)) for name, tensor in form.tensors.items()},
        tuple(sorted(recorder.regions, key=lambda region: (order[region.view.tensor], region.view.offset))),
        tuple(sorted(recorder.fills, key=lambda fill: (order[fill.view.tensor], fill.view.offset))),
    )
    _require_covered(index)
    return index


class _Recorder(TorchDispatchMode):
    """Sees every operation on parameters and HF tensors while `load_weights` runs; executes none that writes."""

    def __init__(self, parameters: Mapping[str, Tensor], sources: Mapping[str, Tensor]):
        super().__init__()
        # Storages are told apart by identity, so whoever records must keep all tensors alive: the caller does.
        self._parameters = {_storage(tensor): (name, tensor) for name, tensor in parameters.items()}
        self._sources = {_storage(tensor): (name, tensor) for name, tensor in sources.items()}
        self._computed: dict[int, tuple[str, Tensor]] = {}
        """What was made of HF tensors other than by views: the operation, and the tensor to keep it alive."""
        self.regions: list[Region] = []
        self.fills: list[Fill] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        touched = {_storage(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        written = [self._parameters[key][0] for key in touched if key in self._parameters]
        computed = [self._computed[key][0] for key in touched if key in self._computed]
        read = [self._sources[key][0] for key in touched if key in self._sources]
        if func.is_view or not (written or computed or read):
            return func(*args, **kwargs)
        if not written:  # refused when it comes to a parameter, which is then known
            result = func(*args, **kwargs)
            did = f"{func} on {some(read)}" if read else computed[0]
            self._computed |= {_storage(leaf): (did, leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
            return result
        if func is torch.ops.aten.copy_.default and len(written) == len(read) == 1 and not computed:
            self._copy(args[0], args[1])
        elif func in (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default):
            self._fill(args[0], float(args[1]) if len(args) > 1 else 0.0)
        else:
            did = computed[0] if computed else f"{func} on {some(read) or 'itself'}"
            raise RefitError(
                f"the loader of {written[0]} cannot be traced: {did}; only views, copies and constants can be replayed "
                "at a refit"
            )
        return args[0]

    def _copy(self, target: Tensor, source: Tensor) -> None:
        name, _ = self._parameters[_storage(target)]
        hf_name, whole_source = self._sources[_storage(source)]
        if not target.numel():
            return  # a rank whose part of the vocabulary is all padding
        if target.shape != source.shape:
            target, source = target.squeeze(), source.squeeze()
        found = _box(source.storage_offset(), tuple(source.shape), source.stride(), tuple(whole_source.shape))
        if target.shape != source.shape or found is None:
            raise RefitError(
                f"the loader of {name} cannot be traced: it copies {tuple(source.shape)} of {hf_name} "
                f"{tuple(whole_source.shape)} into {tuple(target.shape)}, broadcast or reshaped: not a box"
            )
        start, dims = found
        shape = tuple(1 if dim is None else source.shape[dim] for dim in dims)
        stride = tuple(1 if dim is None else target.stride(dim) for dim in dims)
        self.regions.append(Region(hf_name, start, shape, View(name, target.storage_offset(), stride)))

    def _fill(self, target: Tensor, value: float) -> None:
        if target.numel():
            name = self._parameters[_storage(target)][0]
            view = View(name, target.storage_offset(), tuple(target.stride()))
            self.fills.append(Fill(tuple(target.shape), view, value))


def _box(offset: int, size: Ints, stride: Sequence[int], whole: Ints) -> tuple[Ints, tuple[int | None, ...]] | None:
    """The box that a strided view of a row-major tensor is: its first corner and, for each dimension of the tensor,
    the dimension of the view that runs along it (None: the box is one thick). None if the view is no box.

    Dimensions may be permuted (a transposed weight is still a box); dimensions that were merged or split are refused.
    """
    steps = contiguous_stride(whole)
    if tuple(stride) == steps:
        dims: tuple[int | None, ...] = tuple(range(len(whole)))
    else:
        left = {stride[dim]: dim for dim in range(len(size)) if size[dim] > 1}
        dims = tuple(left.pop(step, None) if count > 1 else None for step, count in zip(steps, whole, strict=True))
        if left or sum(n > 1 for n in size) != sum(dim is not None for dim in dims):
            return None
    start = tuple(offset // step % count for step, count in zip(steps, whole, strict=True))
    sizes = (1 if dim is None else size[dim] for dim in dims)
    if any(first + n > count for first, n, count in zip(start, sizes, whole, strict=True)):
        return None
    return start, dims


def _require_covered(index: Index) -> None:
    """
    Raises:
        RefitError: parts of tensors that are never loaded, or loaded twice; names the tensors.
    """
    parts: dict[str, list[tuple[Ints, View]]] = {name: [] for name in index.tensors}
    for region in index.regions:
        parts[region.view.tensor].append((region.shape, region.view))
    for fill in index.fills:
        parts[fill.view.tensor].append((fill.shape, fill.view))
    faults = []
    for name, local in index.tensors.items():
        total = volume(local.shape)
        loaded = sum(volume(shape) for shape, _ in parts[name])
        if (twice := _overlap(parts[name], local.shape)) is not None:
            faults.append(f"{name}: {twice}")
        elif loaded != total:
            faults.append(f"{name}: {total - loaded} of {total} elements are never loaded")
    if faults:
        raise RefitError(f"the checkpoint does not fill the model: {some(faults, '; ')}")


def _overlap(parts: Sequence[tuple[Ints, View]], whole: Ints) -> str | None:
    """What is wrong with parts of a tensor that should be disjoint boxes."""
    boxes = []
    for shape, view in parts:
        if (found := _box(view.offset, shape, view.stride, whole)) is None:
            return "a part is written that is no box"
        start, dims = found
        stop = tuple(first + (1 if dim is None else shape[dim]) for first, dim in zip(start, dims, strict=True))
        last = view.offset + sum((n - 1) * step for n, step in zip(shape, view.stride, strict=True))
        boxes.append((view.offset, last, start, stop))
    boxes.sort()
    for position, (_, last, start, stop) in enumerate(boxes):
        # Only boxes that begin before this one's last element can meet it; mostly there is none.
        for first, _, other_start, other_stop in boxes[position + 1 :]:
            if first > last:
                break
            if all(max(a, c) < min(b, d) for a, b, c, d in zip(start, stop, other_start, other_stop, strict=True)):
                return "elements are written twice"
    return None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def some(names: Sequence[str], separator: str = ", ") -> str:
    """The first few names for an error, and how many more there are."""
    return separator.join(names[:5]) + (f"{separator}and {len(names) - 5} more" if len(names) > 5 else "")
