"""`fapo genrm label` as its users run it: with a vLLM engine and the oracle, and stopped in the middle."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from megatron_fapo.config.data import DataConfig
from megatron_fapo.data.datasets import load_prompts, write_prompts, write_testbed
from megatron_fapo.data.oracle import first_wrong_step
from megatron_fapo.data.testbed import parse_question
from tests.training.runs import FapoProcess, write_config

pytestmark = pytest.mark.timeout(600)

POLICY = Path(__file__).parents[2] / "examples" / "models" / "policy"


def sound(question: str, ground_truth: str, solution: str) -> int:
    """A judge that finds no error."""
    del question, ground_truth, solution
    return -1


def _config(path: Path, data: Path, **sections: Any) -> str:
    values: dict[str, Any] = {
        "run_dir": str(path.with_suffix("")),
        "device": "cpu",
        "data": {"train": [str(data)], "max_prompt_tokens": 160},
        "rollout": {"samples_per_prompt": 6, "max_response_tokens": 112, "cpu_kv_cache_gb": 0.05},
        "reward": {"verifier_processes": 1},
    }
    return str(write_config(path, values | {key: values.get(key, {}) | value for key, value in sections.items()}))


def _records(journal: Path, kind: str) -> list[dict[str, Any]]:
    lines = journal.read_text().splitlines() if journal.exists() else []
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


def test_a_real_policy_labelled_by_the_oracle(tmp_path: Path) -> None:
    data, _ = write_testbed(tmp_path, 8, 1, seed=5)
    oracle = {"judge_function": "megatron_fapo.data.oracle:judge"}
    config = _config(tmp_path / "label.yaml", data, policy={"model_path": str(POLICY)}, genrm=oracle)
    out = tmp_path / "rows.parquet"
    command = ("genrm", "label", "-c", config, "--out", str(out))
    plan = FapoProcess(tmp_path / "plan.log", *command, "--dry-run")
    assert plan.wait() == 0, plan.output()
    assert "48 solutions" in plan.output()
    assert not list(tmp_path.glob("rows*")), "a plan leaves nothing behind"
    run = FapoProcess(tmp_path / "run.log", *command)
    assert run.wait() == 0, run.output()[-4000:]
    assert run.wait_until_gone() == []

    rows = pyarrow.parquet.read_table(out).to_pylist()
    journal = tmp_path / "rows.parquet.journal.jsonl"
    solutions = {tuple(r["key"]): r["text"] for r in _records(journal, "solution")}
    right = sum(r["correct"] for r in _records(journal, "rule"))
    assert len(solutions) == 48
    assert len(_records(journal, "vote")) == 3 * right
    assert 4 <= len(rows) <= right
    labels = [row["reward_model"]["ground_truth"] for row in rows]
    assert any(label >= 0 for label in labels), "this policy guesses"
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    loaded = load_prompts([out], tokenizer, DataConfig(max_prompt_tokens=4096), task="critic").prompts
    assert [int(prompt.ground_truth) for prompt in loaded] == labels
    texts = {(key[1], key[2]): text for key, text in solutions.items()}
    for prompt, row in zip(loaded, rows, strict=True):
        made = row["extra_info"]["provenance"]
        text = texts[made["prompt_id"], made["sample_index"]]
        assert first_wrong_step(parse_question(prompt.question), text) == int(prompt.ground_truth)

    before = out.read_bytes()
    again = FapoProcess(tmp_path / "again.log", *command)
    assert again.wait() == 0, again.output()[-4000:]
    assert out.read_bytes() == before
    assert "to sample  0 solutions" in again.output()


def test_stopped_by_a_scheduler_and_gone_on_with(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    write_testbed(tmp_path, 6, 1, seed=5)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        row["reward_model"]["ground_truth"] = "-1"  # what the fake server answers
    write_prompts(data, rows)
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.fake_server", "0.7"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{json.loads(server.stdout.readline())['port']}/v1"
        config = _config(
            tmp_path / "label.yaml",
            data,
            rollout={"samples_per_prompt": 1, "max_num_seqs": 1},
            genrm={"judge_function": "tests.training.test_label:sound"},
            labelling={"samplers": {"external": {"urls": [url], "model": "genrm"}}},
        )
        out = tmp_path / "rows.jsonl"
        journal = tmp_path / "rows.jsonl.journal.jsonl"
        first = FapoProcess(tmp_path / "first.log", "genrm", "label", "-c", config, "--out", str(out))
        deadline = time.monotonic() + 120
        while len(_records(journal, "vote")) < 6:
            assert first.process.poll() is None, first.output()
            assert time.monotonic() < deadline, first.output()
            time.sleep(0.1)
        first.process.send_signal(signal.SIGTERM)
        assert first.wait() == 75, first.output()
        assert first.wait_until_gone() == []
        assert not out.exists()
        kept = journal.read_bytes()
        assert 2 <= len(_records(journal, "solution")) < 6
        second = FapoProcess(tmp_path / "second.log", "genrm", "label", "-c", config, "--out", str(out))
        assert second.wait() == 0, second.output()
    finally:
        server.kill()
        server.wait()
    assert journal.read_bytes().startswith(kept)
    assert len(_records(journal, "solution")) == 6
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["extra_info"]["provenance"]["prompt_id"] for row in written] == [f"testbed/{i}" for i in range(6)]
    assert {row["reward_model"]["ground_truth"] for row in written} == {-1}
    assert {row["extra_info"]["provenance"]["sampler"] for row in written} == {"external"}
