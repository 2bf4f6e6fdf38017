"""Real runs: every component, two megatron ranks, a vLLM engine; stopped, killed and resumed."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_fapo.data.datasets import write_testbed
from megatron_fapo.data.tokenizer import init_tiny_model
from megatron_fapo.observe.metrics import read_metrics
from megatron_fapo.observe.samples import read_samples
from megatron_fapo.observe.trace import step_file
from tests.observe.test_trace import conserved
from tests.training.runs import FapoProcess, write_config

pytestmark = pytest.mark.timeout(900)

STEPS = 4


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    write_testbed(path / "data", 64, 8, seed=0)
    init_tiny_model(path / "model", seed=0)
    return path


def _config(workspace: Path, name: str, **sections: Any) -> Path:
    values: dict[str, Any] = {
        "run_dir": str(workspace / name),
        "device": "cpu",
        "data": {"train": [str(workspace / "data" / "train.jsonl")], "max_prompt_tokens": 160},
        "policy": {
            "model_path": str(workspace / "model"),
            "parallel": {"tensor": 2},
            "optimizer": {"lr": 1e-3, "warmup_steps": 3},
        },
        "rollout": {"samples_per_prompt": 4, "max_response_tokens": 24, "cpu_kv_cache_gb": 0.05},
        "reward": {"overlong": {"enabled": False}, "verifier_processes": 1},
        "training": {
            "steps": STEPS,
            "prompts_per_step": 4,
            "prompts_per_mini_batch": 2,
            "evaluation": {"every_steps": 0},
            "checkpoint": {"every_steps": 0},
        },
    }
    return write_config(workspace / f"{name}.yaml", values | {k: values.get(k, {}) | v for k, v in sections.items()})


@pytest.fixture
def started() -> Iterator[list[FapoProcess]]:
    processes: list[FapoProcess] = []
    yield processes
    for process in processes:
        process.kill_all()


def _start(started: list[FapoProcess], log: Path, *arguments: str) -> FapoProcess:
    started.append(FapoProcess(log, *arguments))
    return started[-1]


def _weights(workspace: Path, name: str) -> dict[str, str]:
    """Digest of each tensor of the run's last checkpoint, through `fapo convert`."""
    from safetensors.torch import load_file

    checkpoint = sorted((workspace / name / "checkpoints").iterdir())[-1]
    assert checkpoint.name == f"step_{STEPS:06d}"
    target = workspace / f"{name}-hf"
    where = ("--megatron", str(checkpoint), "--out", str(target))
    assert FapoProcess(workspace / "convert.log", "convert", "megatron-to-hf", *where).wait() == 0
    tensors = load_file(target / "model-00001-of-00001.safetensors")
    return {key: hashlib.sha256(t.numpy().tobytes()).hexdigest() for key, t in tensors.items()}


def _newest(workspace: Path) -> dict[str, Any]:
    """The state of the newest checkpoint of `parts`."""
    state = sorted((workspace / "parts" / "checkpoints").glob("step_*/state.json"))[-1]
    return json.loads(state.read_text())


def _reproducible(record: dict[str, float]) -> dict[str, float]:
    judging = ("genrm/latency", "genrm/queue_", "genrm/request_")
    timed = ("phase_s/", "memory/", "weight_sync/", "scoring/", "trace/", *judging)
    return {name: value for name, value in record.items() if not name.startswith(timed)}


