"""What of a policy rank is in device memory in which phase, moved to host memory and back, and the ledger of it.

Storages are emptied and refilled in place: parameters, the views of megatron's buffers and the optimizer's references
keep their identity, so nobody has to be told. (megatron's own offload replaces the optimizer's tensors, through
pageable memory, and needs CUDA.) The plan is a table; `PolicyMemory` carries it out.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

log = logging.getLogger(__name__)

PARTS = PARAMETERS, GRADIENTS, OPTIMIZER = ("parameters", "gradients", "optimizer")
"""In this order a storage belongs to the first that has it: a float32 model's parameters are the optimizer's too."""

PLAN: Mapping[str, tuple[str, ...]] = {
    "rollout": (),
    "judge": (),
    "refit": (PARAMETERS,),
    "logprobs": (PARAMETERS,),
    "train": PARTS,
    "checkpoint": (PARAMETERS, OPTIMIZER),
}
"""Phase of a step -> what it needs on the device; the rest is in host memory, gradients excepted, which are dropped."""

SLACK = 256 * 2**20
"""Bytes of the device that a phase may take more than when it was first entered: workspaces of libraries."""
_ALIGNMENT = 512
_GIB = 2.0**30


@dataclass(frozen=True)
class Ledger:
    """Bytes of one rank at one moment. What only a GPU has is None on CPUs."""

    parameters: int
    """On the device, as the next two."""
    gradients: int
    optimizer: int
    pinned: int
    """Host memory that holds what is not on the device; kept once taken."""
    host: int
    """Resident memory of the process, the pinned part included."""
    allocated: int | None = None
    """By PyTorch's tensors."""
    reserved: int | None = None
    """By PyTorch, its cache included."""
    peak: int | None = None
    """Most that was allocated since the phase began."""
    card: int | None = None
    """Taken on the card by all processes together."""

    @property
    def owned(self) -> int:
        return self.parameters + self.gradients + self.optimizer

    def metrics(self) -> dict[str, float]:
        """Names ending in _gib, in GiB."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {f"{name}_gib": value / _GIB for name, value in values.items() if value is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name.removesuffix('_gib')} {value:.2f}" for name, value in self.metrics().items()) + " GiB"


def leaks(ledger: Ledger, needed: Sequence[str], first: Ledger) -> list[str]:
    """What is on the device against the plan.

    Args:
        needed: the parts that the phase needs.
        first: the ledger when the phase was first entered.
    """
    found = [
        f"{part} still hold {size} bytes" for part in PARTS if part not in needed and (size := getattr(ledger, part))
    ]
    if ledger.allocated is not None and first.allocated is not None:
        grown = (ledger.allocated - ledger.owned) - (first.allocated - first.owned)
        if grown > SLACK:
            found.append(f"{grown} bytes more than at first are neither parameters, gradients nor optimizer state")
    return found


class PolicyMemory:
    """The memory of a rank. Everything is on the device until `enter` is called."""

    def __init__(self, ddp: Sequence[Any], optimizer: Any, device: str, *, offload: bool) -> None:
        """
        Args:
            ddp: megatron's DistributedDataParallel of each model chunk.
            device: `cpu` or `cuda`.
            offload: False: nothing is moved, and `enter` only reads the ledger.
        """
        self._ddp, self._optimizer, self._device, self.offload = ddp, optimizer, device, offload
        self._away: dict[str, list[tuple[torch.UntypedStorage, int]]] = {}
        """Part in host memory -> its emptied storages with their bytes."""
        self._host: dict[str, torch.Tensor] = {}
        self._first: dict[str, Ledger] = {}
        self._phase: str | None = None

    def enter(self, phase: str) -> dict[str, float]:
        """Move what the phase needs to the device, and the rest away. Returns the ledger's metrics: `PHASE/...` as the
        phase begins, and the `peak` of the phase before, which ends."""
        before, began = self.ledger(), time.monotonic()
        needed = PLAN[phase]
        if self.offload:
            self._move(needed)
        after, moved_s = self.ledger(), time.monotonic() - began
        log.info("memory: end of %s: %s; begin of %s (%.3f s): %s", self._phase, before, phase, moved_s, after)
        first = self._first.setdefault(phase, after)
        for leak in leaks(after, needed if self.offload else PARTS, first):
            log.warning("memory leak on entering %s: %s", phase, leak)
        values = after.metrics()
        metrics = {f"{phase}/{name}": value for name, value in values.items() if name != "peak_gib"}
        metrics[f"{phase}/move_s"] = moved_s
        if before.peak is not None:
            if self._phase is not None:
                metrics[f"{self._phase}/peak_gib"] = before.peak / _GIB
            torch.cuda.reset_peak_memory_stats()
        self._phase = phase
        return metrics

    def require(self, phase: str) -> None:
        """
        Raises:
            RuntimeError: something that the phase needs is in host memory: on a GPU, using it would end the process.
        """
        if missing := [part for part in PLAN[phase] if part in self._away]:
            raise RuntimeError(f"the policy's {' and '.join(missing)} are in host memory: enter({phase!r}) comes first")

    def ledger(self) -> Ledger:
        """The bytes of this moment."""
        sizes = {part: sum(s.nbytes() for s in storages) for part, storages in self._storages().items()}
        pinned = sum(slab.nbytes for slab in self._host.values())
        with open("/proc/self/statm") as file:
            host = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if self._device == "cpu":
            return Ledger(**sizes, pinned=pinned, host=host)
        free, total = torch.cuda.mem_get_info()
        return Ledger(
            **sizes,
            pinned=pinned,
            host=host,
            allocated=torch.cuda.memory_allocated(),
            reserved=torch.cuda.memory_reserved(),
            peak=torch.cuda.max_memory_allocated(),
            card=total - free,
        )

    def _move(self, needed: Sequence[str]) -> None:
        storages = self._storages()
        for part in PARTS:  # room is made before it is taken
            if part not in needed and part not in self._away:
                self._send_away(part, storages[part])
        torch.cuda.synchronize()
        if self._device == "cuda":
            torch.cuda.ipc_collect()  # buffers that engines had mapped
            torch.cuda.empty_cache()  # the activations of the phase before: engines see only what PyTorch gives back
        for part in needed:
            if part in self._away:
                self._bring_back(part)
        torch.cuda.synchronize()

    def _send_away(self, part: str, storages: Sequence[torch.UntypedStorage]) -> None:
        sizes = [storage.nbytes() for storage in storages]
        if part != GRADIENTS:  # each update starts from zero gradients
            for target, storage in zip(self._slices(part, sizes), storages, strict=True):
                target.copy_(_flat(storage), non_blocking=True)
            torch.cuda.synchronize()
        for storage in storages:
            storage.resize_(0)
        self._away[part] = list(zip(storages, sizes, strict=True))

    def _bring_back(self, part: str) -> None:
        away = self._away.pop(part)
        slices = iter(()) if part == GRADIENTS else self._slices(part, [size for _, size in away])
        for storage, size in away:
            storage.resize_(size)
            if part == GRADIENTS:
                _flat(storage).zero_()
            else:
                _flat(storage).copy_(next(slices), non_blocking=True)

    def _slices(self, part: str, sizes: Sequence[int]) -> Iterator[torch.Tensor]:
        """A place in host memory for each storage of the part: the same memory at every call."""
        places = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        if part not in self._host or self._host[part].nbytes != sum(places):
            self._host.pop(part, None)  # before the next is taken: there may not be room for both
            self._host[part] = _host_memory(sum(places), pinned=self._device == "cuda")
        whole = self._host[part].split(places)
        return (place[:size] for place, size in zip(whole, sizes, strict=True))

    def _storages(self) -> dict[str, list[torch.UntypedStorage]]:
        """Every storage of the rank once, under the part that it belongs to."""
        buffers = [buffer for ddp in self._ddp for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers)]
        tensors: dict[str, Iterable[torch.Tensor]] = {
            PARAMETERS: (parameter.data for ddp in self._ddp for parameter in ddp.parameters()),
            GRADIENTS: (buffer.grad_data for buffer in buffers),
            OPTIMIZER: _optimizer_tensors(self._optimizer),
        }
        seen: set[int] = set()
        found: dict[str, list[torch.UntypedStorage]] = {part: [] for part in PARTS}
        for part in PARTS:
            for tensor in tensors[part]:
                storage = tensor.untyped_storage()
                if storage._cdata not in seen and storage.device.type == self._device:
                    seen.add(storage._cdata)
                    found[part].append(storage)
        return found


def _optimizer_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    """Weights and state that the optimizers keep; a hybrid optimizer has one for the host and one for the device."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for inner in (part.optimizer, *getattr(part.optimizer, "sub_optimizers", ())):
            for group in inner.param_groups:
                yield from group["params"]
            for state in inner.state.values():
                # Transformer Engine's FP8 tensors are wrappers without a storage of their own.
                yield from (getattr(v, "_data", v) for v in state.values() if isinstance(v, torch.Tensor))


def _host_memory(nbytes: int, *, pinned: bool) -> torch.Tensor:
    """Pinned by CUDA in its exact size: PyTorch's own pinned memory comes in powers of two."""
    memory = torch.empty(nbytes, dtype=torch.uint8)
    if pinned and nbytes:
        cuda = torch.cuda.cudart()
        torch.cuda.check_error(cuda.cudaHostRegister(memory.data_ptr(), nbytes, 0))
        # Whoever gets the addresses next would otherwise find them registered.
        weakref.finalize(memory, cuda.cudaHostUnregister, memory.data_ptr()).atexit = False
    return memory


def _flat(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
