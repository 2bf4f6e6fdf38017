"""Memory that two processes of one node share: what sender and receiver of a refit both need to know.

On CPUs a buffer is an anonymous memory file (memfd) that others open through /proc: it vanishes with its owner, however
that ends, and is not bound by the size of /dev/shm, which containers set to 64 MiB. On one GPU it is a device buffer
that others map by CUDA IPC.
"""

from __future__ import annotations

import mmap
import os
from typing import Any

import torch

from megatron_fapo.weight_sync.protocol import Bucket, RefitError, TensorEntry

ALIGNMENT = 256
"""Of tensors in a bucket, bytes: any dtype can be viewed in place, and device copies stay vectorised."""

_WORDS = 1 << 20


def host_id() -> str:
    """Names the node and PID namespace of this process: paths under /proc and IPC handles mean nothing elsewhere."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()}/{os.readlink('/proc/self/ns/pid')}"


def gpu_uuid(device: torch.device) -> str:
    """The same in every process, whichever cards each can see; empty for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def checksum(data: torch.Tensor) -> str:
    """Position-dependent checksum of a flat uint8 tensor, computed where it lies; 32 hex digits."""
    whole = data.numel() // 8 * 8
    words = data[:whole].view(torch.int64)
    tail = int.from_bytes(data[whole:].cpu().numpy().tobytes(), "little")
    total, weighted = tail + data.numel(), tail * (data.numel() + 1)
    for start in range(0, words.numel(), _WORDS):
        part = words[start : start + _WORDS]
        # Odd weights: a swap of two words, or one moved, changes the sum; int64 wraps, which keeps it exact.
        weights = torch.arange(2 * start + 1, 2 * (start + part.numel()), 2, device=data.device)
        total += int(part.sum())
        weighted += int((part * weights).sum())
    return f"{total % 2**64:016x}{weighted % 2**64:016x}"


def view(buffer: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    """The tensor of an entry, in place."""
    return buffer[entry.offset : entry.offset + entry.nbytes].view(getattr(torch, entry.dtype)).view(entry.shape)


class SharedBuffer:
    """A buffer of the sender that engines on the same node can map."""

    def __init__(self, nbytes: int, transport: str, device: torch.device) -> None:
        self.nbytes, self.transport = nbytes, transport
        self._file: int | None = None
        if transport == "cuda_ipc":
            _require_exportable_memory()
            self.data = torch.empty(nbytes, dtype=torch.uint8, device=device)
            return
        self._file = os.memfd_create("fapo-weights")
        os.ftruncate(self._file, nbytes)
        self.data = torch.frombuffer(mmap.mmap(self._file, nbytes), dtype=torch.uint8)

    def handle(self) -> tuple[Any, ...]:
        """What a `Bucket` carries; a fresh one for each bucket, because CUDA counts the receivers of each."""
        if self.transport == "shm":
            assert self._file is not None
            return (f"/proc/{os.getpid()}/fd/{self._file}", os.fstat(self._file).st_ino)
        from torch.multiprocessing.reductions import reduce_tensor

        torch.cuda.synchronize(self.data.device)  # the copies into it, before anyone reads
        _, arguments = reduce_tensor(self.data)
        return (gpu_uuid(self.data.device), *arguments[7:])

    def close(self) -> None:
        """Give the memory back; engines that still map it keep their mapping."""
        self.data = torch.empty(0, dtype=torch.uint8)
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _require_exportable_memory() -> None:
    settings = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") + os.environ.get("PYTORCH_ALLOC_CONF", "")
    if "expandable_segments:True" in settings.replace(" ", ""):
        raise RefitError(
            "PYTORCH_CUDA_ALLOC_CONF has expandable_segments:True, whose memory CUDA IPC cannot export; unset it for "
            "the policy's ranks"
        )


def map_bucket(bucket: Bucket, device: torch.device) -> torch.Tensor:
    """The bytes of a bucket, mapped into this process: a flat uint8 tensor, valid until the sender reuses it.

    Raises:
        RefitError: the sender is on another node or card, is gone, or its buffer is too small.
    """
    if bucket.host != host_id():
        raise RefitError("the policy rank that sent this bucket is on another node (or in another container)")
    return _map_cuda(bucket, device) if bucket.transport == "cuda_ipc" else _map_file(bucket)


def _map_file(bucket: Bucket) -> torch.Tensor:
    path, inode = bucket.handle
    try:
        file = os.open(path, os.O_RDWR)
    except OSError as error:
        raise RefitError(
            f"the bucket's memory {path} cannot be opened ({error}): has its policy rank ended?"
        ) from error
    try:
        if os.fstat(file).st_ino != inode:  # another file has the descriptor's number now
            raise RefitError(f"the bucket's memory {path} was given back before it was loaded")
        size = os.fstat(file).st_size
        if size < bucket.nbytes:  # mapping beyond the end would kill this process with SIGBUS
            raise RefitError(f"the bucket's memory has {size} bytes where its manifest says {bucket.nbytes}")
        return torch.frombuffer(mmap.mmap(file, bucket.nbytes), dtype=torch.uint8)
    finally:
        os.close(file)


def _map_cuda(bucket: Bucket, device: torch.device) -> torch.Tensor:
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    uuid, *shared = bucket.handle
    if uuid != gpu_uuid(device):
        raise RefitError(f"the bucket lies on GPU {uuid}, the engine on {gpu_uuid(device)}: use the shm transport")
    index = device.index if device.index is not None else torch.cuda.current_device()
    layout = (torch.Tensor, (bucket.nbytes,), (1,), 0, torch.storage.TypedStorage, torch.uint8, index)
    return rebuild_cuda_tensor(*layout, *shared)
