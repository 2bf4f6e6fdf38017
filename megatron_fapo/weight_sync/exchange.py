"""Parts of a plan as messages between processes: the executor of hops that cannot be mapped.

gloo on CPUs, NCCL on GPUs, in a group of its own beside those of megatron and vLLM. A part travels in chunks, one step
each: the giver packs a chunk, the taker unpacks it and, in the next step, passes on the packed bytes to whoever takes
the part from it. So at a depth of d everything is d steps late, and all links work at once.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from datetime import timedelta
from functools import partial
from typing import Any

import torch

from megatron_fapo.weight_sync.plan import Copy, Hop, Part
from megatron_fapo.weight_sync.protocol import RefitError
from megatron_fapo.weight_sync.regions import Ints, View
from megatron_fapo.weight_sync.share import Piece, Share, chunks_of, piece_of

JOIN_S = 60.0
"""For all members to come."""
_LOOK_S, _POLL_S = 0.5, 1e-4
"""How often a wait looks whether the refit was given up, and whether a GPU is done."""
_ABORT = "abort"


class Exchange:
    """This process's place in the group. Made again after a failure."""

    def __init__(
        self,
        store: tuple[str, int],
        members: Sequence[int],
        me: int,
        *,
        device: torch.device,
        address: str,
        timeout_s: float,
    ) -> None:
        """Returns when all members have come.

        Args:
            store: where the group meets.
            members: numbers of its processes in the plan.
            address: of this process's node, for gloo.
        """
        self._rank = {process: rank for rank, process in enumerate(members)}
        self._me, self._device, self._timeout_s = me, device, timeout_s
        self._group: Any = None
        self._store = torch.distributed.TCPStore(*store, is_master=False, timeout=timedelta(seconds=JOIN_S))
        self._until(self._aside(lambda: self._connect(len(members), address)), min(JOIN_S, timeout_s))

    def _connect(self, size: int, address: str) -> None:
        place = (torch.distributed.PrefixStore("group", self._store), self._rank[self._me], size)
        limit = timedelta(seconds=self._timeout_s)
        if self._device.type == "cuda":
            nccl = torch.distributed.ProcessGroupNCCL.Options()
            nccl._timeout = limit
            torch.cuda.empty_cache()  # NCCL takes its buffers from the driver, outside PyTorch's allocator
            with _without_watchdog():
                self._group = torch.distributed.ProcessGroupNCCL(*place, nccl)
            # Now, while all are here: a communicator made by the first message would wait for members that have none.
            self._group.eager_connect_single_device(self._device)
        else:
            gloo = torch.distributed.ProcessGroupGloo._Options()
            gloo._timeout = limit
            gloo._devices = [torch.distributed.ProcessGroupGloo.create_device(hostname=address)]
            self._group = torch.distributed.ProcessGroupGloo(*place, gloo)

    def run(
        self,
        share: Share,
        read: Callable[[Copy, View, Ints], torch.Tensor],
        write: Callable[[int, Piece, torch.Tensor], None],
    ) -> None:
        """Give and take everything that is this process's, once.

        Args:
            read: (copy, view, shape) -> elements to give.
            write: (part, piece, bytes of it) takes what has arrived.

        Raises:
            RefitError: a member is gone or has failed, or it takes too long. The group is then of no more use.
        """
        if self._aborted():
            raise RefitError("another process gave an earlier refit up")
        hops, parts = share.messages, share.plan.parts
        chunks = {hop.part: chunks_of(parts[hop.part], share.terms.chunk_bytes) for hop in hops}
        steps = max((hop.depth + len(chunks[hop.part]) for hop in hops), default=0)
        held: dict[int, torch.Tensor] = {}
        arrived: dict[int, tuple[int, torch.Tensor]] = {}
        for step in range(steps + 1):
            packed: dict[int, torch.Tensor] = {}
            arriving: dict[int, tuple[int, torch.Tensor]] = {}
            messages: list[tuple[Hop, torch.Tensor]] = []
            for hop in hops:
                number = step - hop.depth
                if not 0 <= number < len(chunks[hop.part]):
                    continue
                pieces = chunks[hop.part][number]
                if hop.taker == self._me:
                    flat = self._empty(pieces)
                    arriving[hop.part] = (number, flat)
                elif hop.depth:
                    flat = held[hop.part]
                else:
                    if hop.part not in packed:
                        packed[hop.part] = self._pack(parts[hop.part], pieces, read)
                    flat = packed[hop.part]
                messages.append((hop, flat))
            under_way = self._aside(partial(self._carry, messages)) if messages else None
            for part, (number, flat) in arrived.items():  # of the step before, while this one's are under way
                for piece in chunks[part][number]:
                    write(part, piece, flat[piece.offset : piece.offset + piece.nbytes])
            if under_way is not None:
                self._until(under_way, self._timeout_s)
                self._settle()
            arrived, held = arriving, {part: flat for part, (_, flat) in arriving.items()}
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # engines and policy may need the room next

    def _empty(self, pieces: Sequence[Piece]) -> torch.Tensor:
        return torch.empty(pieces[-1].offset + pieces[-1].nbytes, dtype=torch.uint8, device=self._device)

    def _pack(
        self, part: Part, pieces: Sequence[Piece], read: Callable[[Copy, View, Ints], torch.Tensor]
    ) -> torch.Tensor:
        flat = self._empty(pieces)
        for piece in pieces:
            copy = part.copies[piece.copy]
            data = read(copy, *piece_of(copy, copy.source, piece))
            flat[piece.offset : piece.offset + piece.nbytes].view(data.dtype).view(data.shape).copy_(data)
        return flat

    def _carry(self, messages: Sequence[tuple[Hop, torch.Tensor]]) -> None:
        """Send and receive the messages of a step; with NCCL until they are queued on the device.

        As one group of NCCL: one at a time, two processes could wait for each other.
        """
        grouped = self._device.type == "cuda"
        works = []
        if grouped:
            self._group._start_coalescing()
        try:
            for tag, (hop, flat) in zip(self._tags(messages), messages, strict=True):
                call, peer = (self._group.send, hop.taker) if hop.giver == self._me else (self._group.recv, hop.giver)
                works.append(call([flat], self._rank[peer], tag))
        finally:
            if grouped:  # left open, this thread's next collective, whoever's, would never begin
                works = [self._group._end_coalescing()]
        for work in works:
            work.wait()

    def _tags(self, messages: Sequence[tuple[Hop, torch.Tensor]]) -> Iterator[int]:
        """Numbers the messages of each pair of processes, which both see in the same order."""
        seen: dict[tuple[int, int], int] = {}
        for hop, _ in messages:
            pair = (hop.giver, hop.taker)
            seen[pair] = seen.get(pair, -1) + 1
            yield seen[pair]

    def _aside(self, work: Callable[[], None]) -> Future[None]:
        """Do something that may never end in a thread of its own: gloo's waits end with the group's time-out only, and
        NCCL's first message between two processes not at all, when the other has failed before."""
        future: Future[None] = Future()
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None

        def run() -> None:
            try:
                with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
                    work()
                future.set_result(None)
            except Exception as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True, name="fapo-exchange").start()
        return future

    def _until(self, future: Future[None], limit_s: float) -> None:
        self._watch(future.done, lambda: wait((future,), timeout=_LOOK_S), limit_s)
        future.result()

    def _settle(self) -> None:
        """Until the device has done what is queued."""
        if self._device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
            self._watch(done.query, lambda: time.sleep(_POLL_S), self._timeout_s)

    def _watch(self, done: Callable[[], bool], rest: Callable[[], Any], limit_s: float) -> None:
        began = look = time.monotonic()
        while not done():
            rest()
            now = time.monotonic()
            if now - look >= _LOOK_S:
                look = now
                if self._aborted():
                    raise RefitError("another process gave the refit up")
            if now - began > limit_s:
                raise RefitError(f"the exchange of weights took more than {limit_s:g} s")

    def _aborted(self) -> bool:
        try:
            return bool(self._store.check([_ABORT]))
        except RuntimeError:  # whoever kept the store is gone
            return True

    def close(self) -> None:
        """Leave, whatever the others do: those that wait for this process hear of it."""
        with contextlib.suppress(RuntimeError):  # the store's keeper is gone, which the members see
            self._store.set(_ABORT, "")
        if self._device.type == "cuda" and self._group is not None:
            self._group.abort()
        self._group = None


