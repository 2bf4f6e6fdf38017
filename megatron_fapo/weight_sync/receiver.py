"""What an engine asks of vLLM's workers in a refit: methods called by name in every worker process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from megatron_fapo.weight_sync.landing import Landing
from megatron_fapo.weight_sync.mapped import gpu_uuid
from megatron_fapo.weight_sync.share import Share
from megatron_fapo.weight_sync.target import WeightTarget


class RefitReceiver:
    """Mixed into vLLM's worker (`worker_extension_cls`). Arguments and results are builtin types, which vLLM's RPC
    carries without pickle. All workers of an engine get the same arguments: each finds its own by its rank."""

    device: torch.device
    rank: int
    model_runner: Any
    model_config: Any

    def refit_device(self) -> str:
        """UUID of the worker's GPU; empty on CPUs."""
        return gpu_uuid(self.device)

    def refit_index(self, checkpoint: dict[str, Sequence[int]]) -> str:
        """What this worker wants of a checkpoint with tensors of these shapes: an `Index` as JSON.

        Raises:
            RefitError: vLLM's loader of this model cannot be traced; names the parameter.
        """
        dtype = str(self.model_config.dtype).removeprefix("torch.")
        tensors = {name: (tuple(shape), dtype) for name, shape in checkpoint.items()}
        self._landing = Landing(self.model_runner.get_model(), self.model_config, tensors)
        return self._landing.index().to_json()

    @cached_property
    def _target(self) -> WeightTarget:
        return WeightTarget(self._landing, self.device)

    def refit_take(self, shares: Sequence[str]) -> None:
        """See WeightTarget.take; one share (as JSON) of each worker."""
        self._target.take(Share.from_json(shares[self.rank]))

    def refit_join(self, store: Sequence[Any], members: Sequence[int], address: str, timeout_s: float) -> None:
        self._target.join((store[0], store[1]), members, address, timeout_s)

    def refit_begin(self, version: int, share: float) -> None:
        self._target.begin(version, share)

    def refit_pull(self, exposures: Sequence[tuple[int, dict[str, Any]]]) -> None:
        self._target.pull(exposures)

    def refit_exchange(self, exposures: Sequence[tuple[int, dict[str, Any]]]) -> None:
        self._target.exchange(exposures)

    def refit_finish(self) -> tuple[float, list[tuple[int, int, int, int]]]:
        """Seconds of vLLM's post-load steps, and checksums."""
        sums = self._target.finish()
        return self._target.load_s, sums

    def refit_abort(self) -> None:
        self._target.abort()

    def export_weights(self, path: str) -> None:
        """See Landing.export."""
        self._landing.export(path)
