"""`fapo convert`: HF checkpoints to megatron's distributed format and back, for models larger than memory.

hf-to-megatron  HF directory -> what Megatron-LM's --load takes: latest_checkpointed_iteration.txt and release/, which
                holds the weights and in hf/ what describes the model
megatron-to-hf  such a directory, a run's checkpoint or the policy/ in it, saved under any layout, with or without an
                optimizer -> HF directory that vLLM and transformers load

Both go parameter by parameter, without Ray, GPUs or other processes. What is written appears under its name when it is
complete; until then it is NAME.partial.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_fapo.config.policy import ParallelConfig
from megatron_fapo.errors import UserError
from megatron_fapo.policy.actor import copy_model_files
from megatron_fapo.policy.describe import Parameter, RankContents, conversion_layout, describe_ranks, taking_the_part_of
from megatron_fapo.policy.hf_config import ModelShape, layout_problems, read_model_shape
from megatron_fapo.policy.hf_weights import HFCheckpoint, shard_name, write_index
from megatron_fapo.policy.streams import SHARD_BYTES, HFTensor, deal, write_megatron, write_safetensors

_RELEASE = "release"
_PARTIAL = ".partial"
_BATCH_BYTES = 1_000_000_000
"""Parameters are read from a megatron checkpoint in batches of so many bytes, because each read begins at its index."""


def hf_to_megatron(hf: Path, out: Path, *, tensor: int, pipeline: int, expert: int) -> None:
    """Convert the HF checkpoint `hf` into the new directory `out`, in one file per rank of these model-parallel sizes.

    Any layout loads it; the one that it was cut for reads the least. Weights get the type that config.json names.

    Raises:
        UserError: all that is wrong with `hf`, the layout and `out`; then nothing was written.
    """
    shape = read_model_shape(hf)
    parallel = conversion_layout(shape, tensor, pipeline, expert)
    dtype, source = getattr(torch, shape.dtype), HFCheckpoint(hf)
    problems = layout_problems(shape, parallel)
    problems += _hf_problems(source, shape, describe_ranks(shape, ParallelConfig(), dtype)[0])
    problems += _out_problems(out, shape.parameters * dtype.itemsize)
    if problems:
        raise UserError("\n  ".join([f"{hf} cannot be converted:", *problems]))

    def cut(parameter: Parameter) -> torch.Tensor:
        whole = [source[name] for name in parameter.rule.hf_names]
        return parameter.rule.split(whole, parameter.tensor_ranks, parameter.tensor_rank).to(dtype)

    with _written_beside(out) as partial:
        copy_model_files(hf, partial / _RELEASE / "hf")
        # Without its version, Megatron-LM would reorder Q, K and V as it does for checkpoints of 2019.
        common = {"checkpoint_version": 3.0, "iteration": 0}
        write_megatron(partial / _RELEASE, describe_ranks(shape, parallel, dtype), cut, common, on_file=_say)
        (partial / "latest_checkpointed_iteration.txt").write_text(_RELEASE + "\n")


def megatron_to_hf(megatron: Path, out: Path) -> None:
    """Convert the megatron checkpoint `megatron` into the new HF directory `out`, in files of at most 5 GB.

    Weights keep the type in which they were saved, and config.json names it.

    Raises:
        UserError: `megatron` is no complete checkpoint of the model that it describes, or what is wrong with `out`.
    """
    source = weights_of(megatron)
    shape = read_model_shape(source / "hf")
    reader = _Reader(source, describe_ranks(shape, ParallelConfig(), torch.float32)[0].parameters)
    planned = reader.hf_tensors()
    if problems := _out_problems(out, sum(entry.nbytes for entry in planned)):
        raise UserError("\n  ".join(problems))
    with _written_beside(out) as partial, taking_the_part_of(0, ParallelConfig()):
        copy_model_files(source / "hf", partial)
        _set_dtype(partial, planned[0].dtype)
        files, tensors = deal(planned, SHARD_BYTES), reader.read()
        for number, contents in enumerate(files):
            write_safetensors(partial / shard_name(number, len(files)), contents, tensors)
            _say(number + 1, len(files))
        write_index(partial, [[entry.name for entry in contents] for contents in files])


def weights_of(megatron: Path) -> Path:
    """The directory within `megatron` that holds weights and their description.

    Raises:
        UserError: there is none, or it is what an interruption left.
    """
    if left := [path for path in (megatron, *megatron.parents) if path.suffix == _PARTIAL]:
        raise UserError(f"{left[0]} was not completed; choose a checkpoint whose name does not end in {_PARTIAL}")
    for path in (megatron / "policy", megatron / _RELEASE, megatron):
        if (path / "metadata.json").is_file() and (path / "hf" / "config.json").is_file():
            return path
    raise UserError(
        f"{megatron} is not a megatron checkpoint: neither it nor its policy/ or {_RELEASE}/ has metadata.json and "
        "hf/config.json (for one that Megatron-LM saved, copy config.json and the tokenizer's files of the model there)"
    )


class _Reader:
    """The parameters of a megatron checkpoint as HF tensors, as the one rank that holds all of them would load them."""

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

    def hf_tensors(self) -> list[HFTensor]:
        """What `read` yields, in the same order."""
        return [
            HFTensor(name, tuple(tensor.shape), tensor.dtype)
            for parameter in self._parameters
            for name, tensor in self._merged(parameter, self._empty(parameter, "meta"))
        ]

    def read(self) -> Iterator[tuple[str, torch.Tensor]]:
        """HF-named tensors, read batch by batch."""
        from megatron.core import dist_checkpointing

        for batch in self._batches():
            data = [self._empty(parameter, "cpu") for parameter in batch]
            pieces = {
                f"{i}.{j}": piece
                for i, parameter in enumerate(batch)
                for j, piece in enumerate(self._pieces(parameter, data[i]))
            }
            # Pieces are views of `data`, so this fills it.
            dist_checkpointing.load(pieces, str(self._source), validate_access_integrity=False)
            for i, parameter in enumerate(batch):
                yield from self._merged(parameter, data[i])

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

    @staticmethod
    def _merged(parameter: Parameter, data: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        return zip(parameter.rule.hf_names, parameter.rule.merge([data]), strict=True)

    def _problems(self, parameter: Parameter) -> Iterator[str]:
        for piece in self._pieces(parameter, parameter.entry.data):
            if piece.key not in self._stored:
                yield f"{piece.key} is missing"
                continue
            found, wanted = tuple(self._stored[piece.key].global_shape), tuple(piece.global_shape)
            # A vocabulary is padded for the tensor ranks that saved it.
            padded = piece.allow_shape_mismatch and found[0] >= wanted[0] and found[1:] == wanted[1:]
            if found != wanted and not padded:
                yield f"{piece.key} has shape {found} instead of {wanted}"


def _hf_problems(source: HFCheckpoint, shape: ModelShape, whole: RankContents) -> list[str]:
    """How the tensors of an HF checkpoint differ from those of the model that its config.json describes."""
    wanted = {
        name: tensor.shape
        for parameter in whole.parameters
        for name, tensor in zip(parameter.rule.hf_names, parameter.rule.merge([parameter.entry.data]), strict=True)
    }
    present = set(source.names())
    problems = [f"tensor {name} is missing" for name in wanted.keys() - present]
    problems += [
        f"tensor {name} has shape {tuple(source[name].shape)} where config.json asks for {tuple(wanted[name])}"
        for name in wanted.keys() & present
        if source[name].shape != wanted[name]
    ]
    # A tied output layer and tables of rotary frequencies are copies of what is known anyway.
    known = {"lm_head.weight"} if shape.tied else set()
    problems += [
        f"tensor {name} belongs to no parameter of a {shape.architecture}"
        for name in present - wanted.keys() - known
        if not name.endswith("rotary_emb.inv_freq")
    ]
    return sorted(problems)


def _out_problems(out: Path, nbytes: int) -> list[str]:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return [f"{out} exists and is not empty; give a new directory"]
    parent = next(path for path in out.resolve().parents if path.exists())
    if (free := shutil.disk_usage(parent).free) < nbytes:
        return [f"{out} needs {nbytes / 2**30:.1f} GiB and {parent} has {free / 2**30:.1f} GiB free: free some"]
    return []


@contextmanager
def _written_beside(out: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `out` when it is complete and on disk."""
    partial = out.with_name(out.name + _PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted conversion
    partial.mkdir(parents=True)
    yield partial
    for path in (*partial.rglob("*"), partial):
        _force_to_disk(path)
    partial.rename(out)
    _force_to_disk(out.parent)


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _set_dtype(directory: Path, dtype: torch.dtype) -> None:
    """config.json names the type of the weights beside it."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config.pop("torch_dtype", None)
    path.write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n")


def _say(done: int, of: int) -> None:
    print(f"file {done} of {of} is written", file=sys.stderr)
