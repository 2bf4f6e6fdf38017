"""The directory of a run's checkpoints: complete or absent, whatever interrupts a save."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fapo.checksums import FileSum, damaged, sum_file
from megatron_fapo.config.training import CheckpointConfig
from megatron_fapo.errors import CheckpointError, UserError
from megatron_fapo.training import loop
from megatron_fapo.training.checkpoint import (
    Checkpoints,
    DamagedCheckpointError,
    RunState,
    best_step,
    files_of,
    problems,
)

F1, TOKENS = "eval/fpb/f1", "eval/fpb/response/tokens_mean"


def _save(checkpoints: Checkpoints, step: int, f1: float | None = None, tokens: float = 100.0) -> Path:
    """`weights` come from the driver, `policy/ranks` from others, who give their sum."""
    partial = checkpoints.begin(step)
    (partial / "weights").write_text(f"weights of {step}")
    (partial / "policy").mkdir()
    (partial / "policy" / "ranks").write_text(f"ranks of {step}")
    evaluation = {} if f1 is None else {F1: f1, TOKENS: tokens, "eval/other/response/tokens_mean": 1.0}
    return checkpoints.finish(
        RunState(step, step + 1, {"offset": step * 8}, evaluation),
        {"policy/ranks": sum_file(partial / "policy" / "ranks")},
    )


def _names(checkpoints: Checkpoints) -> list[str]:
    return [path.name for path in checkpoints.complete()]


def test_newest_is_what_was_saved_last_and_older_ones_go(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=2))
    for step in (2, 4, 10):
        _save(checkpoints, step)
    assert [p.name for p in checkpoints.complete()] == ["step_000004", "step_000010"]
    path, state = checkpoints.newest()
    assert (path / "weights").read_text() == "weights of 10"
    assert state == RunState(10, 11, {"offset": 80})


def test_an_interrupted_save_harms_nothing(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=1))
    _save(checkpoints, 3)
    (checkpoints.begin(6) / "weights").write_text("half")  # and then the power went
    assert checkpoints.newest()[1].step == 3
    _save(checkpoints, 6)
    assert (checkpoints.newest()[0] / "weights").read_text() == "weights of 6"
    assert not list(tmp_path.rglob("*.partial"))


def test_nothing_to_resume_from_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no complete checkpoint"):
        Checkpoints(tmp_path, CheckpointConfig(keep=1)).newest()


def test_no_place_for_checkpoints_is_said(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the directory should be")
    with pytest.raises(UserError, match="writable run_dir"):
        Checkpoints(tmp_path, CheckpointConfig(keep=1)).begin(1)


def test_the_best_step_is_within_the_budget_and_the_earliest_of_equal_ones() -> None:
    found = {
        40: {F1: 0.9, TOKENS: 500.0},
        30: {F1: 0.8, TOKENS: 300.0},
        10: {F1: 0.8, TOKENS: 200.0},
        20: {F1: 0.5, TOKENS: 100.0},
        50: {F1: float("nan"), TOKENS: 100.0},
        60: {"eval/other/f1": 1.0},
        70: {F1: 1.0, "eval/other/response/tokens_mean": 1.0},  # its own tokens are not known
    }
    assert best_step(found, F1, None) == 70
    assert best_step(found, F1, 500) == 40
    assert best_step(found, F1, 499) == 10
    assert best_step(found, F1, 150) == 20
    assert best_step(found, F1, 99) is None
    assert best_step({}, F1, None) is None


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, 9), st.tuples(st.integers(0, 3), st.integers(0, 3))), st.integers(0, 3))
def test_no_better_step_within_the_budget_is_passed_over(found: dict[int, tuple[int, int]], limit: int) -> None:
    chosen = best_step({s: {F1: f1, TOKENS: tokens} for s, (f1, tokens) in found.items()}, F1, limit)
    allowed = {step: f1 for step, (f1, tokens) in found.items() if tokens <= limit}
    assert chosen == min((s for s in allowed if allowed[s] == max(allowed.values())), default=None)


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=1, best_metric=F1, best_max_tokens=150))
    link = tmp_path / "checkpoints" / "best"
    _save(checkpoints, 1)
    assert not link.is_symlink()
    _save(checkpoints, 2, 0.6)
    assert (_names(checkpoints), link.resolve().name) == (["step_000002"], "step_000002")
    _save(checkpoints, 3, 0.5)
    _save(checkpoints, 4, 0.9, tokens=200.0)  # over the budget
    assert (_names(checkpoints), link.resolve().name) == (["step_000002", "step_000004"], "step_000002")
    assert (link / "weights").read_text() == "weights of 2"
    assert checkpoints.newest()[1].step == 4  # a resumed run goes on from here
    _save(checkpoints, 5, 0.7)
    assert (_names(checkpoints), link.resolve().name) == (["step_000005"], "step_000005")
    _save(checkpoints, 6)
    resumed = Checkpoints(tmp_path, CheckpointConfig(keep=1, best_metric=F1, best_max_tokens=150))
    assert resumed.best() == link.resolve()
    _save(resumed, 7, 0.6)
    assert (_names(resumed), link.resolve().name) == (["step_000005", "step_000007"], "step_000005")


def test_no_best_when_none_is_wanted_or_none_will_do(tmp_path: Path) -> None:
    wanted = CheckpointConfig(keep=1, best_metric=F1, best_max_tokens=50)
    for config in (CheckpointConfig(keep=1), wanted):
        checkpoints = Checkpoints(tmp_path, config)
        _save(checkpoints, 1, 0.9)
        _save(checkpoints, 2, 0.1)
        assert (checkpoints.best(), _names(checkpoints)) == (None, ["step_000002"])
        assert not (tmp_path / "checkpoints" / "best").is_symlink()


class PowerCut(BaseException):
    """Ends a save wherever it is."""


@pytest.mark.parametrize("cut_at", range(12))
@pytest.mark.parametrize("new_f1", [0.2, 0.9])
def test_a_save_cut_off_anywhere_leaves_the_newest_and_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut_at: int, new_f1: float
) -> None:
    """Every change that `finish` makes to the file system is where the power goes once, a removal half way through."""
    config = CheckpointConfig(keep=1, best_metric=F1)
    checkpoints = Checkpoints(tmp_path, config)
    for step, f1 in ((1, 0.8), (2, 0.3)):
        _save(checkpoints, step, f1)
    assert _names(checkpoints) == ["step_000001", "step_000002"]
    left = cut_at

    def cut(original: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == -1:
                if original is rmtree:
                    (Path(args[0]) / "weights").unlink(missing_ok=True)
                raise PowerCut
            return original(*args, **kwargs)

        return run

    rmtree = shutil.rmtree
    with monkeypatch.context() as patch:
        for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "symlink_to"), (Path, "unlink")):
            patch.setattr(owner, name, cut(getattr(owner, name)))
        patch.setattr(shutil, "rmtree", cut(rmtree))
        try:
            _save(checkpoints, 3, new_f1)
        except PowerCut:
            pass
        else:
            assert cut_at > 6, "nothing was cut: this case tests nothing"

    link = tmp_path / "checkpoints" / "best"
    after = Checkpoints(tmp_path, config)
    newest, state = after.newest()
    assert state.step in (2, 3)
    assert all((path / "weights").read_text() == f"weights of {int(path.name[5:])}" for path in after.complete())
    assert (link / "weights").is_file(), "best points to something that is gone"
    assert after.best() is not None
    after.tidy()  # what a resumed run begins with
    assert (
        link.resolve()
        == after.best()
        == tmp_path / "checkpoints" / f"step_{3 if state.step == 3 and new_f1 > 0.8 else 1:06d}"
    )
    assert newest in after.complete()
    _save(after, 4, 0.1)
    assert len(after.complete()) == 2
    assert sorted(p.name for p in link.parent.iterdir()) == ["best", *_names(after)]


def test_an_evaluation_that_a_stop_cut_off_is_made_up_for(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=1, best_metric=F1))
    _save(checkpoints, 2, f1=0.5)
    _save(checkpoints, 4)
    assert _names(checkpoints) == ["step_000002", "step_000004"]
    late = dataclasses.replace(checkpoints.newest()[1], evaluation={F1: 0.7, TOKENS: 90.0})
    checkpoints.amend(late)
    assert checkpoints.newest()[1] == late
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step_000004"
    assert _names(checkpoints) == ["step_000004"], "the one that was best has served"
    checkpoints.amend(RunState(6, 7, {}))
    assert _names(checkpoints) == ["step_000004"], "no checkpoint comes from an evaluation alone"


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Any] = {
    "flipped": _flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "gone": Path.unlink,
}
FILES = ("weights", "policy/ranks", "state.json", "evaluation.json", "SHA256SUMS")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_found_and_the_way_out_is_said(tmp_path: Path, name: str, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=2, best_metric=F1))
    older, newest = _save(checkpoints, 1, f1=0.5), _save(checkpoints, 2)
    checkpoints.amend(RunState(2, 3, {"offset": 16}, {F1: 0.9}))
    assert checkpoints.best() == newest
    assert subprocess.run(["sha256sum", "--strict", "--check", "SHA256SUMS"], cwd=newest, check=False).returncode == 0
    assert problems(newest) == damaged(newest, files_of(newest), files_of(newest)) == []

    DAMAGES[damage](newest / name)
    try:
        checkpoints.newest()
    except DamagedCheckpointError as error:
        text = str(error)
        checkpoints.tidy()
        assert checkpoints.complete() == [older], "a damaged checkpoint does not count"
        assert newest.is_dir(), "a damaged checkpoint is not removed"
        assert (tmp_path / "checkpoints" / "best").resolve() == older.resolve()
    else:  # only a hash can tell, which is the ranks' work
        assert (name, damage) in {("weights", "flipped"), ("policy/ranks", "flipped")}
        text = str(checkpoints.damaged(newest, damaged(newest, files_of(newest), files_of(newest))))
    assert name in text
    assert "step_000001 is complete: move step_000002 away" in text


def test_a_damaged_file_beyond_the_sums_is_told_from_missing_ones(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=1))
    path = _save(checkpoints, 1)
    lines = (path / "SHA256SUMS").read_text().splitlines(keepends=True)
    (path / "SHA256SUMS").write_text("".join(line for line in lines if "ranks" not in line))
    with pytest.raises(CheckpointError, match=r"does not list policy/ranks.*No older one is complete"):
        checkpoints.newest()


def test_what_the_driver_cannot_see_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=1))
    partial = checkpoints.begin(1)
    (partial / "short").write_text("abc")
    with pytest.raises(CheckpointError, match=r"absent, short: written by a rank.*file system that all nodes share"):
        checkpoints.finish(RunState(1, 1, {}), {"short": FileSum(4, ""), "absent": FileSum(1, "")})
    assert checkpoints.complete() == []


def test_an_unwatched_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Damage that ranks find when the run has begun (its processes are left out here) ends the attempt, not the run."""
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=2))
    for step in (1, 2):
        _save(checkpoints, step)
    _flip(tmp_path / "checkpoints" / "step_000002" / "policy" / "ranks")
    resumed_from = []

    async def run(*_: Any) -> int:
        path, state = checkpoints.newest()
        if wrong := damaged(path, files_of(path), files_of(path)):
            raise checkpoints.damaged(path, wrong)
        resumed_from.append(state.step)
        return 0

    monkeypatch.setattr(loop, "_train", run)
    monkeypatch.setattr(loop.log, "propagate", True)
    with pytest.raises(DamagedCheckpointError, match="policy/ranks"):
        loop.train_command(None, resume="newest")  # type: ignore[arg-type]
    assert not resumed_from
    assert loop.train_command(None, resume="auto") == 0  # type: ignore[arg-type]
    assert resumed_from == [1]
    assert (tmp_path / "checkpoints" / "step_000002.damaged").is_dir()
    assert "policy/ranks is not as it was written" in caplog.text
    shutil.rmtree(tmp_path / "checkpoints" / "step_000001")
    assert checkpoints.exist(), "a run whose checkpoints are all damaged does not begin anew by itself"


def test_a_checkpoint_that_replaces_one_is_never_without_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=1))
    _save(checkpoints, 1)
    path = _save(checkpoints, 1)
    assert checkpoints.complete() == [path]
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert json.loads((path / "state.json").read_text())["files"] == {"policy/ranks": 10, "weights": 12}
