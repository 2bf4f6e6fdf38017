"""Tensors of a policy rank, mapped into the processes of its node: the executor of hops within a node.

The giver exposes tensors, the taker maps them and copies the views that its plan names. On GPUs the tensors themselves
are exposed, by CUDA IPC. On CPUs other processes cannot map a process's own memory, so the tensors are mirrored, a
bucket at a time, into an anonymous memory file (memfd) which others open through /proc: it vanishes with its owner,
however that ends, and is not bound by the size of /dev/shm, which containers set to 64 MiB.
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_fapo.weight_sync.protocol import RefitError
from megatron_fapo.weight_sync.regions import Ints, View

log = logging.getLogger(__name__)
_ALIGNMENT = 256


def host_id() -> str:
    """Names the node and PID namespace of this process: paths under /proc and IPC handles mean nothing elsewhere."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()}/{os.readlink('/proc/self/ns/pid')}"


def gpu_uuid(device: torch.device) -> str:
    """The same in every process, whichever cards each can see; empty for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def viewed(tensor: torch.Tensor, view: View, shape: Ints) -> torch.Tensor:
    """The view of a contiguous local tensor that a plan names."""
    return tensor.as_strided(shape, view.stride, tensor.storage_offset() + view.offset)


@dataclass(frozen=True)
class Exposure:
    """Where the bytes of some tensors are, until the giver exposes others or conceals them."""

    host: str
    """Of the giver (host_id)."""
    memories: tuple[tuple[Any, ...], ...]
    """Each `("shm", path, inode, bytes)`, or `("cuda_ipc", bytes, *what PyTorch's CUDA sharing gives)`."""
    tensors: Mapping[str, tuple[int, int, str, int]]
    """Name -> (memory, byte offset, dtype, elements)."""

    def to_wire(self) -> dict[str, Any]:
        """As builtin types, which vLLM's RPC carries without pickle."""
        return {"host": self.host, "memories": self.memories, "tensors": dict(self.tensors)}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Exposure:
        tensors = {name: tuple(where) for name, where in wire["tensors"].items()}
        return cls(wire["host"], tuple(tuple(memory) for memory in wire["memories"]), tensors)


class Exposer:
    """The giver's side."""

    def __init__(self) -> None:
        self._mirrors: list[Mirror] = [Mirror(), Mirror()]
        self._turn = 0
        self._shown: tuple[tuple[tuple[str, int], ...], Exposure] | None = None

    def expose(self, tensors: Mapping[str, torch.Tensor]) -> Exposure:
        """Let others map these tensors, all on one device.

        On CPUs two mirrors take turns: what was exposed the last time stays valid. On GPUs tensors that are where they
        were give the same exposure again, which takers may have mapped still.
        """
        if all(tensor.is_cuda for tensor in tensors.values()):
            where = tuple((name, tensor.data_ptr()) for name, tensor in tensors.items())
            if self._shown is None or self._shown[0] != where:
                self._shown = (where, _expose_cuda(tensors))
            # What the policy has queued on these tensors, before anyone reads them.
            torch.cuda.synchronize(next(iter(tensors.values())).device)
            return self._shown[1]
        self._turn = 1 - self._turn
        return self._mirrors[self._turn].expose(tensors)

    def conceal(self, one_taker: bool) -> None:
        """Takers have let go of everything: let the device's memory be given back, and expose anew the next time.

        Args:
            one_taker: each exposure was mapped by one process, once.
        """
        if self._shown is not None and not one_taker:
            _count_as_released(self._shown[1])
        self._shown = None
        if torch.cuda.is_initialized():
            torch.cuda.ipc_collect()

    def close(self) -> None:
        """Give the mirrors back; takers that still map one keep their mapping."""
        for mirror in self._mirrors:
            mirror.close()


def _count_as_released(exposure: Exposure) -> None:
    """PyTorch counts on exactly one taker of a handle: with none, or several, memory that is given back would be kept
    for ever. Its counters are numbers in a file in shared memory; 0 says that it may go."""
    for memory in exposure.memories:
        counters, number = memory[6:8]
        try:
            with open(Path("/dev/shm") / os.fsdecode(counters).lstrip("/"), "r+b") as file:
                file.seek(8 * number)
                file.write(struct.pack("q", 0))
        except OSError as error:
            log.warning("memory that engines mapped may not be given back: PyTorch's counters cannot be set: %s", error)


