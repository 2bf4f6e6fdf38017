"""Step metrics: one line of `metrics.jsonl` for each step, and the same records for whoever follows."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_fapo.errors import UserError
from megatron_fapo.observe.files import json_line, read_json_lines, write_atomically

FILE = "metrics.jsonl"
_NOT_FINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


class MetricsWriter:
    """Appends the metrics of finished steps; every line is on disk when `write` returns.

    `resume_step` is the step that a resumed run goes on from: lines of later steps, which the resumed run will repeat,
    are taken away first, so that the file has each step once. None is a new run.
    Raises UserError when a new run meets the metrics of an earlier one.
    """

    def __init__(self, run_dir: Path, resume_step: int | None = None) -> None:
        path = run_dir / FILE
        kept = read_json_lines(path) if path.exists() else []
        if resume_step is None and kept:
            raise UserError(f"{path} has the metrics of an earlier run: add --resume, or choose another run_dir")
        if resume_step is not None:
            kept = [record for record in kept if record["step"] <= resume_step]
        write_atomically(path, "".join(map(json_line, kept)))
        self._last_step = kept[-1]["step"] if kept else -1
        self._path, self._file = path, path.open("a", encoding="utf-8")
        self.followers: list[Callable[[int, Mapping[str, float]], None]] = []
        """Called with every record that is on disk, and with what is added to one."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises ValueError when `step` is not after the last one: a step has one line."""
        if step <= self._last_step:
            raise ValueError(f"metrics of step {step} after those of step {self._last_step}: a step is written once")
        metrics = {name: _number(name, metrics[name]) for name in metrics}
        self._file.write(json_line({"step": step, **metrics}))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._last_step = step
        self._hand_on(step, metrics)

    def amend(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add metrics to the line of `step` when it is the last, as a whole or not at all; else write the line."""
        if step != self._last_step:
            return self.write(step, metrics)
        metrics = {name: _number(name, metrics[name]) for name in metrics}
        self._file.close()
        *kept, last = read_json_lines(self._path)
        write_atomically(self._path, "".join(map(json_line, [*kept, last | metrics])))
        self._file = self._path.open("a", encoding="utf-8")
        self._hand_on(step, metrics)

    def close(self) -> None:
        self._file.close()

    def _hand_on(self, step: int, metrics: Mapping[str, float]) -> None:
        for follower in self.followers:
            follower(step, metrics)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl in order of step, each with its `step`.

    Raises UserError when the directory has none, or a line is not JSON.
    """
    path = run_dir / FILE
    if not path.is_file():
        raise UserError(f"{run_dir}: no {FILE}: not the directory of a run that has finished a step")
    return [{name: _NOT_FINITE.get(value, value) for name, value in record.items()} for record in read_json_lines(path)]


def _number(name: str, value: float) -> float:
    # A one-element tensor or numpy scalar would be refused by JSON only after the step's work is done.
    if not hasattr(value, "__float__"):
        raise TypeError(f"metric {name} is {value!r}, not a number")
    return value if isinstance(value, int) else float(value)
