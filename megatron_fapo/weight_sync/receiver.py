"""The engine's side of a refit, inside vLLM's worker process. All use of vLLM's weight reloading is in this file.

vLLM turns a checkpoint's tensors into what its kernels want (fused, sharded, on CPUs packed for oneDNN). Its layerwise
reload does that again for new weights: layers go back to their checkpoint form, `load_weights` fills them, and the
results are copied into the tensors that the kernels already use. vLLM 0.26 also has weight-transfer engines around the
same reload; they report neither names nor failures to the caller, which is why the reload is driven directly.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_fapo.weight_sync.buckets import checksum, gpu_uuid, map_bucket, view
from megatron_fapo.weight_sync.protocol import Bucket, RefitError


class RefitReceiver:
    """Mixed into vLLM's worker (`worker_extension_cls`); its methods are called by name through `collective_rpc`."""

    device: torch.device
    model_runner: Any
    model_config: Any

    def refit_device(self) -> str:
        """UUID of the worker's GPU; empty on CPUs."""
        return gpu_uuid(self.device)

    def refit_begin(self) -> None:
        """Put the model into its checkpoint form, ready for every tensor once."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self.refit_abort()
        initialize_layerwise_reload(self.model_runner.get_model())

    def refit_load(self, wire: dict[str, Any]) -> None:
        """Load the tensors of one bucket; when this returns, the bucket may be overwritten.

        Raises:
            RefitError: the bucket cannot be mapped, or its bytes are not those that were sent.
        """
        bucket = Bucket.from_wire(wire)
        data = map_bucket(bucket, self.device)
        for entry in bucket.entries:
            if entry.offset + entry.nbytes > bucket.nbytes:
                raise RefitError(f"{entry.name} lies outside its bucket: the manifest is damaged")
            received = data[entry.offset : entry.offset + entry.nbytes]
            if entry.checksum is not None and checksum(received) != entry.checksum:
                raise RefitError(f"{entry.name} arrived with other bytes than were sent")
        # Copies: vLLM keeps tensors until their layer is complete, which may be buckets later.
        tensors = ((entry.name, view(data, entry).to(self.device, copy=True)) for entry in bucket.entries)
        self.model_runner.get_model().load_weights(tensors)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def refit_finish(self) -> None:
        """Run vLLM's post-load steps for whatever waits for them."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model_runner.get_model(), self.model_config)

    def refit_abort(self) -> None:
        """Drop an unfinished reload: every layer gets its kernel tensors back, loaded or not."""
        from vllm.model_executor.model_loader.reload import layerwise

        for layer in self.model_runner.get_model().modules():
            info = layerwise.get_layerwise_info(layer)
            if info.can_load():
                layerwise._place_kernel_tensors(layer, info)
                info.reset()
        layerwise.LOADING_LAYERS.clear()

    def export_weights(self, path: str) -> None:
        """Write what the kernels compute with, as HF-named tensors in a safetensors file (one worker only).

        Weights that were packed are read back by multiplying the identity, which is exact but for the sign of zeros.
        """
        from safetensors.torch import save_file

        model = self.model_runner.get_model()
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in model.named_parameters():
            owner = model.get_submodule(name.rpartition(".")[0])
            tensor = parameter.data
            if hasattr(owner, "cpu_linear"):
                packed = _unpack(owner, self.model_config.dtype)
                if tensor.numel() and not torch.equal(packed, tensor):
                    raise RefitError(f"{name}: the packed copy differs from the plain one")
                tensor = packed
            for hf_name, part in _split_fused(name, tensor, owner, model.packed_modules_mapping):
                tensors[hf_name] = part.detach().cpu().contiguous().clone()
        save_file(tensors, path)


def _unpack(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    width = layer.input_size_per_partition if hasattr(layer, "input_size_per_partition") else layer.embedding_dim
    return layer.cpu_linear(torch.eye(width, dtype=dtype), layer.weight, None).t()


def _split_fused(
    name: str, tensor: torch.Tensor, layer: Any, packed: dict[str, list[str]]
) -> list[tuple[str, torch.Tensor]]:
    """[q; k; v] and [gate; up] back into the tensors of the checkpoint; padding of the vocabulary removed."""
    path, _, leaf = name.rpartition(".")
    prefix, _, module = path.rpartition(".")
    if module in packed:
        parts = tensor.split(layer.output_partition_sizes)
        return [(f"{prefix}.{part}.{leaf}", rows) for part, rows in zip(packed[module], parts, strict=True)]
    if hasattr(layer, "org_vocab_size"):
        tensor = tensor[: layer.org_vocab_size]
    return [(name, tensor)]
