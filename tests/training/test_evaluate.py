"""`fapo evaluate` as its users start it, on the models of examples/: a policy with a judge, and a GenRM on its own."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_fapo.algorithm.judgements import Judgement, judgement_metrics
from megatron_fapo.data.critic import critic_row
from megatron_fapo.data.datasets import write_prompts, write_testbed
from megatron_fapo.data.oracle import first_wrong_step
from megatron_fapo.data.solutions import FLAWED_POSITIVE, SOUND, write_solution
from megatron_fapo.data.testbed import make_problem, parse_question
from megatron_fapo.genrm.prompts import judge_messages
from megatron_fapo.observe.files import read_json_lines
from tests.training.runs import FapoProcess, write_config

pytestmark = pytest.mark.timeout(900)

MODELS = Path(__file__).parents[2] / "examples" / "models"


def _evaluate(workspace: Path, name: str, **sections: Any) -> dict[str, Any]:
    """What a finished `fapo evaluate` left as evaluation.json; fails when it left processes or no report."""
    values: dict[str, Any] = {"run_dir": str(workspace / name), "device": "cpu", "reward": {}}
    config = write_config(workspace / f"{name}.yaml", values | sections)
    run = FapoProcess(workspace / f"{name}.log", "evaluate", "-c", str(config))
    try:
        assert run.wait() == 0, run.output()[-4000:]
        assert run.wait_until_gone() == []
    finally:
        run.kill_all()
    assert (workspace / name / "report.html").stat().st_size > 10_000
    result = json.loads((workspace / name / "evaluation.json").read_text())
    for metric in result["metrics"]:
        if metric.startswith("eval/") and not metric.endswith("_stderr"):
            assert metric.removeprefix("eval/") in run.output()
    return result


def test_a_policy_is_evaluated_with_a_judge_that_needs_no_server(tmp_path: Path) -> None:
    _, data = write_testbed(tmp_path / "data", 1, 12, seed=5)
    result = _evaluate(
        tmp_path,
        "policy",
        data={"eval": {"testbed": str(data)}, "max_prompt_tokens": 160},
        policy={"model_path": str(MODELS / "policy")},
        rollout={"max_response_tokens": 112, "cpu_kv_cache_gb": 0.05},
        genrm={"judge_function": "megatron_fapo.data.oracle:judge"},
        reward={"overlong": {"enabled": False}, "verifier_processes": 1},
        training={"evaluation": {"samples_per_prompt": 4, "top_p": 1.0}},
    )
    metrics = result["metrics"]
    samples = read_json_lines(tmp_path / "policy" / "samples" / "eval_testbed.jsonl")
    assert (result["sets"]["testbed"]["prompts"], result["sets"]["testbed"]["samples"], len(samples)) == (12, 48, 48)
    right = [s for s in samples if s["correct"]]
    flawed = [s for s in right if first_wrong_step(parse_question(s["question"]), s["text"]) != -1]
    assert metrics["eval/testbed/avg@4"] == pytest.approx(len(right) / 48)
    assert metrics["eval/testbed/score/flawed_positive_ratio"] == pytest.approx(len(flawed) / len(right))
    assert 0 < len(flawed) < len(right)
    assert 0 < metrics["eval/testbed/score/flawed_positive_ratio_stderr"] < 0.5
    assert metrics["eval/testbed/avg@4"] <= metrics["eval/testbed/pass@2"] <= metrics["eval/testbed/pass@4"]
    assert result["model"] == str(MODELS / "policy")
    assert result["config"]["training"]["evaluation"]["samples_per_prompt"] == 4
    assert result["seconds"]["total"] >= result["seconds"]["start"] > 0


def _critic_row(index: int, rng: random.Random) -> dict[str, Any]:
    problem = make_problem(9, index)
    solution = write_solution(problem, rng.choice([SOUND, FLAWED_POSITIVE]), rng)
    messages = judge_messages(problem.question, problem.answer, solution.text, "tagged")
    source, steps = f"ProcessBench/{problem.box_size} a box", len(solution.paragraphs)
    return critic_row(source, messages, solution.first_wrong, steps, question_index=index, split="test")


def test_a_genrm_is_evaluated_on_labelled_solutions(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [_critic_row(index, rng) for index in range(24)]
    write_prompts(tmp_path / "critic.jsonl", rows)
    result = _evaluate(
        tmp_path,
        "critic",
        data={"eval": {"pb": str(tmp_path / "critic.jsonl")}, "max_prompt_tokens": 640},
        policy={"model_path": str(MODELS / "genrm")},
        rollout={"max_response_tokens": 256, "cpu_kv_cache_gb": 0.05},
        reward={"task": "critic", "overlong": {"enabled": False}},
        training={"evaluation": {"samples_per_prompt": 1, "temperature": 0.0, "top_p": 1.0}},
    )
    metrics = result["metrics"]
    samples = read_json_lines(tmp_path / "critic" / "samples" / "eval_pb.jsonl")
    assert len(samples) == 24
    judged = [
        Judgement(
            None if sample["prediction"] is None else int(sample["prediction"]),
            row["reward_model"]["ground_truth"],
            row["extra_info"]["total_steps"],
            row["data_source"].removeprefix("ProcessBench/"),
            sample["response_tokens"],
        )
        for row, sample in zip(rows, samples, strict=True)
    ]
    for name, value in judgement_metrics(judged).items():
        assert metrics[f"eval/pb/{name}"] == pytest.approx(value), name
    assert metrics["eval/pb/f1"] > 0.6, "the demo's GenRM judges better than calling everything flawed"
    assert {"eval/pb/precision", "eval/pb/recall", "eval/pb/processbench_f1", "eval/pb/response/tokens_mean"} <= {
        *metrics
    }
