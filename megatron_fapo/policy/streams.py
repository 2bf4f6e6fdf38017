"""Checkpoint files written tensor by tensor: mcore's distributed format, and HF's sharded safetensors.

In: what is to be written, by name and shape, and a function or iterator that gives the tensors one at a time. Out:
complete files, forced to disk. Memory holds the tensor that is being written, whatever the size of its file.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.filesystem import _StoragePrefix, _write_item
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.futures import Future

from megatron_fapo.policy.describe import Parameter, RankContents

SHARD_BYTES = 5_000_000_000
"""Most tensor bytes in one safetensors file; a larger tensor has a file of its own."""
_SAFETENSORS_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

Content = Callable[[], torch.Tensor | io.BytesIO]


class _OneAtATime(FileSystemWriter):
    """torch's writer without its habit of keeping the tensors of a file until the file is complete."""

    def write_data(self, plan: SavePlan, planner: Any) -> Future[list[Any]]:
        name = f"{plan.storage_data.prefix}0.distcp"
        with (Path(self.path) / name).open("wb") as file:
            written = [
                _write_item(self.transforms, file, planner.resolve_data(item), item, name, self.serialization_format)
                for item in plan.items
            ]
            file.flush()
            os.fsync(file.fileno())
        done: Future[list[Any]] = Future()
        done.set_result(written)
        return done


class _Planner(DefaultSavePlanner):
    """Asks for the content of an item when it is written."""

    def __init__(self, contents: dict[MetadataIndex, Content]) -> None:
        super().__init__(flatten_state_dict=False)
        self._contents = contents

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        return self._contents[write_item.index]()


def write_megatron(
    directory: Path,
    ranks: Sequence[RankContents],
    cut: Callable[[Parameter], torch.Tensor],
    common: dict[str, Any],
    on_file: Callable[[int, int], None],
) -> None:
    """Write a checkpoint that `megatron.core.dist_checkpointing.load` reads: one file per rank that owns something.

    Args:
        cut: gives the data of a parameter; called when it is written.
        common: what is not sharded.
        on_file: called after each file with their number so far and in all.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    @lru_cache(maxsize=1)  # the pieces of one parameter are written one after another
    def pieces(parameter: Parameter) -> list[Any]:
        return parameter.pieces(cut(parameter))

    def content(parameter: Parameter, number: int) -> torch.Tensor:
        piece = pieces(parameter)[number]
        # A view would be saved with all that it is a view of.
        return piece.data.reshape(_stored_shape(piece)).clone(memory_format=torch.contiguous_format)

    items = [_items(rank, content) for rank in ranks]
    items[0].append(_object_item(ShardedObject("common_state", common, (1,), (0,))))
    planner = _Planner({item.index: source for of_rank in items for item, source in of_rank})
    writer = _OneAtATime(directory)
    writer.set_up_storage_writer(True)
    prefixed = [
        SavePlan([item for item, _ in of_rank], storage_data=_StoragePrefix(f"__{i}_"))
        for i, of_rank in enumerate(items)
        if of_rank
    ]
    global_plan, metadata = planner.create_global_plan(prefixed)
    results = []
    for number, plan in enumerate(global_plan, start=1):
        results.append(writer.write_data(plan, planner).wait())
        on_file(number, len(global_plan))
    writer.finish(metadata, results)
    save_config(CheckpointingConfig("torch_dist"), str(directory))


def _items(rank: RankContents, content: Callable[[Parameter, int], torch.Tensor]) -> list[tuple[WriteItem, Content]]:
    """What this rank writes: of replicas, the main one."""
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    items = [_object_item(entry) for entry in rank.objects if is_main_replica(entry.replica_id)]
    for parameter in rank.parameters:
        for number, piece in enumerate(parameter.pieces(parameter.entry.data)):
            if is_main_replica(piece.replica_id):
                items.append((_tensor_item(piece), partial(content, parameter, number)))
    return items


def _object_item(entry: Any) -> tuple[WriteItem, Content]:
    saved = io.BytesIO()
    torch.save([entry.data], saved)
    return WriteItem(MetadataIndex(entry.unique_key), WriteItemType.BYTE_IO), lambda: saved


def _stored_shape(piece: Any) -> torch.Size:
    return torch.Size((1,) * piece.prepend_axis_num + tuple(piece.local_shape))


def _tensor_item(piece: Any) -> WriteItem:
    offset = torch.Size(piece.global_offset)
    return WriteItem(
        MetadataIndex(piece.key, offset),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            ChunkStorageMetadata(offset, _stored_shape(piece)),
            TensorProperties(dtype=piece.dtype),
            torch.Size(piece.global_shape),
        ),
    )


@dataclass(frozen=True)
class HFTensor:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def deal(tensors: Sequence[HFTensor], limit: int) -> list[list[HFTensor]]:
    """Tensors by file, in order, each file as full as `limit` bytes allow; a larger tensor is alone."""
    files: list[list[HFTensor]] = []
    room = 0
    for tensor in tensors:
        if not files or tensor.nbytes > room:
            files.append([])
            room = limit
        files[-1].append(tensor)
        room -= tensor.nbytes
    return files


def write_safetensors(path: Path, contents: Sequence[HFTensor], tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Write one file, taking its tensors from the iterator, which gives them in the order of `contents`.

    safetensors' own writer wants all tensors of a file at once. The format: the length of the header in 8 bytes, the
    header as JSON padded to a multiple of 8, the tensors' bytes without gaps.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in contents:
        begin, end = end, end + entry.nbytes
        kind = _SAFETENSORS_TYPES[entry.dtype]
        header[entry.name] = {"dtype": kind, "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in contents:
            name, tensor = next(tensors)
            if HFTensor(name, tuple(tensor.shape), tensor.dtype) != entry:
                raise RuntimeError(f"{path}: planned {entry}, got {name} {tuple(tensor.shape)} {tensor.dtype}")
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
