"""What the scripts of benchmarks/gpu ask of a run's records: each fault is named, and a sound run has none."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import runs

STEPS = 20


def moments(resident_mib: list[float]) -> list[dict]:
    held = {"files": 40, "threads": 12}
    return [
        {"step": step, "at": float(step), "processes": {"ray::PolicyActor (7)": held | {"resident_mib": size}}}
        for step, size in enumerate(resident_mib, 1)
    ]


def record(step: int, **more: float) -> dict[str, float]:
    return {"step": step, "mismatch/token_mult_prob_error": 1.002} | {k.replace("__", "/"): v for k, v in more.items()}


def test_noise_a_warm_up_and_a_single_jump_are_no_growth() -> None:
    noise = random.Random(0)
    sizes = [500.0 + 300 * min(step, 5) + noise.uniform(-60, 60) + (1500 if step == 19 else 0) for step in range(STEPS)]
    found = runs.growth(moments(sizes), [record(step, memory__train__card_gib=40.0) for step in range(1, STEPS + 1)])
    assert set(found) == {f"ray::PolicyActor (7) {kind}" for kind in ("resident_mib", "files", "threads")} | {
        "memory/train/card_gib"
    }
    assert runs.growth_faults(found) == []


@pytest.mark.parametrize(
    ("sizes", "records", "named"),
    [
        ([500.0 + 12 * step for step in range(STEPS)], [], "(7) resident_mib has grown by 168"),
        ([500.0] * STEPS, [record(s, memory__judge__card_gib=40 + s / 50) for s in range(1, 21)], "judge/card_gib"),
        # A little of what never changes is a leak, however small.
        ([500.0] * STEPS, [record(s, memory__refit__pinned_gib=6 + s / 9e3) for s in range(1, 21)], "pinned_gib has"),
    ],
)
def test_growth_is_named(sizes: list[float], records: list[dict[str, float]], named: str) -> None:
    (fault,) = runs.growth_faults(runs.growth(moments(sizes), records))
    assert named in fault


def test_a_process_that_could_not_be_read_at_times_is_watched_all_the_same() -> None:
    seen = moments([500.0 + 12 * step for step in range(STEPS)])
    seen[9]["processes"] = {}
    (fault,) = runs.growth_faults(runs.growth(seen, []))
    assert "resident_mib has grown by 168" in fault


def test_growth_needs_settled_steps() -> None:
    with pytest.raises(ValueError, match="run more steps"):
        runs.growth(moments([500.0] * 9), [])
    assert runs.grown(moments([500.0] * 9), [])[0] == {}
    assert "run more steps" in runs.grown(moments([500.0] * 9), [])[1][0]
    assert "has grown" in runs.grown(moments([500.0 + 12 * step for step in range(STEPS)]), [])[1][0]


@pytest.mark.parametrize(
    ("records", "faults"),
    [
        ([record(1), record(2), record(3)], []),
        ([record(1), record(3)], ["has the steps [1, 3]"]),
        ([record(1), record(2), record(2), record(3)], ["[1, 2, 2, 3]"]),
        ([record(1), record(2) | {"mismatch/token_mult_prob_error": 1.0101}, record(3)], ["step 2: mismatch/"]),
        ([record(1), record(2) | {"mismatch/token_mult_prob_error": float("nan")}, record(3)], ["is nan"]),
        ([record(1), {"step": 2}, record(3)], ["is missing"]),
    ],
)
def test_steps_and_mismatch(records: list[dict[str, float]], faults: list[str]) -> None:
    found = runs.step_faults(records, 3, mismatch=1.01)
    assert len(found) == len(faults)
    assert all(part in fault for part, fault in zip(faults, found, strict=True))


def test_what_a_phase_does_not_need_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "policy-0.log").write_text("WARNING memory leak on entering train: 9 bytes more\nINFO fine\n")
    records = [record(1, memory__judge__optimizer_gib=0.5, memory__train__optimizer_gib=0.5)]
    leak, held = runs.ledger_faults(records, tmp_path)
    assert "memory leak" in leak
    assert held == "step 1: optimizer on the device in judge"


def test_reports_and_traces_that_are_missing(tmp_path: Path) -> None:
    assert "report.html" in runs.file_faults(tmp_path, [1, 2])[0]
    (tmp_path / "report.html").touch()
    assert runs.file_faults(tmp_path, [1, 2]) == []
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace" / "step-000001.json.gz").touch()
    (fault,) = runs.file_faults(tmp_path, [1, 2])
    assert fault.endswith("lacks the steps [2]")


def test_a_command_is_watched_step_by_step_and_stopped_at_its_limit(tmp_path: Path) -> None:
    code = (
        "import json, signal, socket, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "kept = [socket.socket() for _ in range(9)]\n"
        "for step in range(1, 100):\n"
        f"    print(json.dumps({{'step': step}}), file=open('{tmp_path}/metrics.jsonl', 'a'), flush=True)\n"
        "    time.sleep(0.5)\n"
    )
    found = runs.attempt(tmp_path, tmp_path / "log", [sys.executable, "-c", code], limit_s=1.5)
    assert found["code"] == 75
    assert [moment["step"] for moment in found["moments"]][:2] == [1, 2]
    assert found["moments"][0]["processes"].keys() == found["moments"][1]["processes"].keys()
    (held,) = found["moments"][1]["processes"].values()
    assert held["resident_mib"] > 1
    assert (held["threads"], held["sockets"]) == (1, 9)
    assert 3 <= held["files"] <= 4
