"""Which runs are started, resumed, skipped and refused. The runs themselves are replaced by a process that writes what
`fapo train` leaves; the real thing is `make windtunnel`, which takes minutes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_fapo.config.load import load_config
from megatron_fapo.config.show import dump_yaml
from megatron_fapo.errors import UserError
from megatron_fapo.windtunnel import command
from megatron_fapo.windtunnel.arms import choose
from megatron_fapo.windtunnel.command import Tunnel, windtunnel_command
from tests.windtunnel.test_readings import Habits, samples

ARMS = choose(["baseline", "fapo_oracle"], quick=False)


class Runs:
    """Stands for `fapo train` processes: remembers their arguments, does as many steps as it is told."""

    def __init__(self) -> None:
        self.started: list[list[str]] = []
        self.stop_after: dict[str, int] = {}
        self.fail: set[str] = set()

    async def __call__(self, arguments: list[str], log: Path) -> int:
        self.started.append(list(arguments))
        run = log.parent
        run.mkdir(parents=True, exist_ok=True)
        files = [Path(arguments[i + 1]) for i, word in enumerate(arguments) if word == "-c"]
        loaded = load_config(files, [word for word in arguments if "=" in word])
        (run / "config.yaml").write_text(dump_yaml(loaded.config))
        if run.name in self.fail:
            return 1
        metrics = run / "metrics.jsonl"
        done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        last = self.stop_after.pop(run.name, loaded.config.training.steps)
        for step in range(done + 1, last + 1):
            with metrics.open("a") as file:
                file.write(json.dumps({"step": step}) + "\n")
            path = run / "samples" / f"step_{step:06d}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(s) + "\n" for s in samples(step, Habits(), 1.0, prompts=4)))
        checkpoint = run / "checkpoints" / f"step_{last:06d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text("{}")
        return 0 if last == loaded.config.training.steps else 75

    def names(self) -> list[str]:
        return [Path(next(w for w in words if w.startswith("run_dir="))[8:]).name for words in self.started]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    fake = Runs()
    monkeypatch.setattr(command, "_fapo", fake)
    return fake


def test_every_arm_and_seed_once_and_finished_runs_are_not_repeated(runs: Runs, tmp_path: Path) -> None:
    tunnel = Tunnel(tmp_path, steps=4)
    assert windtunnel_command(ARMS, (1, 2), tunnel) == 0
    assert sorted(runs.names()) == ["baseline-seed1", "baseline-seed2", "fapo_oracle-seed1", "fapo_oracle-seed2"]
    first = (tmp_path / "summary.json").read_text()
    assert set(json.loads(first)["arms"]) == {"baseline", "fapo_oracle"}
    assert {"accuracy", "flawed_ratio"} <= set(json.loads(first)["arms"]["baseline"])
    assert windtunnel_command(ARMS, (1, 2), tunnel) == 0
    assert len(runs.started) == 4
    drop = {"seconds": 0}
    assert json.loads((tmp_path / "summary.json").read_text()) | drop == json.loads(first) | drop
    assert windtunnel_command(ARMS, (1, 2, 3), tunnel) == 0
    assert len(runs.started) == 6


def test_a_stopped_run_goes_on_and_its_steps_are_not_repeated(runs: Runs, tmp_path: Path) -> None:
    tunnel = Tunnel(tmp_path, steps=4)
    runs.stop_after["baseline-seed1"] = 2
    assert windtunnel_command(ARMS, (1,), tunnel) == 1
    assert not (tmp_path / "summary.json").exists()
    assert windtunnel_command(ARMS, (1,), tunnel) == 0
    assert runs.names().count("baseline-seed1") == 2
    assert "--resume" in runs.started[-1]
    assert [json.loads(x)["step"] for x in (tmp_path / "baseline-seed1" / "metrics.jsonl").open()] == [1, 2, 3, 4]


def test_one_failure_leaves_the_others_and_no_summary(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    runs.fail.add("baseline-seed1")
    assert windtunnel_command(ARMS, (1, 2), Tunnel(tmp_path, steps=4)) == 1
    assert len(runs.started) == 4
    assert not (tmp_path / "summary.json").exists()
    assert "baseline-seed1/console.log" in capsys.readouterr().err


def test_runs_with_other_settings_are_refused_before_any_starts(runs: Runs, tmp_path: Path) -> None:
    assert windtunnel_command(ARMS, (1,), Tunnel(tmp_path, steps=4)) == 0
    with pytest.raises(UserError, match="baseline-seed1 was made with other settings"):
        windtunnel_command(ARMS, (1, 2), Tunnel(tmp_path, steps=6))
    assert len(runs.started) == 2


@pytest.mark.usefixtures("runs")
def test_other_models_under_the_same_path_are_refused(tmp_path: Path) -> None:
    judge = tmp_path / "judge"
    judge.mkdir()
    (judge / "model.safetensors").write_bytes(b"one")
    tunnel = Tunnel(tmp_path / "out", steps=4, genrm=judge)
    assert windtunnel_command(ARMS, (1,), tunnel) == 0
    (judge / "model.safetensors").write_bytes(b"two")
    with pytest.raises(UserError, match="judge changed since its runs were made"):
        windtunnel_command(ARMS, (1,), tunnel)


def test_two_wind_tunnels_do_not_share_a_directory(runs: Runs, tmp_path: Path) -> None:
    with command._alone(tmp_path), pytest.raises(UserError, match="in use by another"):
        windtunnel_command(ARMS, (1,), Tunnel(tmp_path))
    assert runs.started == []


def test_there_are_as_many_prompts_as_a_long_run_draws(runs: Runs, tmp_path: Path) -> None:
    runs.fail |= {"baseline-seed1", "fapo_oracle-seed1"}
    windtunnel_command(ARMS, (1,), Tunnel(tmp_path, steps=150))
    assert len((tmp_path / "data" / "train.jsonl").read_text().splitlines()) == 150 * 16


@pytest.mark.usefixtures("runs")
def test_arms_can_be_added_to_long_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The critic's arms do not rewrite the policies' prompts, which would make their runs look foreign."""
    tunnel = Tunnel(tmp_path, steps=150, critic_steps=1)
    (tmp_path / "critic-base").mkdir()
    (tmp_path / "critic-base" / "model.safetensors.index.json").write_text("{}")
    monkeypatch.setattr(command, "_run_all", _nothing_fails)
    monkeypatch.setattr(command, "read_metrics", lambda _run: [])
    monkeypatch.setattr(command, "read", lambda *_: None)
    monkeypatch.setattr(command, "summarise", lambda _readings: {})
    monkeypatch.setattr(command, "write_report", lambda *_: "")
    assert windtunnel_command(ARMS, (1,), tunnel) == 0
    before = (tmp_path / "data" / "train.jsonl").read_bytes()
    assert windtunnel_command(choose(["critic_outcome"], quick=False), (1,), tunnel) == 0
    assert (tmp_path / "data" / "train.jsonl").read_bytes() == before


async def _nothing_fails(*_: object) -> list[Path]:
    return []
