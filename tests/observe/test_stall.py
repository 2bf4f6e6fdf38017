"""Whoever is waited for too long is named: the table with a clock of its own, then real processes that are stopped."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_fapo.config.observe import ObserveConfig
from megatron_fapo.data.datasets import write_testbed
from megatron_fapo.data.tokenizer import init_tiny_model
from megatron_fapo.observe import stall
from megatron_fapo.observe.metrics import read_metrics
from megatron_fapo.observe.stall import Alarm, StalledError, StallWatch, Waits, state_of
from megatron_fapo.processes import Node, Process
from tests.training.runs import FapoProcess, write_config

FAR = Node("id", "10.0.0.7", 2, name="gpu-07")
NEAR = Node("id", "127.0.0.1", 0, name=socket.gethostname())


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_line_says_what_is_waited_for_since_when_and_for_whom():
    clock = Clock()
    waits = Waits(clock)
    engine = Process("rollout", 1, FAR, Path("logs/rollout-1.log"), 123)
    with waits.on("rollout", engine, left=["a", "b", "c"]) as rollout:
        clock.now += 10
        with waits.on("genrm.verdict", "http://judge/v1") as verdict, waits.on("genrm.verdict", "http://judge/v1"):
            verdict.detail = "sample 7, attempt 2"
            rollout.left.pop("a")
            waits.progress()
            clock.now += 5
            assert waits.idle_s() == 5
            assert waits.lines() == [
                "rollout: rollout-1 on node gpu-07 (10.0.0.7, pid 123), for 15 s, 2 of 3 outstanding, the oldest b, "
                "log logs/rollout-1.log",
                "genrm.verdict: http://judge/v1, 2 waits, the oldest for 5 s, sample 7, attempt 2",
            ]
            waits.processes["http://judge/v1"] = Process("genrm", 0, FAR, Path("logs/genrm-0.log"))
            assert waits.lines()[1] == (
                "genrm.verdict: genrm-0 on node gpu-07 (10.0.0.7) at http://judge/v1, 2 waits, the oldest for 5 s, "
                "sample 7, attempt 2, log logs/genrm-0.log"
            )
        assert waits.idle_s() == 0, "an end is progress"
    assert waits.lines() == ["nobody: the driver's own code has gone on without awaiting anything"]


def test_a_wait_that_fails_or_is_cancelled_leaves_the_table():
    waits = Waits()
    with pytest.raises(ZeroDivisionError), waits.on("a", "b"):
        raise ZeroDivisionError
    assert waits.groups() == []


def test_long_tables_are_cut():
    waits = Waits(Clock())
    with contextlib.ExitStack() as stack:
        for i in range(25):
            stack.enter_context(waits.on("policy.train", Process("policy", i, FAR)))
        assert len(waits.lines()) == 21
        assert waits.lines()[-1] == "and 5 more"


def test_the_alarm_rings_once_per_doubling_and_anew_after_progress():
    alarm = Alarm(300)
    rings = [idle for idle in range(0, 3000, 5) if alarm.due(idle)]
    assert rings == [300, 600, 1200, 2400]
    assert alarm.ringing
    assert not alarm.due(1)
    assert not alarm.ringing
    assert alarm.due(1000)
    assert not alarm.due(1199)
    assert alarm.due(1200)


@pytest.fixture
def stopped():
    """A process that lives and does nothing, since it is stopped."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    os.kill(child.pid, signal.SIGSTOP)
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(") ")[2][0] != "T":
        time.sleep(0.01)
    yield child
    child.kill()
    child.wait()


def test_a_process_that_is_stopped_or_gone_is_the_first_to_be_named(stopped):
    clock = Clock()
    waits = Waits(clock)
    alive, culprit = Process("policy", 0, NEAR, None, os.getpid()), Process("policy", 1, NEAR, None, stopped.pid)
    with waits.on("policy.train", alive), waits.on("policy.train", culprit):
        assert waits.lines()[0].startswith("policy.train: policy-1")
        assert waits.lines()[0].endswith("its process is stopped")
    assert state_of(alive) == ""
    assert state_of(Process("policy", 1, FAR, None, stopped.pid)) == "", "a pid of another machine says nothing here"
    stopped.kill()
    deadline = time.monotonic() + 10
    while state_of(culprit) != "its process has ended" and time.monotonic() < deadline:
        time.sleep(0.01)
    stopped.wait()
    assert state_of(culprit) == "its process is gone"


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("megatron_fapo"), "propagate", True)
    caplog.set_level("WARNING")
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_wait_that_never_ends_is_warned_of_written_and_ends_the_run(tmp_path, stopped, said):
    waits, cleaned = Waits(), []
    culprit = Process("rollout", 0, NEAR, tmp_path / "rollout-0.log", stopped.pid)

    async def never() -> None:
        try:
            with waits.on("rollout", culprit):
                await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.15)  # as processes take their time to end
            cleaned.append(True)

    async def main() -> None:
        config = ObserveConfig(stall_warning_s=0.2, stall_abort_s=0.7)
        async with StallWatch(config, tmp_path, waits) as watch:
            assert await watch.race(asyncio.sleep(0, result=7)) == 7
            await watch.race(never())

    (tmp_path / "stall.json").write_text("of an earlier attempt")
    with pytest.raises(StalledError) as error:
        asyncio.run(main())
    assert cleaned == [True]
    assert "the run goes on" not in said()
    assert (error.value.process, error.value.lost) == (culprit, True)
    assert re.search(r"has not answered, and .* for \d+ s \(its process is stopped\)", str(error.value))
    assert 1 <= len(said()) <= 2  # at 0.2 and 0.4 s, if the machine has time for both
    assert f"rollout: rollout-0 on node {NEAR.name} (127.0.0.1, pid {stopped.pid}), for " in said()[0]
    written = json.loads((tmp_path / "stall.json").read_text())
    assert written["waits"][0].endswith(f"its process is stopped, log {tmp_path / 'rollout-0.log'}")
    assert waits.stalls == len(said())
    stacks = (tmp_path / "logs" / "driver-stacks.log").read_text()
    assert "Current thread" in stacks
    assert "never" in stacks
    assert "Event.wait" in stacks, "the task is followed down to what it awaits"


