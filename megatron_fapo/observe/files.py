"""Files that are either whole or absent, also after a crash."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from megatron_fapo.errors import UserError


def write_atomically(path: Path, text: str) -> None:
    """Write beside, force to disk, rename: a reader sees the old content or all of the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def force_to_disk(path: Path) -> None:
    """Force a file, or the names in a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_line(record: dict[str, Any]) -> str:
    """One line of strict JSON. Floats keep full precision; NaN and infinities, which JSON lacks, become the strings
    `NaN`, `Infinity` and `-Infinity` so that any reader can load the file."""
    return json.dumps(_spelt(record), ensure_ascii=False, allow_nan=False) + "\n"


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file. A last line without its newline is the trace of a crash and is left out.

    Raises UserError with the line number of any other line that is not JSON.
    """
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    records = []
    # Not splitlines: it would also split at U+2028 and its like, which model text contains and JSON does not escape.
    for number, line in enumerate(whole.split("\n") if whole else [], start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON ({error.msg}); mend or delete the line") from error
    return records


def _spelt(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _spelt(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_spelt(entry) for entry in value]
    return value
