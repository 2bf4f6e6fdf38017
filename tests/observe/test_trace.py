"""What is recorded of a step, cut at its ends, and summed: on a clock of its own. `conserved` is for real runs too."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_fapo.cli import main
from megatron_fapo.errors import UserError
from megatron_fapo.observe import trace
from megatron_fapo.observe.spans import IDLE, Span
from megatron_fapo.observe.stall import Waits
from megatron_fapo.observe.trace import (
    BETWEEN,
    DRIVER,
    Tracer,
    chrome_trace,
    read_summary,
    step_file,
    summarize,
    wall,
    write_step,
)
from megatron_fapo.observe.where import gap_table, phase_table, read_summaries, unit_table
from megatron_fapo.policy.actor import PolicyActor
from megatron_fapo.processes import Node, Process

FAR = Node("id", "10.0.0.7", 2, name="gpu-07")


def conserved(path: Path) -> dict[str, Any]:
    """The events of a step's trace, once all time of the step is accounted for."""
    summary = read_summary(path)
    assert sum(summary.phases.values()) == pytest.approx(summary.seconds)
    for phase, seconds in summary.phases.items():
        for unit, work in summary.work[phase].items():
            assert sum(work.values()) == pytest.approx(seconds), (phase, unit)
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    threads: dict[tuple[int, int], list[dict[str, Any]]] = {}
    begin, end = summary.began * 1e6 - 1, (summary.began + summary.seconds) * 1e6 + 1
    for event in events:
        if event["ph"] == "X":
            assert begin <= event["ts"] <= event["ts"] + event["dur"] <= end
            threads.setdefault((event["pid"], event["tid"]), []).append(event)
    for spans in threads.values():
        until: list[float] = []
        for span in sorted(spans, key=lambda each: (each["ts"], -each["dur"])):
            while until and until[-1] <= span["ts"]:
                until.pop()
            # A microsecond of rounding; a thread does one thing at a time, or one within another.
            assert not until or span["ts"] + span["dur"] <= until[-1] + 1, span
            until.append(span["ts"] + span["dur"])
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert len(set(names.values())) == len(names)
    for key, name in names.items():
        if name.startswith("policy-") and "GPU" not in name:
            idle_us = sum(span["dur"] for span in threads[key] if span["name"] == IDLE)
            share = sum(work.get(name, {}).get(IDLE, 0.0) for work in summary.work.values()) / summary.seconds
            assert idle_us / 1e6 / summary.seconds == pytest.approx(share, abs=1e-4)
    assert [gap["seconds"] for gap in summary.gaps] == sorted((g["seconds"] for g in summary.gaps), reverse=True)
    return {names[key]: [(s["name"], s["ts"], s["dur"]) for s in spans] for key, spans in threads.items()}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(trace.time, "monotonic", lambda: now[0])
    return now


def process(role: str, rank: int = 0) -> Process:
    return Process(role, rank, FAR)


def colocated(clock: list[float]) -> Tracer:
    """A step of 20 s that a policy rank and an engine share a GPU in; a server has another. Begins and ends at work."""
    tracer = Tracer()
    for role, cards in (("policy", ["0"]), ("rollout", ["0"]), ("genrm", ["1"])):
        tracer.register(process(role), cards, f"http://{role}")
    tracer.count("http://genrm", 1)
    tracer.begin()
    began = clock[0]

    def add(track: str, name: str, begin: float, end: float) -> None:
        tracer.add(track, [Span(name, wall(began + begin), wall(began + end))])

    add(DRIVER, "rollout", 0, 8)
    add(DRIVER, "train", 9, 17)
    clock[0] = began + 1
    tracer.count("rollout-0", 2)
    clock[0] = began + 4
    tracer.count("rollout-0", -1, 100)
    tracer.count("http://genrm", -1)
    clock[0] = began + 7
    tracer.count("rollout-0", -1, 200)
    add("policy-0", "enter", 8, 10)
    add("policy-0", "train", 10, 16)
    add("policy-0", "gradients", 10, 14)
    add("rollout-0", "pull", 16, 25)  # by a clock that is ahead
    clock[0] = began + 20
    return tracer


