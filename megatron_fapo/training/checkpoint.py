"""Checkpoints of a whole run: one directory per step, complete or absent.

    run_dir/checkpoints/step_000010/
        state.json      step, weight version, data cursor, what the evaluation of this step gave
        policy/         weights, optimizer, schedule, random state; and the model's description in policy/hf
    run_dir/checkpoints/best -> step_000010, with training.checkpoint.best_metric

A checkpoint is written beside (`step_000010.partial`), forced to disk and renamed; a directory under its final name is
complete. `finish` alone makes it so. One that goes is renamed back first, so that no half of it looks complete. The
best one is chosen among the complete ones by what their own state.json says, so a resumed run chooses the same.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_fapo.config.training import CheckpointConfig
from megatron_fapo.errors import UserError
from megatron_fapo.observe.files import write_atomically

_PARTIAL = ".partial"


@dataclass(frozen=True)
class RunState:
    """What a run needs to go on, besides the policy's own state. Between steps nothing else is alive."""

    step: int
    """Steps finished."""
    weight_version: int
    cursor: dict[str, Any]
    """DataCursor.state_dict() after the prompts of `step`."""
    evaluation: dict[str, float] = field(default_factory=dict)
    """The metrics `eval/...` of this step; empty when it was not evaluated."""


class CheckpointError(UserError):
    """A checkpoint could not be written; the last complete one is untouched."""


def best_step(evaluations: Mapping[int, Mapping[str, float]], metric: str, max_tokens: float | None) -> int | None:
    """The step whose evaluation has the highest `metric`, the earliest of equal ones; None when there is none.

    `evaluations` are the metrics of each step. With `max_tokens`, only steps whose mean response of the same evaluation
    set (`eval/<set>/response/tokens_mean`) is at most so long can be chosen; a step that lacks it cannot.
    """
    length = "/".join([*metric.split("/")[:2], "response", "tokens_mean"])
    limit = math.inf if max_tokens is None else max_tokens
    values = {
        step: found[metric]
        for step, found in sorted(evaluations.items())
        if math.isfinite(found.get(metric, math.nan)) and found.get(length, math.inf) <= limit
    }
    return max(values, key=lambda step: values[step], default=None)


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run_dir: Path, config: CheckpointConfig) -> None:
        self._root, self._config = run_dir / "checkpoints", config

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
        """Make what was filled complete, then choose the best and drop what is neither that nor among the newest."""
        partial = self._root / f"step_{state.step:06d}{_PARTIAL}"
        final = partial.with_suffix("")
        (partial / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n")
        for path in [*partial.rglob("*"), partial]:
            _force_to_disk(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _force_to_disk(self._root)
        self.tidy()
        return final

    def amend(self, state: RunState) -> None:
        """Give the complete checkpoint of the same step, if there is one, the evaluation that a stop had left out."""
        path = self._root / f"step_{state.step:06d}" / "state.json"
        if path.is_file():
            write_atomically(path, json.dumps(asdict(state), indent=2) + "\n")
            self.tidy()

    def tidy(self) -> None:
        """Point `best` to the best checkpoint, then remove older ones and what an interruption has left of any.

        In this order, so that `best` never points to what is gone. Not while a checkpoint is being filled.
        """
        complete, best = self.complete(), self.best()
        link = self._root / "best"
        if best is None:
            link.unlink(missing_ok=True)
        else:
            beside = link.with_name(link.name + _PARTIAL)
            beside.unlink(missing_ok=True)
            beside.symlink_to(best.name)
            beside.replace(link)
        for old in complete[: -self._config.keep]:
            if old != best:
                old.rename(old.with_name(old.name + _PARTIAL))
        for left in self._root.glob(f"step_*{_PARTIAL}"):
            shutil.rmtree(left)

    def best(self) -> Path | None:
        """The complete checkpoint that `training.checkpoint.best_metric` chooses; None without one that can be."""
        metric, limit = self._config.best_metric, self._config.best_max_tokens
        if metric is None:
            return None
        states = {path: _read_state(path) for path in self.complete()}
        step = best_step({state.step: state.evaluation for state in states.values()}, metric, limit)
        return next((path for path, state in states.items() if state.step == step), None)

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
        return found[-1], _read_state(found[-1])


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


def _read_state(path: Path) -> RunState:
    return RunState(**json.loads((path / "state.json").read_text()))


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
