"""Rollouts that run ahead: which may have begun, who waits for whom, and what becomes of one that fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_fapo.config.load import ConfigError, load_config
from megatron_fapo.training import loop
from megatron_fapo.training.ahead import Ahead, begun_by
from megatron_fapo.training.checkpoint import RunState
from megatron_fapo.training.loop import Run
from megatron_fapo.training.rollouts import Rolled
from megatron_fapo.training.signals import StopRequest, StopRequestedError

ASYNC = ["algorithm.tis_cap=2.0", "genrm.enabled=false", "rollout.colocated=false", "policy.offload=false"]


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 5])
@pytest.mark.parametrize("finished", [0, 3])
def test_every_step_begins_once_in_order_and_no_earlier_than_its_staleness_allows(
    max_staleness: int, finished: int
) -> None:
    begun, last, order = finished, 9, []
    for step in range(finished + 1, last + 1):
        for each in begun_by(step, begun, max_staleness, last):
            served = step - 1
            assert served >= each - 1 - max_staleness
            order.append(each)
            begun = each
        assert begun == min(step + max_staleness, last), "as early as it is allowed"
    assert order == list(range(finished + 1, last + 1))


class Rollouts:
    """Rollouts of steps whose generation and scoring end when a test says so."""

    def __init__(self, max_staleness: int) -> None:
        self.ahead = Ahead(self.start, 0, 9, max_staleness)
        self.events: list[str] = []
        self.generated = {step: asyncio.Event() for step in range(1, 10)}
        self.scored = {step: asyncio.Event() for step in range(1, 10)}
        self.failures: dict[int, Exception] = {}

    async def start(self, step: int) -> int:
        self.events.append(f"begin {step}")
        try:
            await self.generated[step].wait()
            if step in self.failures:
                raise self.failures[step]
            self.ahead.generated(step)
            await self.scored[step].wait()
            return step
        except asyncio.CancelledError:
            self.events.append(f"cancel {step}")
            raise


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 5))  # type: ignore[arg-type]


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_what_runs_at_the_end_is_cancelled() -> None:
    async def scenario() -> None:
        rollouts = Rollouts(1)
        async with rollouts.ahead as ahead:
            ahead.begin(1)
            await turns()
        assert rollouts.events == ["begin 1", "begin 2", "cancel 1", "cancel 2"]

    run(scenario)


def test_engines_are_idle_when_all_is_generated_and_groups_are_there_when_all_is_scored() -> None:
    async def scenario() -> None:
        rollouts = Rollouts(1)
        async with rollouts.ahead as ahead:
            ahead.begin(1)
            idle, groups = asyncio.create_task(ahead.idle()), asyncio.create_task(ahead.groups(1))
            rollouts.generated[1].set()
            rollouts.scored[1].set()
            assert await groups == 1
            assert ahead.generating
            assert not idle.done()
            rollouts.generated[2].set()
            await idle
            assert not ahead.generating
            ahead.begin(2)
            assert ahead.generating, "step 3 has begun"

    run(scenario)


@pytest.mark.parametrize("where", ["groups", "idle", "check"])
def test_the_failure_of_a_rollout_ahead_is_heard_before_its_step(where: str) -> None:
    async def scenario() -> None:
        rollouts = Rollouts(2)
        rollouts.failures[3] = RuntimeError("the engine is gone")
        async with rollouts.ahead as ahead:
            ahead.begin(1)
            waiting = None if where == "check" else asyncio.create_task(getattr(ahead, where)(*[1] * (where[0] == "g")))
            await turns()
            rollouts.generated[3].set()
            await turns()
            with pytest.raises(RuntimeError, match="the engine is gone"):
                ahead.check() if waiting is None else await waiting

    run(scenario)


class Cursor:
    def __init__(self) -> None:
        self.taken = 0

    def take(self, count: int) -> list[Any]:
        self.taken += count
        return list(range(self.taken - count, self.taken))

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}


class Training:
    """`train` with fakes of all that computes: rollouts take until an event, and everything says what it does."""

    def __init__(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch, max_staleness: int, in_flight: bool = False):
        overrides = [f"run_dir={run_dir}", "training.steps=4", "training.prompts_per_step=2", *ASYNC]
        overrides += ["training.prompts_per_mini_batch=2", "training.log_samples_every_steps=0"]
        overrides += [f"training.asynchrony.max_staleness={max_staleness}", f"weight_sync.in_flight={in_flight}"]
        overrides += ["training.checkpoint.every_steps=2", "data.train=[x]", "policy.model_path=x"]
        self.config = load_config([], overrides, "train").config
        self.events: list[str] = []
        self.slow: dict[int, asyncio.Event] = {}
        """Steps whose samples are not generated before the event."""
        self.failing: dict[int, Exception] = {}
        self.states: list[RunState] = []
        self.stop: StopRequest | None = None
        writer: Any = SimpleNamespace(write=lambda *_: None)
        progress: Any = SimpleNamespace(phase=lambda _: None, step=lambda _: None)
        self.run = Run(self.config, Cursor(), RunState(0, 0, {"taken": 0}), progress, writer)  # type: ignore[arg-type]
        monkeypatch.setattr(self.run, "save", self.save)
        monkeypatch.setattr(loop, "step_metrics", lambda *_: {})
        monkeypatch.setattr(loop, "rollout", self.rollout)
        monkeypatch.setattr(loop, "update", self.update)

    async def rollout(self, *arguments: Any) -> Rolled:
        ahead, step, taken, cursor = arguments[-4:]
        self.events.append(f"begin {step}: {taken} on {self.version}")
        if step in self.slow:
            await self.slow[step].wait()
        if step in self.failing:
            raise self.failing[step]
        self.events.append(f"generated {step}")
        ahead.generated(step)
        return Rolled([], cursor, {}, 0.0)

    async def update(self, *arguments: Any) -> dict[str, float]:
        run, _, check = arguments[-3:]
        check()
        self.events.append(f"update {run.state.step + 1}")
        self.after_updates(run.state.step + 1)
        await turns()
        return {}

    def after_updates(self, step: int) -> None:
        """For tests to replace."""

    async def refit(self, version: int) -> dict[str, float]:
        self.version = version
        self.events.append(f"refit {version}")
        if version + 1 in self.slow:
            self.slow[version + 1].set()
        return {}

    async def save(self, _: Any) -> None:
        self.states.append(self.run.state)

    def __call__(self) -> list[str]:
        async def while_judged(work: Any) -> Any:
            return await work

        cluster: Any = SimpleNamespace(
            policy=object(),
            refit=self.refit,
            while_judged=while_judged,
            serving=True,
            require_servers=lambda: None,
            take_memory=dict,
        )

        async def main() -> None:
            await loop.train(self.config, cluster, self.run, {}, self.stop or StopRequest())

        run(main)
        return self.events


def test_steps_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path, monkeypatch, 0)
    taken = [[2 * i, 2 * i + 1] for i in range(4)]
    expected = ["refit 0"]
    for step in (1, 2, 3, 4):
        expected += [f"begin {step}: {taken[step - 1]} on {step - 1}", f"generated {step}"]
        expected += [f"update {step}", f"refit {step}"]
    assert training() == expected
    assert [state.cursor for state in training.states] == [{"taken": 4}, {"taken": 8}]


def test_one_step_off_a_refit_waits_for_idle_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path, monkeypatch, 1)
    training.slow = {step: asyncio.Event() for step in (2, 3, 4)}  # until well after the updates of the step before

    def after_updates(step: int) -> None:
        if step + 1 in training.slow:
            asyncio.get_running_loop().call_later(0.02, training.slow[step + 1].set)

    monkeypatch.setattr(training, "after_updates", after_updates)
    events = training()
    for step in (2, 3, 4):
        begun = next(event for event in events if event.startswith(f"begin {step}"))
        assert begun == f"begin {step}: {[2 * step - 2, 2 * step - 1]} on {step - 2}"
        assert events.index(begun) < events.index(f"update {step - 1}")
        assert events.index(f"generated {step}") < events.index(f"refit {step - 1}")
    assert [state.cursor for state in training.states] == [{"taken": 4}, {"taken": 8}], "prompts of later steps again"


def test_a_slow_rollout_crosses_a_refit_in_flight_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path, monkeypatch, 1, in_flight=True)
    training.slow = {2: asyncio.Event(), 3: asyncio.Event()}  # until the refit after the step before theirs
    events = training()
    assert events.index("refit 1") < events.index("generated 2") < events.index("update 2")
    assert events.index("refit 2") < events.index("generated 3")
    assert len([event for event in events if event.startswith("begin")]) == 4


def test_a_slow_filesystem_holds_up_no_rollout_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path, monkeypatch, 1)
    written = training.config.training.model_copy(update={"log_samples_every_steps": 3})
    training.config = training.config.model_copy(update={"training": written})
    training.slow[4] = asyncio.Event()
    loops, ended = list[asyncio.AbstractEventLoop](), list[bool]()

    def write(*_: Any) -> None:
        loops[-1].call_soon_threadsafe(training.slow[4].set)
        deadline = time.monotonic() + 2
        while "generated 4" not in training.events and time.monotonic() < deadline:
            time.sleep(0.01)
        ended.append("generated 4" in training.events)

    monkeypatch.setattr(training, "after_updates", lambda _: loops.append(asyncio.get_running_loop()))
    monkeypatch.setattr(loop, "write_samples", write)
    training()
    assert ended == [True]


@pytest.mark.parametrize("during", ["logprobs", "updates"])
@pytest.mark.parametrize("in_flight", [False, True])
def test_a_rollout_that_fails_ahead_ends_the_run_at_the_next_safe_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str, in_flight: bool
) -> None:
    training = Training(tmp_path, monkeypatch, 1, in_flight)
    training.slow[3] = asyncio.Event()
    training.failing[3] = RuntimeError("gone")

    async def update(*arguments: Any) -> dict[str, float]:
        run, _, check = arguments[-3:]
        if run.state.step == 1:
            training.slow[3].set()
            await turns()
        check()
        return {}

    monkeypatch.setattr(loop, "update", update if during == "logprobs" else training.update)
    if during == "updates":
        monkeypatch.setattr(training, "after_updates", lambda step: step == 2 and training.slow[3].set())
    with pytest.raises(RuntimeError, match="gone"):
        training()
    finished = 2 if during == "updates" else 1
    assert training.run.state == RunState(finished, finished, {"taken": 2 * finished})
    assert "refit 2" not in training.events


def test_a_stop_is_heard_while_a_refit_waits_for_slow_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path, monkeypatch, 1)
    training.slow = {2: asyncio.Event()}
    training.stop = StopRequest()
    inner = training.update

    async def update(*args: Any) -> dict[str, float]:
        result = await inner(*args)
        training.stop._event.set()  # type: ignore[union-attr]
        return result

    monkeypatch.setattr(loop, "update", update)
    with pytest.raises(StopRequestedError):
        training()
    assert training.events[-1] == "update 1"
    assert training.run.state == RunState(1, 1, {"taken": 2}), "the finished step can be saved"


def test_a_resumed_run_generates_again_what_was_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Training(tmp_path, monkeypatch, 2)
    begun = [event.partition(" on ")[0] for event in whole() if event.startswith("begin")]
    resumed = Training(tmp_path, monkeypatch, 2)
    resumed.run.state = whole.states[0]
    resumed.run.cursor.taken = whole.states[0].cursor["taken"]  # type: ignore[attr-defined]
    again = [event for event in resumed() if event.startswith("begin")]
    assert [event.partition(" on ")[0] for event in again] == begun[2:], "the same prompts for the same steps"
    assert {event.partition(" on ")[2] for event in again} == {"2"}


def test_staleness_is_refused_where_it_cannot_work() -> None:
    bare = ["data.train=[x]", "policy.model_path=x", "training.asynchrony.max_staleness=1"]
    load_config([], [*bare, *ASYNC, "gpu_share=0.3"], "train")
    shared = ["rollout.colocated=true", "policy.offload=true", "genrm.enabled=false"]
    with pytest.raises(ConfigError) as refused:
        load_config([], [*bare, *shared], "train")
    for said in ("set tis_cap, such as 2.0", "engines generate while the policy is updated"):
        assert said in str(refused.value), "all at once"
    judges = ["genrm.colocated=true", "genrm.model_path=x", "genrm.servers=1", "algorithm.tis_cap=2.0"]
    with pytest.raises(ConfigError, match="cannot take turns"):
        load_config([], [*bare, *judges], "train")
