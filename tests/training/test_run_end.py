"""How a run ends: what is saved, what is said, and when. Its processes are fakes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_fapo.config.root import Config
from megatron_fapo.errors import UserError
from megatron_fapo.policy.batch import TrainSample
from megatron_fapo.processes import Process, ProcessDiedError
from megatron_fapo.training import loop
from megatron_fapo.training.checkpoint import RunState
from megatron_fapo.training.loop import Run
from megatron_fapo.training.rollouts import Rolled
from megatron_fapo.training.signals import StopRequest, StopRequestedError


class FakeProgress:
    def phase(self, name: str) -> None:
        pass


class FakeCursor:
    def take(self, _: int) -> list[Any]:
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}


def make_run(run_dir: Path, **training: Any) -> Run:
    config = Config.model_validate({"run_dir": str(run_dir), "training": training})
    return Run(config, FakeCursor(), RunState(0, 0, {}), FakeProgress(), None)  # type: ignore[arg-type]


def test_a_stop_during_the_logprobs_is_honoured_before_the_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, evaluation={"every_steps": 0}, log_samples_every_steps=0)
    monkeypatch.setattr(loop, "step_metrics", lambda *_: {})
    updated = []

    async def nothing(*_: Any) -> list[Any]:
        return []

    async def rollout(*_: Any) -> Rolled:
        return Rolled([], {}, {}, 0.0)

    async def scenario() -> None:
        stop = StopRequest()

        async def logprobs(*_: Any, **__: Any) -> list[Any]:
            stop._ask(signal.SIGTERM)
            return [(0.0,)]

        async def train(batch: Any) -> dict[str, float]:
            updated.append(batch)
            return {}

        async def while_judged(work: Any) -> Any:
            return await work

        monkeypatch.setattr(loop, "rollout", rollout)
        batches = [[TrainSample((1,), (2,))], [TrainSample((1,), (3,))]]
        monkeypatch.setattr(loop, "mini_batches", lambda *_: batches)
        cluster: Any = SimpleNamespace(
            policy=SimpleNamespace(logprobs=logprobs, train=train),
            while_judged=while_judged,
            refit=nothing,
            enter=nothing,
            serving=True,
        )
        with pytest.raises(StopRequestedError):
            await loop.train(run.config, cluster, run, {}, stop)

    asyncio.run(scenario())
    assert (updated, run.between_steps, run.state.step) == ([], True, 0)


ENGINE = ProcessDiedError(Process("rollout", 3), "its process is gone", lost=True)
RANK = ProcessDiedError(Process("policy", 1), "its process is gone", lost=True)


@pytest.fixture
def end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs run_to_end where training, saving and the end of the processes raise what is given."""

    def run_it(trained: Exception | None, saved: Exception | None = None, torn: Exception | None = None) -> Any:
        said_before_teardown: list[str] = []
        attempts: list[str] = []

        @contextlib.asynccontextmanager
        async def launch(_: Config) -> AsyncIterator[Any]:
            try:
                yield SimpleNamespace(policy=object())
            finally:
                said_before_teardown.extend(path.read_text() for path in tmp_path.glob("failure.json"))
                if torn is not None:
                    raise torn

        async def train(*_: Any) -> None:
            if trained is not None:
                raise trained

        async def save(_: Any) -> None:
            attempts.append("save")
            if saved is not None:
                raise saved

        async def scenario() -> int:
            with StopRequest() as stop:
                if isinstance(trained, StopRequestedError):
                    stop.signal = signal.SIGTERM
                run = make_run(tmp_path)
                monkeypatch.setattr(run, "save", save)
                return await loop.run_to_end(run, {}, None, stop)

        monkeypatch.setattr(loop, "launch", launch)
        monkeypatch.setattr(loop, "train", train)
        try:
            return asyncio.run(scenario())
        finally:
            run_it.said = [json.loads(text) for text in said_before_teardown]  # type: ignore[attr-defined]
            run_it.attempts = attempts  # type: ignore[attr-defined]

    return run_it


@pytest.mark.parametrize(
    ("trained", "saved", "code", "said", "saves"),
    [
        (None, None, 0, [], 0),
        (StopRequestedError(), None, 75, [], 1),
        (StopRequestedError(), RANK, 76, ["policy"], 1),  # nothing was saved, so it is no stop
        (ENGINE, None, 76, ["rollout"], 1),
        (ENGINE, RANK, 76, ["rollout"], 1),  # the policy went with the engine's node; the first is the news
        (RANK, None, 76, ["policy"], 0),
    ],
)
@pytest.mark.parametrize("torn", [None, RuntimeError("actors do not end")])
def test_what_ended_the_run_is_said_before_its_processes_are_ended(
    end: Any,
    trained: Exception | None,
    saved: Exception | None,
    torn: Exception | None,
    code: int,
    said: list[str],
    saves: int,
) -> None:
    if trained is None and torn is not None:
        with pytest.raises(RuntimeError, match="actors do not end"):
            end(None, None, torn)
        return
    assert end(trained, saved, torn) == code
    assert [each["role"] for each in end.said] == said
    assert len(end.attempts) == saves


def test_an_error_of_the_driver_is_raised_as_itself_unless_a_process_ends_while_it_saves(end: Any) -> None:
    with pytest.raises(KeyError, match="x"):
        end(KeyError("x"), None, RuntimeError("actors do not end"))
    assert [each["what"] for each in end.said] == ["KeyError: 'x'"]
    assert end(KeyError("x"), RANK) == 76
    assert [each["role"] for each in end.said] == ["policy"]


def test_bad_input_is_left_to_the_command_line(end: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        end(UserError("mend it"))
    assert not (tmp_path / "failure.json").exists()
