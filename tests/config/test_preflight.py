"""Preflight: what the files say about a run before anything is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fapo.config.load import load_config
from megatron_fapo.config.preflight import preflight
from megatron_fapo.config.root import Purpose

MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 50,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


def write_model(root: Path, tokens: int = 50, **changes: Any) -> Path:
    root.mkdir()
    (root / "config.json").write_text(json.dumps(MODEL | changes))
    (root / "model.safetensors").write_bytes(b"")
    vocab = {f"t{i}": i for i in range(tokens - 1)}
    added = [{"id": tokens - 1, "content": "<end>"}]
    (root / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": added}))
    (root / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    return root


@pytest.fixture
def good(tmp_path) -> list[str]:
    """Overrides of a run that may start."""
    write_model(tmp_path / "model")
    write_model(tmp_path / "genrm")
    (tmp_path / "train.jsonl").write_text("{}\n")
    return [
        f"run_dir={tmp_path / 'runs' / 'a'}",
        f"data.train=[{tmp_path / 'train.jsonl'}]",
        f"policy.model_path={tmp_path / 'model'}",
        f"genrm.model_path={tmp_path / 'genrm'}",
        "data.max_prompt_tokens=128",
        "rollout.max_response_tokens=384",
        "reward.overlong.enabled=false",
        "device=cpu",
    ]


def found(overrides: list[str], purpose: Purpose = "train") -> list[str]:
    return preflight(load_config([], overrides).config, purpose)


def test_a_complete_run_has_no_problems(good):
    assert found(good) == []
    assert not Path(good[0].removeprefix("run_dir=")).exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=[]", "data.train is empty"),
        ("data.train=[absent.jsonl]", "data.train: no file absent.jsonl"),
        ("data.eval.aime=absent.jsonl", "data.eval.aime: no file absent.jsonl"),
        ("policy.model_path=''", "policy.model_path is empty"),
        ("policy.model_path=absent", "policy.model_path: no config.json in absent"),
        ("genrm.model_path=absent", "genrm.model_path: no config.json in absent"),
        ("policy.parallel.pipeline=3", "4 layers do not divide"),
        ("policy.parallel.tensor=4", "2 KV heads do not divide"),
        ("policy.parallel.expert=2", "has no experts; set it to 1"),
        ("policy.parallel.virtual_pipeline=2", "virtual_pipeline without a pipeline"),
        ("rollout.tensor_parallel=3", "rollout.tensor_parallel=3"),
        ("rollout.max_response_tokens=385", "= 513"),
        ("reward.compute_score=absent.py:f", "No such file"),
        ("reward.compute_score=json:dupms", "json has no function 'dupms'"),
        ("reward.compute_score=tests.genrm.recipe_functions:rule_only", "does not accept reward_router_address"),
        ("genrm.judge_function=json:dumps", "it must accept question, ground_truth, solution as keywords"),
    ],
)
def test_one_wrong_thing_is_one_message(good, override, message):
    (problem,) = found([*good, override])
    assert message in problem


def test_all_problems_at_once(good, tmp_path):
    model = write_model(tmp_path / "other", tokens=51, num_hidden_layers=3)
    (model / "model.safetensors").unlink()
    (model / "tokenizer_config.json").unlink()
    problems = found([*good, f"policy.model_path={model}", "policy.parallel.pipeline=2", "data.train=[x]"])
    for part in ("no file x", "lacks model.safetensors", "3 layers", "token ids reach 50", "no chat template"):
        assert sum(part in problem for problem in problems) == 1, part
    assert len(problems) == 5


def test_an_unsupported_architecture_is_named(good, tmp_path):
    model = write_model(tmp_path / "moe", architectures=["MixtralForCausalLM"])
    (problem,) = found([*good, f"policy.model_path={model}"])
    assert "MixtralForCausalLM" in problem
    assert "LlamaForCausalLM" in problem


def test_a_missing_shard_is_named(good, tmp_path):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model" / "model-1.safetensors").write_bytes(b"")
    (problem,) = found(good)
    assert "lacks model-2.safetensors;" in problem


def test_no_room_for_checkpoints_is_said_with_the_remedy(good, tmp_path):
    model = write_model(tmp_path / "huge", hidden_size=2**16, intermediate_size=2**18, num_hidden_layers=2**10)
    (problem,) = found([*good, f"policy.model_path={model}"])
    assert "GiB free" in problem
    assert "training.checkpoint.keep" in problem
    assert "2 checkpoints and one being written" in problem
    data = good[1].removeprefix("data.train=[").removesuffix("]")
    best = [f"data.eval.fpb={data}", "training.checkpoint.best_metric=eval/fpb/f1"]
    (with_best,) = found([*good, *best, f"policy.model_path={model}"])
    assert "3 checkpoints and one being written" in with_best


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(good):
    (problem,) = found([*good, "device=gpu"])
    assert "GPU" in problem


def test_the_api_key_of_external_servers(good, monkeypatch):
    overrides = [*good, "genrm.servers=0", "genrm.urls=['http://host/v1']", "genrm.api_key_env=GENRM_TEST_KEY"]
    monkeypatch.delenv("GENRM_TEST_KEY", raising=False)
    assert "GENRM_TEST_KEY" in found(overrides)[0]
    monkeypatch.setenv("GENRM_TEST_KEY", "x")
    assert found(overrides) == []


def test_a_warmup_needs_only_the_model(good):
    assert found([*good, "data.train=[]", "data.eval.a=absent", "genrm.model_path=null"], "warmup") == []
    assert "no config.json" in found([*good, "policy.model_path=absent"], "warmup")[0]


def test_evaluation_needs_its_data_and_a_genrm_only_to_judge(good):
    assert "data.eval is empty" in found([*good, "data.train=[]"], "evaluate")[0]
    judged = [*good, f"data.eval.a={good[1].removeprefix('data.train=[').removesuffix(']')}", "genrm.model_path=absent"]
    assert len(found(judged, "evaluate")) == 1
    assert found([*judged, "genrm.judge_eval=false"], "evaluate") == []


def test_a_judge_service_needs_its_model_and_its_key_and_no_policy_and_no_data(tmp_path, monkeypatch):
    write_model(tmp_path / "genrm")
    overrides = [f"genrm.model_path={tmp_path / 'genrm'}", "device=cpu", "genrm.api_key_env=GENRM_TEST_KEY"]
    monkeypatch.setenv("GENRM_TEST_KEY", "secret")
    assert found(overrides, "serve") == []
    monkeypatch.delenv("GENRM_TEST_KEY")
    (tmp_path / "genrm" / "model.safetensors").unlink()
    assert len(found(overrides, "serve")) == 2
