"""Whole runs as their users start them: `fapo train` in a process of its own, on tiny random models."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

import yaml

MARK = "FAPO_TEST_RUN"


def reward_of_length(data_source: str, solution_str: str, ground_truth: str, extra_info: dict, **_: object) -> float:
    """A user's compute_score that a random model can earn: it differs between samples, so that there are gradients."""
    del data_source, ground_truth, extra_info
    return (sum(map(ord, solution_str)) % 97) / 97 - 0.5


class FapoProcess:
    """One `fapo` command with its output in a file, and every process that descends from it."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log, self.mark = log, uuid.uuid4().hex
        environment = os.environ | {MARK: self.mark, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megatron_fapo.cli", *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def wait(self, timeout_s: float = 600) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise AssertionError(
                f"no end after {timeout_s} s; the end of {self.log}:\n{self.output()[-4000:]}"
            ) from None

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for_step(self, run_dir: Path, step: int, timeout_s: float = 600) -> None:
        """Until metrics.jsonl has the line of `step`."""
        deadline = time.monotonic() + timeout_s
        file = run_dir / "metrics.jsonl"
        while not (file.exists() and f'"step": {step},' in file.read_text()):
            assert self.process.poll() is None, self.output()[-4000:]
            assert time.monotonic() < deadline, self.output()[-4000:]
            time.sleep(0.05)

    def left_over(self) -> list[str]:
        """Command lines of processes of this run that still live."""
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (directory / "environ").read_bytes():
                    found.append((directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # it ended between the listing and the look
        return [line for line in found if line.strip()]  # a zombie has no command line

    def pids(self, word: str) -> list[int]:
        """Processes of this run whose command line has the word."""
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                ours = self.mark.encode() in (directory / "environ").read_bytes()
                if ours and word.encode() in (directory / "cmdline").read_bytes():
                    found.append(int(directory.name))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return sorted(found)

    def wait_until_gone(self, timeout_s: float = 30) -> list[str]:
        """What is left after at most `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while (left := self.left_over()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return left

    def kill_all(self) -> None:
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (directory / "environ").read_bytes():
                    os.kill(int(directory.name), signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue


def write_config(path: Path, values: Mapping[str, object]) -> Path:
    path.write_text(yaml.safe_dump(dict(values)))
    return path