def test_a_step_is_summed_by_gpu_phase_and_role(clock: list[float], tmp_path: Path) -> None:
    tracer = colocated(clock)
    taken = tracer.take()
    summary = summarize(3, taken, tracer.tracks)
    shared, judge = "GPU 0 of gpu-07", "GPU 1 of gpu-07"
    assert summary.processes == {shared: ["policy-0", "rollout-0"], judge: ["genrm-0"]}
    assert summary.phases == pytest.approx({"rollout": 8, "train": 8, BETWEEN: 4})
    assert summary.work["rollout"][shared] == pytest.approx({IDLE: 2, "generate": 6})
    assert summary.work["train"][shared] == pytest.approx({"switch": 1, "gradients": 4, "train": 2, "refit": 1})
    assert summary.work["rollout"][judge] == pytest.approx({"judge": 4, IDLE: 4})
    idle = {"policy": 12 / 20, "rollout": 10 / 20, "genrm": 16 / 20, "gpu": (2 / 20 + 16 / 20) / 2}
    assert summary.idle_share == pytest.approx(idle)
    assert summary.tokens == {"rollout-0": 300, "genrm-0": 0}
    longest = summary.gaps[0]
    assert (longest["unit"], longest["at"], longest["seconds"]) == (judge, pytest.approx(4), pytest.approx(16))
    assert (longest["phase"], longest["busiest"], longest["does"]) == ("train", shared, "gradients")

    write_step(tmp_path, taken, tracer.tracks, summary)
    threads = conserved(step_file(tmp_path, 3))
    assert set(threads) == {"phases", "policy-0 (GPU 0)", "rollout-0 (GPU 0)", "genrm-0 (GPU 1)", "GPU 0", "GPU 1"}
    assert [name for name, *_ in threads["GPU 0"]][:3] == [IDLE, "generate", IDLE]
    for (_, at, took), (_, then, _) in pairwise(threads["GPU 0"]):
        assert at + took == pytest.approx(then, abs=1), "its segments fill the step"
    assert read_summary(step_file(tmp_path, 3)) == summary
    counts = [e["args"][""] for e in chrome_trace(taken, tracer.tracks) if e["name"] == "in flight at rollout-0"]
    assert counts == [0, 2, 1, 0]

    _, (head, first, second) = unit_table([summary])
    assert head[:2] == ["GPU or process", "idle"]
    assert first[:2] == [f"{shared} (policy-0, rollout-0)", "10.0%"]
    assert first[-1] == "50", "300 tokens in 6 s"
    assert second[1] == "80.0%"
    _, (_, *phases) = phase_table([summary, summary])
    assert phases[0][:4] == ["rollout", "8.000", "40.0%", shared]
    assert phases[-1][1] == "20.000"
    _, (_, gap, *_) = gap_table([summary])
    assert gap == ["3", judge, "4.000", "16.000", "train", f"{shared}: gradients (94% busy)"]


def test_what_crosses_the_end_of_a_step_is_in_both(clock: list[float]) -> None:
    tracer = colocated(clock)
    with tracer.on("rollout-0", "wake"):
        tracer.count("http://genrm", 1)
        clock[0] += 2
        first = tracer.take()
        clock[0] += 3
    tracer.add("policy-0", [Span("train", first.begin, first.begin + 1), Span("save", first.end - 4, first.end + 1)])
    second = tracer.take()
    assert first.spans["rollout-0"][-1] == Span("wake", first.end - 2, first.end)
    assert second.spans["rollout-0"] == [Span("wake", first.end, first.end + 3)]
    assert second.spans["policy-0"] == [Span("save", first.end, first.end + 1)], "what is of a written step is left out"
    assert (second.begin, second.before["genrm-0"]) == (first.end, 1)
    assert summarize(5, second, tracer.tracks).idle_share["genrm"] == 0, "it judged all the time"


def test_a_step_that_does_too_much_is_cut_and_says_so(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trace, "LIMIT", 8)
    tracer = colocated(clock)
    taken = tracer.take()
    assert (taken.dropped, sum(map(len, [*taken.spans.values(), *taken.changes.values()]))) == (2, 8)
    assert tracer.take().before["rollout-0"] == 0, "what is in flight is counted all the same"
    summary = summarize(3, taken, tracer.tracks)
    write_step(tmp_path, taken, tracer.tracks, summary)
    conserved(step_file(tmp_path, 3))
    assert "2 events were too many" in phase_table([summary])[0]


