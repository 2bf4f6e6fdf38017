"""The verifier's processes: a hang, a crash or an error costs one worker at most and one sample, never the run."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import pytest

from megatron_fapo.config.reward import RewardConfig
from megatron_fapo.errors import UserError
from megatron_fapo.genrm.rules import RuleResult
from megatron_fapo.genrm.user_function import read_score
from megatron_fapo.genrm.verdict import Reason, Unscored
from megatron_fapo.genrm.verifier import Verifier
from tests.genrm.samples import make_sample

HOSTILE = """
import asyncio, os, subprocess, sys, time

def compute_score(data_source, solution_str, ground_truth, extra_info, bonus=0.0):
    print("printing is allowed", input.__name__)
    if solution_str == "hang":
        while True: pass
    if solution_str == "hang in a child":
        child = subprocess.Popen(["sleep", "1234.5"])
        open(__file__ + ".pid", "w").write(str(child.pid))
        child.wait()
    if solution_str == "exit":
        os._exit(3)
    if solution_str == "sys.exit":
        sys.exit(4)
    if solution_str == "raise":
        raise KeyError("missing")
    if solution_str == "nan":
        return float("nan")
    if solution_str == "text":
        return "good"
    if solution_str == "no score":
        return {"acc": True}
    if solution_str == "pid":
        return {"score": 1, "pid": os.getpid(), "heavy": sorted({"torch", "vllm"} & set(sys.modules))}
    right = solution_str == ground_truth
    return {"score": (1.0 if right else -1.0) + bonus, "acc": right, "pred": solution_str, "source": data_source,
            "split": extra_info["split"], "odd": {1, }}

async def slow_async(data_source, solution_str, ground_truth, extra_info):
    if solution_str == "raise":
        raise KeyError("missing")
    await asyncio.sleep(60 if solution_str == "hang" else 0.01)
    return 0.5