class Member:
    """A process with a share of a plan, which may be in a group."""

    _share: Share
    _group: Exchange | None = None

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda" and device.index is None:  # which NCCL does not take
            device = torch.device("cuda", torch.cuda.current_device())
        self._device = device

    def join(self, store: tuple[str, int], members: Sequence[int], address: str, timeout_s: float) -> None:
        """Enter a group; collective over its members. One that this process was in is left.

        Raises:
            RefitError: not all members came.
        """
        self.leave()
        place = {"device": self._device, "address": address, "timeout_s": timeout_s}
        with _translated():
            self._group = Exchange(store, members, self._share.me, **place)

    def leave(self) -> None:
        """Leave the group, if there is one; other members hear of it."""
        if self._group is not None:
            self._group.close()
            self._group = None

    def _run(
        self, read: Callable[[Copy, View, Ints], torch.Tensor], write: Callable[[int, Piece, torch.Tensor], None]
    ) -> None:
        """Exchange.run; after a failure this process is in no group."""
        assert self._group is not None, "join() comes first"
        try:
            with _translated():
                self._group.run(self._share, read, write)
        except BaseException:
            self.leave()
            raise


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what gloo, NCCL, CUDA and the store raise; RefitError is one
        if isinstance(error, RefitError):
            raise
        raise RefitError(f"the exchange of weights broke: {error}") from error


@contextlib.contextmanager
def _without_watchdog() -> Iterator[None]:
    """PyTorch's watchdog of NCCL ends the process when another process fails. Here the others go on without it. The
    variable is read when a group is made: megatron's and vLLM's groups keep theirs."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def abort(store: tuple[str, int]) -> None:
    """Make every member of a group give up, from a process that is none."""
    with contextlib.suppress(RuntimeError):  # its keeper is gone, which the members see
        torch.distributed.TCPStore(*store, is_master=False, timeout=timedelta(seconds=5)).set(_ABORT, "")
