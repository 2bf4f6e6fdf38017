"""The weights of a megatron checkpoint on disk, by parameter or as HF tensors, whatever layout saved them.

In: a converted directory, a run's checkpoint, or Megatron-LM's; and the parameters of the one rank that holds all.
Nothing else of the checkpoint is read, so an optimizer in it costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_fapo.checksums import SUMS, damaged, read_sums
from megatron_fapo.errors import UserError
from megatron_fapo.policy.describe import Parameter
from megatron_fapo.policy.streams import HFTensor

PARTIAL = ".partial"
"""Ending of what was not completed."""
RELEASE = "release"
"""Megatron-LM's name for weights that no training of its own has saved."""
_BATCH_BYTES = 500_000_000
"""Parameters are read in batches of so many bytes, because each read begins with the checkpoint's index."""


def weights_of(megatron: Path) -> Path:
    """The directory within `megatron` that holds weights, and in hf/ what describes the model.

    Raises:
        UserError: there is none, or it is what an interruption has left.
    """
    if left := [path for path in (megatron, *megatron.parents) if path.suffix == PARTIAL]:
        raise UserError(f"{left[0]} was not completed; choose a checkpoint whose name does not end in {PARTIAL}")
    for path in (megatron / "policy", megatron / RELEASE, megatron):
        if (path / "metadata.json").is_file() and (path / "hf" / "config.json").is_file():
            return path
    raise UserError(
        f"{megatron} is not a megatron checkpoint: neither it nor its policy/ or {RELEASE}/ has metadata.json and "
        "hf/config.json (to one that Megatron-LM saved, add hf/ with the model's config.json and tokenizer files)"
    )


class StoredWeights:
    """The weights of a checkpoint as the one rank that holds all parameters loads them. Needs a process group."""

    def __init__(self, source: Path, parameters: Sequence[Parameter]) -> None:
        """
        Raises:
            UserError: a parameter is missing or has another shape than hf/config.json says.
        """
        from megatron.core.dist_checkpointing import load_tensors_metadata

        self._source, self._parameters = source, parameters
        self._stored: Mapping[str, Any] = load_tensors_metadata(str(source))
        # Megatron-LM's keys have no prefix, those of a run's checkpoint have one.
        self._prefix = "" if any(key.startswith("decoder.") for key in self._stored) else "model."
        if problems := [text for parameter in parameters for text in self._problems(parameter)]:
            about = f"{source} does not hold the model that its hf/config.json describes:"
            raise UserError("\n  ".join([about, *problems]))
        self._refuse_damage()

    def _refuse_damage(self) -> None:
        """Of a run's checkpoint: check the files that are going to be read against its SHA256SUMS."""
        from torch.distributed.checkpoint import FileSystemReader

        root = next((path for path in (self._source, self._source.parent) if (path / SUMS).is_file()), None)
        if root is None:  # no run's checkpoint
            return
        places = FileSystemReader(self._source).read_metadata().storage_data
        keys = {piece.key for each in self._parameters for piece in self._pieces(each, each.entry.data)}
        names = {".metadata", *(place.relative_path for index, place in places.items() if index.fqn in keys)}
        inside = self._source.relative_to(root)
        if wrong := damaged(root, read_sums(root), sorted(str(inside / name) for name in names)):
            raise UserError(f"{root} is damaged: {'; '.join(wrong)}; convert another checkpoint")

    def hf_tensors(self) -> list[HFTensor]:
        """What `read` yields, in the same order."""
        return [
            HFTensor(name, shape, self._empty(parameter, "meta").dtype)
            for parameter in self._parameters
            for name, shape in zip(parameter.rule.hf_names, parameter.rule.hf_shapes, strict=True)
        ]

    def read(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All HF tensors with their names, read batch by batch."""
        for batch in self._batches():
            for parameter, data in zip(batch, self.load(batch), strict=True):
                yield from zip(parameter.rule.hf_names, parameter.rule.merge([data]), strict=True)

    def load(self, parameters: Sequence[Parameter]) -> list[torch.Tensor]:
        """The data of these parameters, in the type in which they were saved."""
        from megatron.core import dist_checkpointing

        loaded = [self._empty(parameter, "cpu") for parameter in parameters]
        pieces = {
            f"{i}.{j}": piece
            for i, parameter in enumerate(parameters)
            for j, piece in enumerate(self._pieces(parameter, loaded[i]))
        }
        # The pieces are views of what is returned, so this fills it.
        dist_checkpointing.load(pieces, str(self._source), validate_access_integrity=False)
        return loaded

    def _batches(self) -> Iterator[list[Parameter]]:
        batch: list[Parameter] = []
        room = _BATCH_BYTES
        for parameter in self._parameters:
            nbytes = self._empty(parameter, "meta").nbytes
            if batch and nbytes > room:
                yield batch
                batch, room = [], _BATCH_BYTES
            batch.append(parameter)
            room -= nbytes
        yield batch

    def _pieces(self, parameter: Parameter, data: torch.Tensor) -> list[Any]:
        return [replace(piece, key=self._prefix + piece.key) for piece in parameter.pieces(data)]

    def _empty(self, parameter: Parameter, device: str) -> torch.Tensor:
        kept = self._stored[self._prefix + parameter.entry.key].dtype
        return torch.empty(parameter.entry.data.shape, dtype=kept, device=device)

    def _problems(self, parameter: Parameter) -> Iterator[str]:
        for piece in self._pieces(parameter, parameter.entry.data):
            if piece.key not in self._stored:
                yield f"{piece.key} is missing"
                continue
            found, wanted = tuple(self._stored[piece.key].global_shape), tuple(piece.global_shape)
            # A vocabulary is padded for the tensor ranks that saved it; rows that are missing would be read as zeros.
            padded = piece.allow_shape_mismatch and found[0] >= wanted[0] and found[1:] == wanted[1:]
            if found != wanted and not padded:
                yield f"{piece.key} has shape {found} instead of {wanted}"
