"""A policy rank's side of a refit: gives what the plan takes from it. Runs inside the rank, whose tensors it reads.

It is told what to do by the driver and decides nothing. Tensors are looked up anew for every refit: between two, the
policy may have moved them to the host and back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from megatron_fapo.weight_sync.checks import Sample, Sums
from megatron_fapo.weight_sync.exchange import Member
from megatron_fapo.weight_sync.mapped import Exposer, require_exportable_memory, viewed
from megatron_fapo.weight_sync.plan import Copy
from megatron_fapo.weight_sync.protocol import RefitError
from megatron_fapo.weight_sync.regions import Ints, View
from megatron_fapo.weight_sync.share import Share


class WeightSource(Member):
    """`take` a share first; then, for each refit, `open`, any of `expose` and `exchange`, `sums`, and `conceal`."""

    def __init__(self, look_up: Callable[[], Mapping[str, torch.Tensor]], device: torch.device) -> None:
        """
        Args:
            look_up: the rank's tensors under the names of its index, where they are now.
        """
        super().__init__(device)
        self._look_up = look_up
        self._tensors: Mapping[str, torch.Tensor] = {}
        self._exposer = Exposer()

    def take(self, share: Share) -> int:
        """Take this process's share of a plan; returns the number of rounds in which its tensors are exposed: one where
        their memory is not copied.

        Raises:
            RefitError: memory that others cannot map.
        """
        self._share, self._plan = share, share.plan
        self._given = sorted({hop.part for hop in share.plan.hops})
        tensors = self._look_up()
        wanted = {copy.source.tensor for hop in share.mapped for copy in share.plan.parts[hop.part].copies}
        mirrored = self._device.type == "cpu"
        if wanted and not mirrored:
            require_exportable_memory()
        self._rounds: list[list[str]] = []
        room = 0
        for name in (name for name in tensors if name in wanted):  # in the model's order: layers complete in turn
            size = tensors[name].nbytes
            if not self._rounds or (mirrored and size > room):
                self._rounds.append([])
                room = share.terms.bucket_bytes
            self._rounds[-1].append(name)
            room -= size
        return len(self._rounds)

    def open(self, version: int, share: float) -> None:
        """Begin a refit.

        Args:
            share: of the copies whose checksums `sums` will give.
        """
        self._tensors, self._sample = self._look_up(), Sample(version, share)

    def expose(self, number: int) -> dict[str, Any]:
        """Let takers map the tensors of a round; returns an `Exposure` for the wire."""
        return self._exposer.expose({name: self._tensors[name] for name in self._rounds[number]}).to_wire()

    def exchange(self) -> None:
        """Send what is sent. Collective over the group.

        Raises:
            RefitError: see Exchange.run.
        """
        self._run(self._read, _takes_nothing)

    def _read(self, copy: Copy, view: View, shape: Ints) -> torch.Tensor:
        return viewed(self._tensors[copy.source.tensor], view, shape)

    def sums(self) -> list[tuple[int, int, int, int]]:
        """Checksums of the copies that this refit checks, from the tensors as they are now (see checks.Sums.read)."""
        sums = Sums()
        for part in self._given:
            copies = self._plan.parts[part].copies
            for number in self._sample.of(part, len(copies)):
                copy = copies[number]
                sums.add(part, number, self._read(copy, copy.source, copy.shape))
        return sums.read()

    def conceal(self, one_taker: bool) -> None:
        """The refit is over, done or given up: keep no tensor alive, and unless takers keep them mapped, let the
        device's memory be given back (Exposer.conceal)."""
        self._tensors = {}
        if not self._share.terms.keep_mapped:
            self._exposer.conceal(one_taker)

    def close(self) -> None:
        self.leave()
        self._exposer.close()


def _takes_nothing(part: int, *_: Any) -> None:
    raise RefitError(f"part {part} was sent to a policy rank")
