"""The policy's side of a refit: named tensors in, buckets in shared memory out. Runs inside each policy rank.

Two buffers take turns: while the engines load one bucket, the next is packed. `next` may therefore be called for
bucket k+1 as soon as every engine has confirmed bucket k-1, and no sooner.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from megatron_fapo.weight_sync.buckets import ALIGNMENT, SharedBuffer, checksum, host_id
from megatron_fapo.weight_sync.protocol import Bucket, TensorEntry


class WeightSender:
    """Packs one refit after another. Memory is taken at the first bucket and kept until `close`."""

    def __init__(self, bucket_mb: int, transport: str = "shm", publish: Callable[[Any], Any] | None = None) -> None:
        """
        Args:
            bucket_mb: size of a bucket, MiB; a larger tensor gets a bucket of its own size.
            transport: `shm`, or `cuda_ipc` where every engine is on this rank's GPU (protocol.choose_transports).
            publish: puts a numpy array where engines on other nodes get it, by the reference that it returns; None:
                there are none.
        """
        self._bucket_bytes, self._transport, self._publish = bucket_mb * 2**20, transport, publish
        self._buffers: list[SharedBuffer | None] = [None, None]
        self._turn = 0
        self._tensors: Iterator[tuple[str, torch.Tensor]] = iter(())
        self._next: tuple[str, torch.Tensor] | None = None
        self._verify = self._owner = False

    def open(self, tensors: Iterable[tuple[str, torch.Tensor]], *, owner: bool, verify: bool) -> None:
        """Begin a refit; an unfinished one is given up.

        Args:
            tensors: HF-named full tensors. Producing them may be collective.
            owner: this rank sends. Others only iterate, so that the owner's gathers complete.
            verify: put a checksum on every tensor.
        """
        self.abandon()
        self._tensors, self._owner, self._verify = iter(tensors), owner, verify

    def abandon(self) -> None:
        """Give an unfinished refit up, after its gathers: other tensor ranks still wait in them."""
        for _ in self._tensors:
            pass
        self._next = None

    def next(self) -> Bucket | None:
        """The next bucket, or None when all was sent (for a rank that does not own: at once, after its gathers)."""
        began = time.monotonic()
        if not self._owner:
            for _ in self._tensors:
                pass
            return None
        chosen, end = self._take()
        if not chosen:
            return None
        device = chosen[0][1].device
        buffer = self._buffer(end, device)
        entries = [self._pack(buffer, entry, tensor) for entry, tensor in chosen]
        payload = None if self._publish is None else self._publish(buffer.data[:end].numpy())
        where = (host_id(), self._transport, buffer.handle(), buffer.nbytes)
        return Bucket(*where, tuple(entries), time.monotonic() - began, payload)

    def _take(self) -> tuple[list[tuple[TensorEntry, torch.Tensor]], int]:
        """As many tensors as fit a bucket, one at least; and the bytes that they need."""
        chosen: list[tuple[TensorEntry, torch.Tensor]] = []
        offset = 0
        while (item := self._next or next(self._tensors, None)) is not None:
            name, tensor = item
            if chosen and offset + tensor.nbytes > self._bucket_bytes:
                self._next = item
                break
            self._next = None
            dtype = str(tensor.dtype).removeprefix("torch.")
            chosen.append((TensorEntry(name, dtype, tuple(tensor.shape), offset, tensor.nbytes), tensor))
            offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return chosen, offset

    def _buffer(self, nbytes: int, device: torch.device) -> SharedBuffer:
        self._turn = 1 - self._turn
        buffer = self._buffers[self._turn]
        if buffer is None or buffer.nbytes < nbytes:
            if buffer is not None:
                buffer.close()
            buffer = SharedBuffer(max(nbytes, min(self._bucket_bytes, 2 * nbytes)), self._transport, device)
            self._buffers[self._turn] = buffer
        return buffer

    def _pack(self, buffer: SharedBuffer, entry: TensorEntry, tensor: torch.Tensor) -> TensorEntry:
        target = buffer.data[entry.offset : entry.offset + entry.nbytes]
        target.copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))
        return replace(entry, checksum=checksum(target)) if self._verify else entry

    def release_device(self) -> None:
        """Between refits: give buffers in device memory back, for whoever else works on the card."""
        if self._transport == "cuda_ipc":
            self.close()

    def close(self) -> None:
        """Give the buffers back. Call it when every engine has confirmed its last bucket."""
        for buffer in self._buffers:
            if buffer is not None:
                buffer.close()
        self._buffers = [None, None]
