"""What a checkpoint's files hold, in the form that `sha256sum -c SHA256SUMS` reads.

A hash is computed while its file is written, from the bytes on their way: read back, they would come from the page
cache and a second pass would cost as much as the first.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fapo.errors import CheckpointError

SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class FileSum:
    """What a file held when it was written."""

    size: int
    """Bytes."""
    sha256: str


class SummedFile:
    """A new binary file that is hashed as it is written and forced to disk when it is closed."""

    def __init__(self, path: Path) -> None:
        self._file, self._hash = path.open("wb"), hashlib.sha256()
        self._size = 0
        self.hash_s = 0.0
        """Seconds spent on the hash."""

    def __enter__(self) -> SummedFile:
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def write(self, data: Any) -> int:
        began = time.perf_counter()
        self._hash.update(data)
        self.hash_s += time.perf_counter() - began
        self._size += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        """Asked for by torch.save; closing does it."""

    def sum(self) -> FileSum:
        return FileSum(self._size, self._hash.hexdigest())


def sum_file(path: Path) -> FileSum:
    """Read `path` whole."""
    with path.open("rb") as file:
        return FileSum(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def format_sums(files: Mapping[str, str]) -> str:
    """The text of SHA256SUMS: `files` are hashes by name, relative to its directory."""
    return "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(files.items()))


def read_sums(directory: Path) -> dict[str, str]:
    """Hashes by name, as SHA256SUMS in `directory` has them.

    Raises:
        CheckpointError: it is missing, or not as it was written.
    """
    path = directory / SUMS
    if not path.is_file():
        raise CheckpointError(f"{SUMS} is missing")
    text = path.read_bytes().decode("utf-8", "replace")
    if not re.fullmatch(r"([0-9a-f]{64}  [^\n]+\n)+", text):
        raise CheckpointError(f"{SUMS} is not as it was written")
    return {name: sha256 for sha256, _, name in (line.partition("  ") for line in text.splitlines())}


def damaged(directory: Path, files: Mapping[str, str], names: Iterable[str]) -> list[str]:
    """What is wrong with those files of `directory` that are not as `files` has them; empty: nothing."""
    wrong = []
    for name in names:
        path = directory / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif sum_file(path).sha256 != files[name]:
            wrong.append(f"{name} is not as it was written (SHA-256 differs)")
    return wrong