def test_nothing_is_recorded_before_the_beginning() -> None:
    tracer = Tracer()
    with tracer.on("policy-0", "train"):
        tracer.add("policy-0", [Span("train", 0, 1)])
    tracer.begin()
    assert not tracer.take().spans


def test_waits_are_work_of_processes_but_not_of_the_policy(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = Tracer()
    monkeypatch.setattr("megatron_fapo.observe.stall.TRACER", tracer)
    tracer.begin()
    waits, engine = Waits(), process("rollout")
    tracer.register(engine, [])
    with waits.on("rollout", engine, left=["a", "b", "c"]) as wait, waits.on("policy.train", process("policy")):
        clock[0] += 1
        waits.came(wait, "a", 7)
        with waits.on("rollout.pull", engine), waits.on("genrm.verdict", "a GenRM server with room"):
            clock[0] += 1
    clock[0] += 1
    taken = tracer.take()
    assert {track: [s.name for s in spans] for track, spans in taken.spans.items()} == {"rollout-0": ["pull"]}
    assert [(c.by, c.tokens) for c in taken.changes["rollout-0"]] == [(3, 0), (-1, 7), (-2, 0)]
    assert summarize(1, taken, tracer.tracks).work[BETWEEN]["rollout-0"] == pytest.approx(
        {"generate": 1, "refit": 1, IDLE: 1}
    )
    done = [event["name"] for event in chrome_trace(taken, tracer.tracks) if event["ph"] == "X"]
    assert done == ["generate", "pull", IDLE], "without a GPU a process's gaps are on its own thread"


def test_the_command_prints_tables_of_the_steps_asked_for(
    clock: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="trace_every_steps"):
        read_summaries(tmp_path, None)
    tracer = colocated(clock)
    taken = tracer.take()
    for step in (3, 4, 12):
        write_step(tmp_path, taken, tracer.tracks, summarize(step, taken, tracer.tracks))
    assert [s.step for s in read_summaries(tmp_path, "4-20")] == [4, 12]
    assert main(["trace", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "3 steps, 3 to 12" in printed
    assert "GPU 0 of gpu-07 (policy-0, rollout-0)" in printed
    assert main(["trace", str(tmp_path), "--steps", "5-6"]) == 2
    assert "traces of steps 3 to 12" in capsys.readouterr().err
    assert main(["trace", str(tmp_path), "--steps", "x"]) == 2


def test_a_rank_tells_what_it_did_and_writes_its_kernels_of_a_step(tmp_path: Path) -> None:
    actor = PolicyActor(str(tmp_path), 1)
    actor.worker = SimpleNamespace(device="cpu")
    actor._weights = SimpleNamespace(expose=lambda number: torch.ones(2, 2) @ torch.ones(2, 2) * number)
    actor.profile(5)
    told = actor.weights("expose", 3)
    assert told.answer.tolist() == [[6, 6], [6, 6]]
    assert [span.name for span in told.spans] == ["expose", "weights"]
    inner, outer = told.spans
    assert outer.begin <= inner.begin <= inner.end <= outer.end
    assert [span.name for span in actor.profile(None).spans] == ["profile"]
    with gzip.open(tmp_path / "trace" / "policy-1-step-000005.json.gz", "rt") as file:
        assert "aten::mm" in {event["name"] for event in json.load(file)["traceEvents"]}


def test_kernels_that_cannot_be_written_are_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = PolicyActor(str(tmp_path), 1)
    monkeypatch.setattr(trace.logging.getLogger("megatron_fapo"), "propagate", True)
    actor.worker = SimpleNamespace(device="cpu")
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace" / "policy-1-step-000005.json.gz").mkdir()
    actor.profile(5)
    actor.profile(None)
    assert "kernels of step 5 could not be written" in caplog.text
    actor.profile(6)
    actor.profile(None)
    assert (tmp_path / "trace" / "policy-1-step-000006.json.gz").is_file()


def test_a_trace_that_cannot_be_written_is_told_of(
    clock: list[float], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace.logging.getLogger("megatron_fapo"), "propagate", True)
    tracer = colocated(clock)
    taken = tracer.take()
    (tmp_path / "trace").write_text("in the way")
    write_step(tmp_path, taken, tracer.tracks, summarize(3, taken, tracer.tracks))
    assert "trace of step 3 could not be written" in caplog.text