def test_when_it_goes_on_it_says_so_and_the_file_is_gone(tmp_path, said):
    waits = Waits()

    async def main() -> None:
        async with StallWatch(ObserveConfig(stall_warning_s=0.2), tmp_path, waits):
            while not (tmp_path / "stall.json").exists():  # noqa: ASYNC110 (a file tells nobody that it is there)
                await asyncio.sleep(0.01)
            while (tmp_path / "stall.json").exists():
                waits.progress()
                await asyncio.sleep(0.01)

    asyncio.run(main())
    assert "nobody" in said()[0]
    assert said()[-1] == "the run goes on"


def test_a_disk_that_is_full_or_hangs_does_not_end_the_watch(tmp_path, said, monkeypatch):
    hangs = threading.Event()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    async def main() -> None:
        async with StallWatch(ObserveConfig(stall_warning_s=0.1, stall_abort_s=0.5), tmp_path, Waits()) as watch:
            await watch.race(asyncio.Event().wait())

    monkeypatch.setattr(stall, "write_atomically", full)
    with pytest.raises(StalledError):
        asyncio.run(asyncio.wait_for(main(), 10))
    assert len([text for text in said() if "No space left" in text]) == 1
    monkeypatch.setattr(stall, "WRITE_S", 0.1)
    monkeypatch.setattr(stall, "write_atomically", lambda *_: hangs.wait(2))
    with pytest.raises(StalledError):
        asyncio.run(asyncio.wait_for(main(), 10))
    hangs.set()


def test_stacks_are_written_on_demand_and_when_the_event_loop_hangs(tmp_path):
    file = tmp_path / "logs" / "driver-stacks.log"

    def blocks() -> None:
        time.sleep(0.8)

    async def sleeper() -> None:
        await asyncio.sleep(30)

    async def main() -> None:
        async with StallWatch(ObserveConfig(stall_warning_s=0.4), tmp_path, Waits()):
            task = asyncio.create_task(sleeper(), name="the sleeper")
            await asyncio.sleep(0.05)
            os.kill(os.getpid(), signal.SIGUSR2)
            await asyncio.sleep(0.05)
            assert "the sleeper:" in file.read_text()
            assert "in main" in file.read_text() or "Current thread" in file.read_text()
            assert "in blocks" not in file.read_text()
            blocks()
            assert "in blocks" in file.read_text()
            task.cancel()

    asyncio.run(main())


@pytest.mark.timeout(900)
def test_a_stopped_engine_of_a_real_run_is_named_and_all_steps_are_saved(tmp_path):
    write_testbed(tmp_path / "data", 64, 8, seed=0)
    init_tiny_model(tmp_path / "model", seed=0)
    values = {
        "run_dir": str(tmp_path / "run"),
        "device": "cpu",
        "data": {"train": [str(tmp_path / "data" / "train.jsonl")], "max_prompt_tokens": 160},
        "policy": {"model_path": str(tmp_path / "model"), "parallel": {"tensor": 1}},
        "rollout": {"samples_per_prompt": 4, "max_response_tokens": 24, "cpu_kv_cache_gb": 0.05},
        "genrm": {"enabled": False},
        "reward": {"overlong": {"enabled": False}, "verifier_processes": 1},
        "training": {"steps": 500, "prompts_per_step": 4, "evaluation": {"every_steps": 0}},
        "observe": {"tensorboard": False, "stall_warning_s": 45, "stall_abort_s": 90},  # longer than a start
    }
    config = str(
        write_config(tmp_path / "run.yaml", values | {"training": values["training"] | {"prompts_per_mini_batch": 4}})
    )
    run_dir = tmp_path / "run"
    process = FapoProcess(tmp_path / "output.log", "train", "-c", config)
    try:
        process.wait_for_step(run_dir, 1)
        pid = process.pids("ray::RolloutEngine")[-1]
        os.kill(pid, signal.SIGSTOP)
        assert process.wait(300) == 76, process.output()[-4000:]
        assert process.wait_until_gone() == []
    finally:
        process.kill_all()
    found = json.loads((run_dir / "failure.json").read_text())
    assert (found["role"], found["rank"]) == ("rollout", 0)
    assert "its process is stopped" in found["what"]
    (first, *_) = json.loads((run_dir / "stall.json").read_text())["waits"]
    assert f"rollout-0 on node {socket.gethostname()}" in first
    assert f"pid {pid})" in first
    assert "its process is stopped" in first
    assert first.endswith("logs/rollout-0.log")
    assert (run_dir / "checkpoints" / f"step_{found['step']:06d}").exists(), "all finished steps were saved"
    assert all(record["observe/stalls"] >= 0 for record in read_metrics(run_dir))