def test_a_stopped_and_broken_run_equals_an_uninterrupted_one(
    workspace: Path, started: list[FapoProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped and finished through `fapo launch`, which passes on signals, output and exit codes, and resumes."""
    monkeypatch.delenv("NEMORUN_HOME", raising=False)
    sections: dict[str, Any] = {
        "reward": {"compute_score": "tests.training.runs:reward_of_length"},
        "data": {"eval": {"held": str(workspace / "data" / "eval.jsonl")}},
        "training": {"evaluation": {"every_steps": 2}},
    }
    whole = _start(started, workspace / "whole.log", "train", "-c", str(_config(workspace, "whole", **sections)))
    assert whole.wait() == 0, whole.output()[-4000:]
    assert whole.wait_until_gone() == []
    assert (workspace / "whole" / "report.html").stat().st_size > 10_000

    # In turns on the same device, which changes nothing but who is where when.
    turns: dict[str, Any] = {"policy": {"offload": True}, "rollout": {"colocated": True}}
    config = str(_config(workspace, "parts", **sections, **turns))
    local = ("launch", "--executor", "local", "-c", config)
    stopped = _start(started, workspace / "stopped.log", *local)
    stopped.wait_for_step(workspace / "parts", 0)  # it is in step 1
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.wait() == 75, stopped.output()[-4000:]
    assert stopped.wait_until_gone() == []
    assert (workspace / ".nemo_run" / "experiments" / "fapo").is_dir()
    assert _newest(workspace)["step"] < STEPS, "the run ended before it could be stopped"

    broken = _start(started, workspace / "broken.log", "train", "-c", config, "--resume")
    broken.wait_for_step(workspace / "parts", 2)
    os.kill(broken.pids("VLLM::EngineCore")[0], signal.SIGKILL)
    assert broken.wait() == 76, broken.output()[-4000:]
    assert broken.wait_until_gone() == []
    assert "Traceback (most recent call last):\n  File" not in broken.output()
    found = json.loads((workspace / "parts" / "failure.json").read_text())
    assert (found["role"], found["what"]) == ("rollout", "its vLLM processes are gone")
    named = f"rollout-0 on node {found['node']}"
    assert named in broken.output()
    assert named in (workspace / "parts" / "logs" / "driver-0.log").read_text()
    assert 2 <= found["step"] == _newest(workspace)["step"] < STEPS, "the finished steps were saved"

    last = _start(started, workspace / "last.log", *local)
    assert last.wait() == 0, last.output()[-4000:]
    assert f"resumed from {workspace / 'parts'}" in last.output()
    assert not (workspace / "parts" / "failure.json").exists()
    uninterrupted, resumed = read_metrics(workspace / "whole"), read_metrics(workspace / "parts")
    for run, step in itertools.product(("whole", "parts"), range(1, STEPS + 1)):
        threads = conserved(step_file(workspace / run, step))
        assert {"phases", "policy-0", "policy-1", "rollout-0"} == set(threads)
        assert {"train", "gradients", "optimizer"} <= {name for name, *_ in threads["policy-1"]}
        assert {"generate", "pull"} <= {name for name, *_ in threads["rollout-0"]}
    assert [r["step"] for r in resumed] == [0, 1, 2, 3, 4]
    assert "eval/held/avg@1" in resumed[2]
    assert [_reproducible(r) for r in resumed] == [_reproducible(r) for r in uninterrupted]
    assert uninterrupted[1]["policy/grad_norm"] > 0
    assert _weights(workspace, "parts") == _weights(workspace, "whole")


def test_failed_judgements_are_unscored_and_a_killed_driver_leaves_nothing(
    workspace: Path, started: list[FapoProcess]
) -> None:
    """A random GenRM never boxes an index. Ground truths are made such that every answer without a box is right, so
    that nearly all samples are put to it."""
    rows = [json.loads(line) for line in (workspace / "data" / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["reward_model"]["ground_truth"] = "[INVALID]"
    data = workspace / "data" / "unboxed.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = _config(
        workspace,
        "judged",
        data={"train": [str(data)]},
        policy={"parallel": {"pipeline": 2}},
        genrm={"model_path": str(workspace / "model"), "max_tokens": 16, "max_model_len": 768, "cpu_kv_cache_gb": 0.05},
        reward={"verifier": "recipe_string", "max_unscored_share": 1.0},
        training={"steps": 50},
    )
    run = _start(started, workspace / "judged.log", "train", "-c", str(config))
    run.wait_for_step(workspace / "judged", 2)
    for record in read_metrics(workspace / "judged")[:2]:
        judging = conserved(step_file(workspace / "judged", int(record["step"])))["genrm-0"]
        assert "judge" in {name for name, *_ in judging}
        assert 0 < record["trace/idle_share/genrm"] < 1
        samples = read_samples(workspace / "judged", int(record["step"]))
        right = [s for s in samples if s["correct"]]
        assert len(right) >= 12, "the model boxes too often for this test"
        # Not a number: not 0, and not the reward of a sound answer.
        assert all(s["reward"] is None for s in right)
        assert {s["unscored_reason"] for s in right} <= {"genrm_truncated", "genrm_unparsable"}
        assert {s["reward"] for s in samples if not s["correct"]} <= {-1.0}
        assert record["score/unscored"] == len(right)
        assert record["score/samples"] == len(samples) == 16

    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    assert run.wait_until_gone(60) == []
