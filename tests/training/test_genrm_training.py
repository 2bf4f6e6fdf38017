"""`fapo genrm train` as its users run it: step-wise rewards, validation, and the checkpoint with the best F1."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from megatron_fapo.data.datasets import write_prompts
from megatron_fapo.data.demonstrations import critic_rows
from megatron_fapo.genrm.prompts import judge_messages
from megatron_fapo.observe.metrics import read_metrics
from megatron_fapo.observe.samples import read_samples
from tests.training.runs import FapoProcess, write_config

pytestmark = pytest.mark.timeout(900)

GENRM = Path(__file__).parents[2] / "examples" / "models" / "genrm"
N = 4


def test_a_genrm_is_trained_validated_and_its_best_checkpoint_kept(tmp_path: Path) -> None:
    build = functools.partial(judge_messages, form="tagged")
    write_prompts(tmp_path / "train.parquet", critic_rows(40, 1, build))
    write_prompts(tmp_path / "held.jsonl", critic_rows(8, 2, build))
    run = tmp_path / "run"
    config = write_config(
        tmp_path / "genrm.yaml",
        {
            "run_dir": str(run),
            "device": "cpu",
            "data": {
                "train": [str(tmp_path / "train.parquet")],
                "eval": {"fpb": str(tmp_path / "held.jsonl")},
                "max_prompt_tokens": 512,
            },
            "policy": {"model_path": str(GENRM), "optimizer": {"lr": 1e-3, "warmup_steps": 0}},
            "rollout": {"samples_per_prompt": N, "max_response_tokens": 160, "sampling": {"temperature": 1.2}},
            "reward": {"overlong": {"enabled": False}},
            "training": {
                "steps": 3,
                "prompts_per_step": 4,
                "prompts_per_mini_batch": 4,
                "evaluation": {"every_steps": 1, "temperature": 0.0},
                "checkpoint": {"every_steps": 1, "keep": 1, "best_metric": "eval/fpb/f1"},
            },
        },
    )
    train = FapoProcess(tmp_path / "train.log", "genrm", "train", "-c", str(config))
    assert train.wait() == 0, train.output()[-4000:]

    metrics = read_metrics(run)
    assert [record["step"] for record in metrics] == [0, 1, 2, 3]
    for step in (1, 2, 3):
        samples = read_samples(run, step)
        assert len(samples) == 4 * N
        for sample in samples:
            label, total = int(sample["ground_truth"]), sample["extra"]["total_steps"]
            predicted = None if sample["prediction"] is None else int(sample["prediction"])
            if predicted is None or (predicted == -1) != (label == -1):
                assert sample["reward"] == -1
            else:
                assert sample["reward"] == 1 - abs(predicted - label) / total
        found = [s for s in samples if s["prediction"] not in (None, "-1") and s["ground_truth"] != "-1"]
        called = [s for s in samples if s["prediction"] not in (None, "-1")]
        record = metrics[step]
        if found:
            assert record["critic/precision"] == pytest.approx(len(found) / len(called))
        assert record["policy/grad_norm"] > 0

    scores = {int(record["step"]): record["eval/fpb/f1"] for record in metrics if record["step"] > 0}
    best = (run / "checkpoints" / "best").resolve()
    assert scores[int(best.name.removeprefix("step_"))] == max(scores.values())
    kept = {path.name for path in (run / "checkpoints").glob("step_*")}
    assert kept == {best.name, "step_000003"}
    exported = tmp_path / "genrm-hf"
    where = ("--megatron", str(best), "--out", str(exported))
    convert = FapoProcess(tmp_path / "convert.log", "convert", "megatron-to-hf", *where)
    assert convert.wait() == 0, convert.output()
    assert (exported / "model.safetensors.index.json").exists() or list(exported.glob("*.safetensors"))