not_callable = 3
def wrong_signature(solution): return 1.0
"""


@pytest.fixture
def hostile(tmp_path: Path) -> str:
    path = tmp_path / "hostile.py"
    path.write_text(HOSTILE)
    return str(path)


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(") ", 1)[1][0] != "Z"


def wait_gone(pids: Iterable[int]) -> list[int]:
    """Those that live on: a process that was sent SIGKILL ends when it next has a processor, a moment after."""
    give_up = time.monotonic() + 10
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < give_up:
        time.sleep(0.05)
    return left


def run(config: RewardConfig, test: Callable[[Verifier], Awaitable[None]]) -> None:
    """Runs `test` on a started verifier; asserts that no process and no task is left."""

    async def main() -> None:
        verifier = Verifier(config)
        await verifier.start()
        pids = {worker._process.pid for worker in verifier._workers}
        try:
            await test(verifier)
        finally:
            pids |= {worker._process.pid for worker in verifier._workers}
            await verifier.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert [pid for pid in pids if alive(pid)] == []

    asyncio.run(main())


def test_both_rules_answer_from_workers() -> None:
    async def test(verifier: Verifier) -> None:
        assert await verifier.verify("\\boxed{0.5}", "\\frac{1}{2}") == RuleResult(True, "0.5", other=False)
        assert await verifier.verify("no box", "2") == RuleResult(False, None, other=False)
        many = await asyncio.gather(*(verifier.verify(f"\\boxed{{{n}}}", "7") for n in range(50)))
        assert [result.correct for result in many if isinstance(result, RuleResult)] == [n == 7 for n in range(50)]
        assert verifier.replaced == 0

    run(RewardConfig(verifier="math_verify", verifier_processes=1), test)

    async def by_string(verifier: Verifier) -> None:
        assert await verifier.verify("\\boxed{0.5}", "\\frac{1}{2}") == RuleResult(False, "0.5", other=None)
        assert await verifier.verify("x" * 1_000_000 + "\\boxed{1,000}", "1000") == RuleResult(True, "1000")

    run(RewardConfig(verifier="recipe_string", compare_rules=False), by_string)


def test_whoever_waits_is_not_overtaken_by_newcomers() -> None:
    async def test(verifier: Verifier) -> None:
        order: list[int] = []

        async def ask_again_and_again(number: int) -> None:
            for _ in range(10):
                await verifier.verify("\\boxed{2}", "2")
                order.append(number)

        await asyncio.gather(*(ask_again_and_again(number) for number in range(8)))
        assert order == list(range(8)) * 10

    run(RewardConfig(verifier="recipe_string", compare_rules=False, verifier_processes=1), test)


def test_an_answer_that_cannot_be_computed_costs_one_sample() -> None:
    async def test(verifier: Verifier) -> None:
        started = time.monotonic()
        bomb = await verifier.verify("\\boxed{9^{9^{9^{9}}}}", "\\frac{1}{2}")
        assert isinstance(bomb, Unscored) or bomb.correct is False
        assert time.monotonic() - started < 5
        assert await verifier.verify("\\boxed{2}", "2") == RuleResult(True, "2", other=True)

    run(RewardConfig(verifier_processes=1, verifier_timeout_s=2.0), test)


def test_a_hang_or_a_crash_costs_one_worker_and_one_sample(hostile: str) -> None:
    child_pid = Path(hostile + ".pid")

    async def test(verifier: Verifier) -> None:
        async def score(text: str) -> object:
            return await verifier.compute_score(make_sample(text=text, ground_truth="2"))

        first = await score("pid")
        texts = ["2", "hang", "exit", "raise", "sys.exit", "3", "nan", "text", "no score", "hang in a child", "2"]
        outcomes = await asyncio.gather(*(score(text) for text in texts))
        reasons = [outcome.reason if isinstance(outcome, Unscored) else None for outcome in outcomes]
        error, crash, slow = Reason.COMPUTE_SCORE_ERROR, Reason.VERIFIER_CRASH, Reason.VERIFIER_TIMEOUT
        assert reasons == [None, slow, crash, error, crash, None, error, error, error, slow, None]
        assert verifier.replaced == 4
        details = [outcome.detail for outcome in outcomes if isinstance(outcome, Unscored)]
        assert "exit code 3" in details[1]
        assert "KeyError: 'missing'" in details[2]
        assert "hostile.py:17" in details[2]
        right, wrong = outcomes[0], outcomes[5]
        assert (right.score, right.correct, right.prediction) == (1.25, True, "2")  # type: ignore[attr-defined]
        assert right.extra == {"source": "test", "split": "train", "odd": "{1}"}  # type: ignore[attr-defined]
        assert (wrong.score, wrong.correct) == (-0.75, False)  # type: ignore[attr-defined]
        last = await score("pid")
        assert last.extra["heavy"] == []  # type: ignore[attr-defined]
        assert last.extra["pid"] != first.extra["pid"]  # type: ignore[attr-defined]
        assert not wait_gone([int(child_pid.read_text())]), "a killed worker left its own child behind"

    config = RewardConfig(
        compute_score=f"{hostile}:compute_score",
        compute_score_kwargs={"bonus": 0.25},
        verifier_processes=2,
        verifier_timeout_s=1.0,
    )
    run(config, test)


def test_a_cancelled_sample_does_not_answer_for_the_next(hostile: str) -> None:
    async def test(verifier: Verifier) -> None:
        hanging = asyncio.create_task(verifier.compute_score(make_sample(text="hang")))
        await asyncio.sleep(0.2)
        hanging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hanging
        outcome = await verifier.compute_score(make_sample(text="2", ground_truth="2"))
        assert not isinstance(outcome, Unscored)
        assert outcome.correct

    run(RewardConfig(compute_score=f"{hostile}:compute_score", verifier_processes=1), test)


def test_closing_while_busy_leaves_nothing(hostile: str) -> None:
    async def test(verifier: Verifier) -> None:
        busy = [asyncio.create_task(verifier.compute_score(make_sample(text="hang"))) for _ in range(3)]
        await asyncio.sleep(0.2)
        await verifier.close()
        outcomes = await asyncio.gather(*busy, return_exceptions=True)
        assert all(isinstance(outcome, Unscored | Exception) for outcome in outcomes)
        await asyncio.sleep(0)
        assert "replace verifier worker" not in {task.get_name() for task in asyncio.all_tasks()}

    run(RewardConfig(compute_score=f"{hostile}:compute_score", verifier_processes=1), test)


def test_async_functions_are_awaited_under_the_deadline(hostile: str) -> None:
    async def test(verifier: Verifier) -> None:
        texts = ["fine"] * 50 + ["hang", "raise"]
        started = time.monotonic()
        outcomes = await asyncio.gather(*(verifier.compute_score(make_sample(text=text)) for text in texts))
        assert time.monotonic() - started < 1.5
        assert all(not isinstance(outcome, Unscored) and outcome.score == 0.5 for outcome in outcomes[:50])
        assert isinstance(outcomes[50], Unscored)
        assert isinstance(outcomes[51], Unscored)
        assert (outcomes[50].reason, outcomes[51].reason) == (Reason.VERIFIER_TIMEOUT, Reason.COMPUTE_SCORE_ERROR)

    run(RewardConfig(compute_score=f"{hostile}:slow_async", verifier_timeout_s=1.0), test)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nowhere.py:compute_score", "cannot be imported"),
        ("no_such_package.rewards:compute_score", "PYTHONPATH"),
        ("{hostile}:missing", "has no function 'missing'"),
        ("{hostile}:not_callable", "has no function 'not_callable'"),
        ("{hostile}:wrong_signature", "must accept data_source"),
        ("{hostile}", "package.module:function"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_at_start(hostile: str, function: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Verifier(RewardConfig(compute_score=function.format(hostile=hostile)))


def test_unknown_keywords_for_the_function_are_refused_at_start(hostile: str) -> None:
    with pytest.raises(UserError, match="bnous"):
        Verifier(RewardConfig(compute_score=f"{hostile}:compute_score", compute_score_kwargs={"bnous": 1}))


def test_a_users_file_may_define_dataclasses(tmp_path: Path) -> None:
    file = tmp_path / "with_a_dataclass.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass\nclass Kept:\n    value: float\n\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n    return Kept(0.5).value\n"
    )
    Verifier(RewardConfig(compute_score=f"{file}:compute_score"))


def test_what_counts_as_a_score() -> None:
    assert read_score(1)[:3] == (1.0, True, None)
    assert read_score(-0.5).correct is False
    assert read_score({"score": 1.0, "acc": False, "pred": 3, "k": (1, None)}) == (1.0, False, "3", {"k": [1, None]})
    for bad in (None, "x", float("inf"), {}, [1.0]):
        with pytest.raises(ValueError, match="compute_score returned"):
            read_score(bad)


def test_workers_die_with_a_parent_that_is_killed(tmp_path: Path, hostile: str) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import asyncio\n"
        "from megatron_fapo.config.reward import RewardConfig\n"
        "from megatron_fapo.genrm.verifier import Verifier\n"
        "from tests.genrm.samples import make_sample\n"
        "async def main():\n"
        f"    verifier = Verifier(RewardConfig(compute_score={hostile + ':compute_score'!r}, verifier_processes=2))\n"
        "    await verifier.start()\n"
        "    busy = asyncio.create_task(verifier.compute_score(make_sample(text='hang')))\n"
        "    await asyncio.sleep(0.2)\n"
        "    print(*(worker._process.pid for worker in verifier._workers), flush=True)\n"
        "    await busy\n"
        "asyncio.run(main())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    assert all(alive(pid) for pid in pids)
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    assert wait_gone(pids) == []
