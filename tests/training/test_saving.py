"""When a run saves, and what it hears of it. The policy is a fake that finishes its saves when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_fapo.checksums import FileSum, sum_file
from megatron_fapo.config.root import Config
from megatron_fapo.errors import CheckpointError
from megatron_fapo.processes import Process, ProcessDiedError
from megatron_fapo.training import loop
from megatron_fapo.training.checkpoint import RunState
from megatron_fapo.training.loop import Run
from megatron_fapo.training.signals import StopRequest, StopRequestedError
from tests.training.test_run_end import make_run


class FakePolicy:
    """Writes at once; `saved` is what it says of it, and when."""

    def __init__(self) -> None:
        self.written, self.failure = asyncio.Event(), None
        self.saves: list[str] = []
        self._directory = Path()

    async def save(self, directory: Path) -> None:
        assert not self.saves or self.written.is_set(), "one save at a time"
        self.written.clear()
        self.saves.append(directory.parent.name)
        self._directory = directory
        directory.mkdir()
        (directory / "ranks").write_text(str(directory))

    async def saved(self) -> dict[str, FileSum]:
        await self.written.wait()
        if self.failure is not None:
            raise self.failure
        return {"ranks": sum_file(self._directory / "ranks")}


class FakeCluster:
    def __init__(self) -> None:
        self.policy: Any = FakePolicy()

    async def enter(self, phase: str) -> None:
        assert phase == "checkpoint"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(loop, "require_space", lambda *_: None)
    monkeypatch.setattr(loop, "read_model_shape", lambda *_: Config)
    monkeypatch.setattr(Config, "parameters", 1, raising=False)
    return make_run(tmp_path)


def _complete(run: Run) -> list[int]:
    return [int(path.name[5:]) for path in run.checkpoints.complete()]


async def _turns() -> None:
    """Let other tasks come as far as they can."""
    for _ in range(50):
        await asyncio.sleep(0.002)


def test_training_goes_on_and_what_is_saved_is_the_state_of_then(run: Run) -> None:
    async def scenario() -> None:
        cluster: Any = FakeCluster()
        run.state = RunState(1, 1, {"at": 1})
        await run.save(cluster)
        run.state = RunState(2, 2, {"at": 2})
        await _turns()
        await run.saved(wait=False)
        assert _complete(run) == []
        cluster.policy.written.set()
        await _turns()
        assert _complete(run) == [1], "it is finished as soon as it is written, with no one waiting for it"
        assert run.checkpoints.newest()[1] == RunState(1, 1, {"at": 1})
        assert (run.checkpoints.newest()[0] / "config.yaml").is_file()
        await run.saved(wait=False)
        assert run.saved_step == 1

        await run.save(cluster)
        run.state = RunState(3, 3, {})
        third = asyncio.create_task(run.save(cluster))
        await _turns()
        assert cluster.policy.saves == ["step_000001.partial", "step_000002.partial"], "it waits for the one before"
        cluster.policy.written.set()
        await third
        assert _complete(run) == [1, 2]
        cluster.policy.written.set()
        await run.saved()
        await run.save(cluster)
        assert _complete(run) == [2, 3]
        assert len(cluster.policy.saves) == 3, "what is saved is not saved again"

    asyncio.run(scenario())


@pytest.mark.usefixtures("run")
def test_without_asynchronous_saves_it_waits(tmp_path: Path) -> None:
    sync = make_run(tmp_path, checkpoint={"asynchronous": False})

    async def scenario() -> None:
        cluster: Any = FakeCluster()
        saving = asyncio.create_task(sync.save(cluster))
        await _turns()
        assert not saving.done()
        cluster.policy.written.set()
        await saving
        assert _complete(sync) == [0]

    asyncio.run(scenario())


def test_a_failure_in_the_background_reaches_the_run_and_harms_nothing(run: Run) -> None:
    async def scenario() -> None:
        cluster: Any = FakeCluster()
        await run.save(cluster)
        cluster.policy.written.set()
        await run.saved()
        run.state = RunState(1, 1, {})
        await run.save(cluster)
        cluster.policy.failure = OSError("the disk is full")
        cluster.policy.written.set()
        await _turns()
        run.state = RunState(2, 2, {})
        with pytest.raises(
            CheckpointError, match=r"step 1 could not be written: the disk is full.*--resume from step 0"
        ):
            await run.saved(wait=False)
        assert _complete(run) == [0]
        assert run.checkpoints.newest()[1].step == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("between_steps", [True, False])
@pytest.mark.parametrize(
    ("error", "code", "complete"),
    [
        (StopRequestedError(), 75, [1, 2]),
        (ProcessDiedError(Process("rollout", 0), "is gone", lost=True), 76, [1, 2]),
        (ProcessDiedError(Process("policy", 0), "is gone", lost=True), 76, []),
    ],
)
def test_a_run_that_ends_finishes_the_save_under_way(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: int,
    complete: list[int],
    between_steps: bool,
) -> None:
    """Also in the middle of an update, when there is no state to save any more: the copy was made before."""
    cluster: Any = FakeCluster()

    @contextlib.asynccontextmanager
    async def launch(_: Config) -> AsyncIterator[Any]:
        yield cluster

    async def train(*_: Any) -> None:
        run.state = RunState(1, 1, {})
        await run.save(cluster)
        run.state, run.between_steps = replace(run.state, step=2), between_steps
        if complete:
            asyncio.get_running_loop().call_later(0.05, cluster.policy.written.set)
            asyncio.get_running_loop().call_later(0.3, cluster.policy.written.set)
        raise error

    async def scenario() -> int:
        with StopRequest() as stop:
            return await loop.run_to_end(run, {}, None, stop)

    monkeypatch.setattr(loop, "launch", launch)
    monkeypatch.setattr(loop, "train", train)
    assert asyncio.run(scenario()) == code
    assert _complete(run) == ([step for step in complete if step == 1 or between_steps])
