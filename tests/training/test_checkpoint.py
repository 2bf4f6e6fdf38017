"""The directory of a run's checkpoints: complete or absent, whatever interrupts a save."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_fapo.errors import UserError
from megatron_fapo.training.checkpoint import Checkpoints, RunState


def _save(checkpoints: Checkpoints, step: int) -> Path:
    (checkpoints.begin(step) / "weights").write_text(f"weights of {step}")
    return checkpoints.finish(RunState(step, step + 1, {"offset": step * 8}))


def test_newest_is_what_was_saved_last_and_older_ones_go(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (2, 4, 10):
        _save(checkpoints, step)
    assert [p.name for p in checkpoints.complete()] == ["step_000004", "step_000010"]
    path, state = checkpoints.newest()
    assert (path / "weights").read_text() == "weights of 10"
    assert state == RunState(10, 11, {"offset": 80})


def test_an_interrupted_save_harms_nothing(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    _save(checkpoints, 3)
    (checkpoints.begin(6) / "weights").write_text("half")  # and then the power went
    assert checkpoints.newest()[1].step == 3
    _save(checkpoints, 6)
    assert (checkpoints.newest()[0] / "weights").read_text() == "weights of 6"
    assert not list(tmp_path.rglob("*.partial"))


def test_nothing_to_resume_from_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no complete checkpoint"):
        Checkpoints(tmp_path, keep=1).newest()


def test_no_place_for_checkpoints_is_said(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the directory should be")
    with pytest.raises(UserError, match="writable run_dir"):
        Checkpoints(tmp_path, keep=1).begin(1)
