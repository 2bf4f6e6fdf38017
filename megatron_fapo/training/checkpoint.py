"""Checkpoints of a whole run: one directory per step, complete or absent.

    run_dir/checkpoints/step_000010/
        state.json      step, weight version, data cursor, what the evaluation of this step gave; sizes of the files
        config.yaml     the configuration of the run
        policy/         weights, optimizer, schedule, random state; and the model's description in policy/hf
        evaluation.json the evaluation, if it was made up for after the save
        SHA256SUMS      of all of these
    run_dir/checkpoints/best -> step_000010, with training.checkpoint.best_metric

A checkpoint is written beside (`step_000010.partial`), forced to disk and renamed; SHA256SUMS is written last. `finish`
alone does this. One that goes is renamed back first, so that no half of it looks complete. The best one is chosen among
the complete ones by what their own files say, so a resumed run chooses the same.

Names, sizes and the driver's files are checked whenever checkpoints are looked at, the hashes of the large files by the
policy's ranks before they load. A damaged checkpoint is never loaded, counted or removed.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_fapo.checksums import SUMS, FileSum, damaged, format_sums, read_sums, sum_file
from megatron_fapo.config.training import CheckpointConfig
from megatron_fapo.errors import CheckpointError, UserError
from megatron_fapo.observe.files import force_to_disk, write_atomically

_PARTIAL, _DAMAGED = ".partial", ".damaged"
_STATE, _EVALUATION = "state.json", "evaluation.json"


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


class DamagedCheckpointError(CheckpointError):
    """The newest checkpoint is not as it was written."""

    def __init__(self, path: Path, problems: Sequence[str], complete: Sequence[Path]) -> None:
        older = [each.name for each in complete if each.name < path.name]
        remedy = f"{older[-1]} is complete: move {path.name} away and" if older else "No older one is complete:"
        what = "go on from there with --resume; --resume auto does both" if older else "restore it, or start anew"
        super().__init__(f"{path} is damaged: {'; '.join(problems)}. {remedy} {what}")
        self.path = path

    def set_aside(self) -> Path:
        """Rename it, so that it is not taken for a checkpoint any more; returns where it is."""
        aside = self.path.with_name(self.path.name + _DAMAGED)
        shutil.rmtree(aside, ignore_errors=True)
        return self.path.rename(aside)


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

    def finish(self, state: RunState, written: Mapping[str, FileSum]) -> Path:
        """Make what was filled complete, then choose the best and drop what is neither that nor among the newest.

        Args:
            written: the files that others have written and hashed, by name; the rest is hashed here.

        Raises:
            CheckpointError: a file is not here as it was written elsewhere.
        """
        partial = self._root / f"step_{state.step:06d}{_PARTIAL}"
        final = partial.with_suffix("")
        here = {str(p.relative_to(partial)): p for p in partial.rglob("*") if p.is_file()}
        if absent := [n for n, f in written.items() if n not in here or here[n].stat().st_size != f.size]:
            raise CheckpointError(
                f"{partial}: {', '.join(sorted(absent))}: written by a rank, but not seen by the driver; run_dir must "
                "be on a file system that all nodes share"
            )
        files = {name: written[name] if name in written else sum_file(path) for name, path in here.items()}
        sizes = {name: file.size for name, file in sorted(files.items())}
        (partial / _STATE).write_text(json.dumps(asdict(state) | {"files": sizes}, indent=2) + "\n")
        files[_STATE] = sum_file(partial / _STATE)
        (partial / SUMS).write_text(format_sums({name: file.sha256 for name, file in files.items()}))
        for path in [*partial.rglob("*"), partial]:
            force_to_disk(path)
        if final.exists():  # of a run that was taken back to an earlier step
            final.rename(final.with_name(f"{final.name}.replaced{_PARTIAL}"))
        partial.rename(final)
        force_to_disk(self._root)
        self.tidy()
        return final

    def amend(self, state: RunState) -> None:
        """Give the complete checkpoint of the same step, if there is one, the evaluation that a stop had left out."""
        path = self._root / f"step_{state.step:06d}"
        if path not in self.complete():
            return
        # Until SHA256SUMS lists it, it does not count: the two cannot be replaced at once.
        write_atomically(path / _EVALUATION, json.dumps(state.evaluation, indent=2) + "\n")
        sums = read_sums(path) | {_EVALUATION: sum_file(path / _EVALUATION).sha256}
        write_atomically(path / SUMS, format_sums(sums))
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
        return [path for path in self._named() if not problems(path)]

    def exist(self) -> bool:
        """Whether any save was ever finished; what became of it is another question."""
        return bool(self._named() or list(self._root.glob(f"step_*{_DAMAGED}")))

    def newest(self) -> tuple[Path, RunState]:
        """
        Raises:
            DamagedCheckpointError: the newest is not as it was written.
            UserError: there is none.
        """
        found = self._named()
        if not found:
            raise UserError(f"{self._root} holds no complete checkpoint to resume from; start without --resume")
        if wrong := problems(found[-1]):
            raise self.damaged(found[-1], wrong)
        return found[-1], _read_state(found[-1])

    def damaged(self, path: Path, wrong: Sequence[str]) -> DamagedCheckpointError:
        """The error that says so, and which older checkpoint is complete."""
        return DamagedCheckpointError(path, wrong, self.complete())

    def _named(self) -> list[Path]:
        """What `finish` has renamed into place, oldest first."""
        return sorted(path for path in self._root.glob("step_*") if path.suffix == "")


def problems(path: Path) -> list[str]:
    """What is wrong with a checkpoint, but for the hashes of `files_of`; [] when nothing is."""
    try:
        sums = read_sums(path)
    except CheckpointError as error:
        return [str(error)]
    if wrong := damaged(path, sums, sums.keys() & {_STATE, _EVALUATION}):
        return wrong
    if _STATE not in sums:
        return [f"{SUMS} does not list {_STATE}"]
    for name, size in json.loads((path / _STATE).read_text())["files"].items():
        if name not in sums:
            wrong.append(f"{SUMS} does not list {name}")
        elif not (path / name).is_file():
            wrong.append(f"{name} is missing")
        elif (path / name).stat().st_size != size:
            wrong.append(f"{name} has {(path / name).stat().st_size} bytes instead of {size}")
    return wrong


def files_of(path: Path) -> dict[str, str]:
    """SHA-256 of the files that `problems` has not read."""
    return {name: sha256 for name, sha256 in read_sums(path).items() if name not in (_STATE, _EVALUATION)}


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
    values = json.loads((path / _STATE).read_text())
    del values["files"]
    state = RunState(**values)
    if _EVALUATION in read_sums(path):
        state = replace(state, evaluation=json.loads((path / _EVALUATION).read_text()))
    return state
