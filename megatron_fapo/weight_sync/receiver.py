"""What an engine asks of vLLM's workers in a refit: methods called by name in every worker process."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch

from megatron_fapo.weight_sync.landing import Landing
from megatron_fapo.weight_sync.mapped import gpu_uuid
from megatron_fapo.weight_sync.protocol import RefitError
from megatron_fapo.weight_sync.share import Share
from megatron_fapo.weight_sync.target import WeightTarget

log = logging.getLogger(__name__)


def _told[**P, R](method: Callable[P, R]) -> Callable[P, tuple[str, R | None]]:
    """(what went wrong, result) in place of an exception: at the first worker that raises, vLLM leaves the answers of
    the others in their queues, and takes them for answers to whatever it asks next."""

    @functools.wraps(method)
    def answering(*args: P.args, **options: P.kwargs) -> tuple[str, R | None]:
        try:
            return "", method(*args, **options)
        except Exception as error:
            log.exception("%s failed", method.__name__)
            return f"{'' if isinstance(error, RefitError) else f'{type(error).__name__}: '}{error}", None

    return answering


class RefitReceiver:
    """Mixed into vLLM's worker (`worker_extension_cls`). Arguments and results are builtin types, which vLLM's RPC
    carries without pickle. All workers of an engine get the same arguments: each finds its own by its rank. What fails
    is told (_told), and raised by the engine."""

    device: torch.device
    rank: int
    model_runner: Any
    model_config: Any

    def refit_device(self) -> str:
        """UUID of the worker's GPU; empty on CPUs."""
        return gpu_uuid(self.device)

    @_told
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

    @_told
    def refit_take(self, shares: Sequence[str]) -> None:
        """See WeightTarget.take; one share (as JSON) of each worker."""
        self._target.take(Share.from_json(shares[self.rank]))

    @_told
    def refit_join(self, store: Sequence[Any], members: Sequence[int], address: str, timeout_s: float) -> None:
        """See exchange.Member.join."""
        self._target.join((store[0], store[1]), members, address, timeout_s)

    @_told
    def refit_begin(self, version: int, share: float) -> None:
        """See WeightTarget.begin."""
        self._target.begin(version, share)

    @_told
    def refit_pull(self, exposures: Sequence[tuple[int, dict[str, Any]]]) -> None:
        """See WeightTarget.pull."""
        self._target.pull(exposures)

    @_told
    def refit_exchange(self, exposures: Sequence[tuple[int, dict[str, Any]]]) -> None:
        """See WeightTarget.exchange."""
        self._target.exchange(exposures)

    @_told
    def refit_finish(self) -> tuple[float, list[tuple[int, int, int, int]]]:
        """Seconds of vLLM's post-load steps, and checksums."""
        sums = self._target.finish()
        return self._target.load_s, sums

    @_told
    def refit_abort(self) -> None:
        """See WeightTarget.abort."""
        self._target.abort()

    def export_weights(self, path: str) -> None:
        """See Landing.export."""
        self._landing.export(path)