class Mirror:
    """Copies of CPU tensors in a memory file, kept for the next ones."""

    def __init__(self) -> None:
        self._file: int | None = None
        self._data = torch.empty(0, dtype=torch.uint8)

    def expose(self, tensors: Mapping[str, torch.Tensor]) -> Exposure:
        where: dict[str, tuple[int, int, str, int]] = {}
        end = 0
        for name, tensor in tensors.items():
            where[name] = (0, end, str(tensor.dtype).removeprefix("torch."), tensor.numel())
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if self._file is None or self._data.numel() < end:
            self.close()
            self._file = os.memfd_create("fapo-weights")
            os.ftruncate(self._file, end)
            self._data = torch.frombuffer(mmap.mmap(self._file, end), dtype=torch.uint8)
        for name, tensor in tensors.items():
            start = where[name][1]
            self._data[start : start + tensor.nbytes].copy_(tensor.detach().reshape(-1).view(torch.uint8))
        memory = ("shm", f"/proc/{os.getpid()}/fd/{self._file}", os.fstat(self._file).st_ino, end)
        return Exposure(host_id(), (memory,), where)

    def close(self) -> None:
        self._data = torch.empty(0, dtype=torch.uint8)
        if self._file is not None:
            os.close(self._file)
            self._file = None


def require_exportable_memory() -> None:
    """
    Raises:
        RefitError: PyTorch was told to allocate in a way that CUDA IPC cannot export.
    """
    settings = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") + os.environ.get("PYTORCH_ALLOC_CONF", "")
    if "expandable_segments:True" in settings.replace(" ", ""):
        raise RefitError(
            "PYTORCH_CUDA_ALLOC_CONF has expandable_segments:True, whose memory CUDA IPC cannot export; unset it for "
            "the policy's ranks"
        )


def _expose_cuda(tensors: Mapping[str, torch.Tensor]) -> Exposure:
    from torch.multiprocessing.reductions import reduce_tensor

    memories: dict[int, tuple[int, tuple[Any, ...]]] = {}
    where: dict[str, tuple[int, int, str, int]] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in memories:
            flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),))
            memories[key] = (len(memories), ("cuda_ipc", storage.nbytes(), *reduce_tensor(flat)[1][7:]))
        offset = tensor.data_ptr() - key
        where[name] = (memories[key][0], offset, str(tensor.dtype).removeprefix("torch."), tensor.numel())
    return Exposure(host_id(), tuple(memory for _, memory in memories.values()), where)


def map_tensors(exposure: Exposure, device: torch.device, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The tensors of these names, flat, in this process's address space; valid until the giver says otherwise.

    Args:
        device: that this process computes on. Memory of another card of the node is mapped into its context.

    Raises:
        RefitError: the giver is on another node, is gone, or has other tensors than the plan knew.
    """
    if exposure.host != host_id():
        raise RefitError("the policy rank that exposes these tensors is on another node (or in another container)")
    if missing := sorted(set(names) - exposure.tensors.keys()):
        raise RefitError(f"the policy rank does not expose {missing[0]}, which the plan takes from it")
    memories = [_map(memory, device) for memory in exposure.memories]
    found = {}
    for name in names:
        memory, offset, dtype, elements = exposure.tensors[name]
        kind: torch.dtype = getattr(torch, dtype)
        data = memories[memory][offset : offset + elements * kind.itemsize]
        if data.numel() < elements * kind.itemsize:
            raise RefitError(f"{name} lies outside the memory that is exposed for it")
        found[name] = data.view(kind)
    return found


def _map(memory: tuple[Any, ...], device: torch.device) -> torch.Tensor:
    kind, *rest = memory
    return _map_cuda(rest, device) if kind == "cuda_ipc" else _map_file(*rest)


def _map_file(path: str, inode: int, nbytes: int) -> torch.Tensor:
    try:
        file = os.open(path, os.O_RDWR)
    except OSError as error:
        raise RefitError(f"the exposed memory {path} cannot be opened ({error}): has its policy rank ended?") from error
    try:
        if os.fstat(file).st_ino != inode:  # another file has the descriptor's number now
            raise RefitError(f"the exposed memory {path} was given back before it was read")
        size = os.fstat(file).st_size
        if size < nbytes:  # mapping beyond the end would kill this process with SIGBUS
            raise RefitError(f"the exposed memory has {size} bytes where {nbytes} were announced")
        return torch.frombuffer(mmap.mmap(file, nbytes), dtype=torch.uint8)
    finally:
        os.close(file)


def _map_cuda(shared: Sequence[Any], device: torch.device) -> torch.Tensor:
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    nbytes, *handle = shared
    index = device.index if device.index is not None else torch.cuda.current_device()
    layout = (torch.Tensor, (nbytes,), (1,), 0, torch.storage.TypedStorage, torch.uint8, index)
    return rebuild_cuda_tensor(*layout, *handle)
