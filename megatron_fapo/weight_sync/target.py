"""An engine worker's side of a refit: takes what the plan gives it, into memory that `Memory` finds for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from megatron_fapo.weight_sync.checks import Sample, Sums
from megatron_fapo.weight_sync.exchange import Member
from megatron_fapo.weight_sync.mapped import Exposure, map_tensors, viewed
from megatron_fapo.weight_sync.plan import Copy
from megatron_fapo.weight_sync.protocol import RefitError
from megatron_fapo.weight_sync.regions import Index, Ints, View, volume
from megatron_fapo.weight_sync.share import Piece, Share, piece_of


class Memory(Protocol):
    """Where weights go (landing.Landing: the model of a vLLM worker)."""

    def index(self) -> Index: ...

    def begin(self) -> None: ...

    def view(self, tensor: str, offset: int, shape: Ints, stride: Ints) -> torch.Tensor: ...

    def wrote(self, tensor: str, elements: int) -> float: ...

    def finish(self) -> float: ...

    def abort(self) -> None: ...


class WeightTarget(Member):
    """`take` a share first; then, for each refit, `begin`, any of `pull` and `exchange`, and `finish` or `abort`."""

    def __init__(self, memory: Memory, device: torch.device) -> None:
        super().__init__(device)
        self._memory = memory
        self.load_s = 0.0
        """Seconds of this refit that went into vLLM's post-load steps."""

    def take(self, share: Share) -> None:
        """Take this process's share of a plan."""
        self._share, self._plan = share, share.plan
        self._place = {name: place for place, name in enumerate(self._memory.index().tensors)}
        self._memories: dict[int, tuple[Exposure, dict[str, torch.Tensor]]] = {}
        self._lent: Mapping[str, torch.Tensor] = {}
        self._pulled: dict[int, list[tuple[int, int]]] = {}
        for hop in share.mapped:
            copies = len(share.plan.parts[hop.part].copies)
            self._pulled.setdefault(hop.giver, []).extend((hop.part, number) for number in range(copies))

    def begin(self, version: int, share: float) -> None:
        """Make the model ready to be written. A refit that was left unfinished is given up."""
        self._memory.abort()
        self._memory.begin()
        self._sample, self._sums, self.load_s = Sample(version, share), Sums(), 0.0
        self._open: dict[tuple[int, int], int] = {}
        self._checked = {
            hop.part: self._sample.of(hop.part, len(self._plan.parts[hop.part].copies))
            for hop in self._plan.hops
            if hop.taker == self._share.me
        }

    def pull(self, exposures: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
        """Copy everything that is this process's out of what policy ranks expose; when it returns, they may expose
        the next.

        Args:
            exposures: numbers of policy ranks, and an `Exposure` of each as it came over the wire.

        Raises:
            RefitError: memory that cannot be mapped.
        """
        todo: list[tuple[int, int, torch.Tensor]] = []
        for giver, wire in exposures:
            exposure = Exposure.from_wire(wire)
            mine = [
                (part, number, copy)
                for part, number in self._pulled.get(giver, ())
                if (copy := self._plan.parts[part].copies[number]).source.tensor in exposure.tensors
            ]
            if not mine:
                continue
            tensors = self._mapped(giver, exposure)
            todo += [(part, number, viewed(tensors[c.source.tensor], c.source, c.shape)) for part, number, c in mine]
        for part, number, data in sorted(todo, key=lambda item: self._when(*item[:2])):
            copy = self._plan.parts[part].copies[number]
            self._view(copy, copy.target, copy.shape).copy_(data)
            self._landed(part, number)
        if self._device.type == "cuda":  # before the givers write these tensors again
            torch.cuda.synchronize(self._device)

    def _mapped(self, giver: int, exposure: Exposure) -> dict[str, torch.Tensor]:
        """What is taken from a policy rank. Each exposure is mapped once: CUDA counts how often."""
        known = self._memories.get(giver)
        if known is None or known[0] != exposure:
            self._memories.pop(giver, None)
            hops = [hop for hop in self._plan.hops if giver in (hop.giver, self._share.stands_for)]
            names = {copy.source.tensor for hop in hops for copy in self._plan.parts[hop.part].copies}
            tensors = map_tensors(exposure, self._device, sorted(names & exposure.tensors.keys()))
            known = self._memories[giver] = (exposure, tensors)
        return known[1]

    def _when(self, part: int, number: int) -> tuple[int, int]:
        """Sorts copies by layer, whoever gives them: one is complete, and its staging given back, before the next."""
        view = self._plan.parts[part].copies[number].target
        return self._place[view.tensor], view.offset

    def exchange(self, exposures: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
        """Receive what is sent, pass on what others take from here, and send for the policy rank of this card.
        Collective over the group.

        Args:
            exposures: as of `pull`; that of the rank that this worker stands for must hold all its tensors.

        Raises:
            RefitError: see Exchange.run.
        """
        for giver, wire in exposures:
            if giver == self._share.stands_for:
                self._lent = self._mapped(giver, Exposure.from_wire(wire))
        self._run(self._read, self._write)

    def _read(self, copy: Copy, view: View, shape: Ints) -> torch.Tensor:
        if copy.source.tensor not in self._lent:
            raise RefitError(f"{copy.source.tensor} of policy rank {self._share.stands_for} was not exposed to be sent")
        return viewed(self._lent[copy.source.tensor], view, shape)

    def _write(self, part: int, piece: Piece, data: torch.Tensor) -> None:
        copy = self._plan.parts[part].copies[piece.copy]
        target = self._view(copy, *piece_of(copy, copy.target, piece))
        target.copy_(data.view(target.dtype).view(target.shape))
        left = self._open.get((part, piece.copy), copy.nbytes) - piece.nbytes
        self._open[part, piece.copy] = left
        if left == 0:
            self._landed(part, piece.copy)

    def _view(self, copy: Copy, view: View, shape: Ints) -> torch.Tensor:
        return self._memory.view(copy.target.tensor, view.offset, shape, view.stride)

    def _landed(self, part: int, number: int) -> None:
        copy = self._plan.parts[part].copies[number]
        if number in self._checked[part]:  # now: when its layer is complete, the memory may be converted and freed
            self._sums.add(part, number, self._view(copy, copy.target, copy.shape))
        self.load_s += self._memory.wrote(copy.target.tensor, volume(copy.shape))

    def finish(self) -> list[tuple[int, int, int, int]]:
        """Whatever the model still needs before it can serve; returns checksums (checks.Sums.read).

        Raises:
            RefitError: something never came.
        """
        self.load_s += self._memory.finish()
        if not self._share.terms.keep_mapped:
            self._unmap()
        return self._sums.read()

    def abort(self) -> None:
        self.leave()
        self._unmap()
        self._memory.abort()

    def _unmap(self) -> None:
        """Let go of the policy's memory, which it could not give back otherwise."""
        self._memories, self._lent = {}, {}
