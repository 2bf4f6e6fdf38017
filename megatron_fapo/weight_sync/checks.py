"""Proof that what arrived is what was given: checksums of copies, taken by giver and taker each from its own memory."""

from __future__ import annotations

import random

import torch

_WORDS = 1 << 20


def checksum(data: torch.Tensor) -> torch.Tensor:
    """Of a tensor's elements in row-major order, however they lie: two int64 where the data are, without a wait.

    Odd weights make it depend on positions: two words exchanged, or one moved, change the second sum. int64 wraps, so
    both sums are exact and the same on every device.
    """
    flat = data.contiguous().view(-1).view(torch.uint8)
    padding = -flat.numel() % 8
    if padding or flat.storage_offset() % 8:  # a slice of a bias may begin anywhere
        flat = torch.nn.functional.pad(flat, (0, padding)).clone()
    words = flat.view(torch.int64)
    total = torch.full((2,), data.nbytes, dtype=torch.int64, device=data.device)
    for start in range(0, words.numel(), _WORDS):
        part = words[start : start + _WORDS]
        weights = torch.arange(2 * start + 1, 2 * (start + part.numel()), 2, device=data.device)
        total += torch.stack((part.sum(), (part * weights).sum()))
    return total


class Sample:
    """Which copies of a refit are checked: the same for giver and taker, others in every version."""

    def __init__(self, version: int, share: float) -> None:
        """
        Args:
            share: of the copies; 1: all of them. At least one of each part is checked.
        """
        self._version, self._share = version, share

    def of(self, part: int, copies: int) -> frozenset[int]:
        """Numbers of the copies of a part that are checked."""
        if self._share >= 1:
            return frozenset(range(copies))
        dice = random.Random(f"{self._version}/{part}")
        return frozenset({dice.randrange(copies), *(i for i in range(copies) if dice.random() < self._share)})


class Sums:
    """Checksums by (part, copy), read back from the device once."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, int], torch.Tensor] = {}

    def add(self, part: int, copy: int, data: torch.Tensor) -> None:
        self._sums[part, copy] = checksum(data)

    def read(self) -> list[tuple[int, int, int, int]]:
        """(part, copy, and the two numbers of its checksum)."""
        if not self._sums:
            return []
        values = torch.stack(list(self._sums.values())).tolist()
        return [(*where, *pair) for where, pair in zip(self._sums, values, strict=True)]
