"""Checkpoints of a whole run: one directory per step, complete or absent.

    run_dir/checkpoints/step_000010/
        state.json      step, weight version, data cursor
        policy/         weights, optimizer, schedule, random state; and the model's description in policy/hf

A checkpoint is written beside (`step_000010.partial`), forced to disk and renamed; a directory under its final name is
complete. `finish` alone makes it so.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_fapo.errors import UserError

_PARTIAL = ".partial"


@dataclass(frozen=True)
class RunState:
    """What a run needs to go on, besides the policy's own state. Between steps nothing else is alive."""

    step: int
    """Steps finished."""
    weight_version: int
    cursor: dict[str, Any]
    """DataCursor.state_dict() after the prompts of `step`."""


class CheckpointError(UserError):
    """A checkpoint could not be written; the last complete one is untouched."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        self._root, self._keep = run_dir / "checkpoints", keep

    def begin(self, step: int) -> Path:
        """An empty directory to fill; remains of an interrupted save are removed.

        Raises:
            CheckpointError: the directory cannot be made.
        """
        partial = self._root / f"step_{step:06d}{_PARTIAL}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(f"{partial}: {error.strerror}; checkpoints need a writable run_dir") from error
        return partial

    def finish(self, state: RunState) -> Path:
        """Make what was filled complete, then drop the oldest beyond `keep`."""
        partial = self._root / f"step_{state.step:06d}{_PARTIAL}"
        final = partial.with_suffix("")
        (partial / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n")
        for path in [*partial.rglob("*"), partial]:
            _force_to_disk(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _force_to_disk(self._root)
        for old in self.complete()[: -self._keep]:
            shutil.rmtree(old)
        return final

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(p for p in self._root.glob("step_*") if p.suffix != _PARTIAL and (p / "state.json").is_file())

    def newest(self) -> tuple[Path, RunState]:
        """
        Raises:
            UserError: there is none.
        """
        found = self.complete()
        if not found:
            raise UserError(f"{self._root} holds no complete checkpoint to resume from; start without --resume")
        return found[-1], RunState(**json.loads((found[-1] / "state.json").read_text()))


def require_space(directory: Path, nbytes: int) -> None:
    """
    Raises:
        CheckpointError: the file system of `directory` has less than `nbytes` free.
    """
    free = shutil.disk_usage(directory).free
    if free < nbytes:
        raise CheckpointError(
            f"a checkpoint takes about {nbytes / 2**30:.1f} GiB and {directory} has {free / 2**30:.1f} GiB free: free "
            "some, or lower training.checkpoint.keep, then go on with --resume"
        )


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
