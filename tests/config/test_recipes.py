"""The recipe's configurations against the recipe: every setting of the original scripts, written down a second time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_fapo.cli import main
from megatron_fapo.config import Config
from megatron_fapo.config.load import leaves, load_config
from megatron_fapo.config.preflight import preflight
from megatron_fapo.data.prepare import SETS
from megatron_fapo.policy.hf_config import layout_problems, read_model_shape
from megatron_fapo.processes import Node
from megatron_fapo.training.placement import place

EXAMPLES = Path(__file__).parents[2] / "examples"
POLICIES = ("baseline_7b", "fapo_7b", "fapo_7b_remote", "baseline_32b", "fapo_32b", "fapo_32b_remote")
RUNS = ("genrm_4b", *POLICIES)
GPUS = {
    "genrm_4b": 32,
    "baseline_7b": 32,
    "fapo_7b": 32,
    "fapo_7b_remote": 16,
    "baseline_32b": 64,
    "fapo_32b": 64,
    "fapo_32b_remote": 48,
}

ALL = {
    "seed": 0,
    "device": "gpu",
    "cluster.gpus_per_node": 8,
    "data.overlong_prompts": "drop",
    "data.shuffle": True,
    "policy.parallel.pipeline": 1,
    "policy.parallel.sequence_parallel": True,
    "policy.optimizer.lr": 1e-6,
    "policy.optimizer.warmup_steps": 160,
    "policy.optimizer.schedule": "constant",
    "policy.optimizer.weight_decay": 0.1,
    "policy.optimizer.beta1": 0.9,
    "policy.optimizer.beta2": 0.999,
    "policy.optimizer.clip_grad": 1.0,
    "policy.recompute": "full",
    "rollout.sampling.top_p": 1.0,
    "rollout.sampling.top_k": -1,
    "rollout.gpu_memory_utilization": 0.8,
    "rollout.vllm.enable_chunked_prefill": True,
    "reward.overlong.enabled": True,
    "reward.overlong.buffer_tokens": 4096,
    "reward.overlong.penalty_factor": 1.0,
    "reward.compute_score": None,
    "algorithm.clip_low": 0.2,
    "algorithm.clip_high": 0.28,
    "algorithm.dual_clip": 10.0,
    "algorithm.normalize_std": True,
    "algorithm.kl_coef": 0.0,
    "algorithm.entropy_coef": 0.0,
    "algorithm.tis_cap": None,
    "algorithm.drop_uniform_groups": False,
    "training.prompts_per_step": 512,
    "training.prompts_per_mini_batch": 32,
    "training.evaluation.every_steps": 10,
}
POLICY = {
    "data.train": ["data/dapo-math.parquet"],
    "data.eval.aime24": "data/aime24.parquet",
    "data.eval.aime25": "data/aime25.parquet",
    "data.eval.gpqa-diamond": "data/gpqa-diamond.parquet",
    "data.max_prompt_tokens": 2048,
    "rollout.samples_per_prompt": 8,
    "rollout.sampling.temperature": 1.0,
    "genrm.enabled": True,
    "genrm.prompt_form": "tagged",
    "genrm.tensor_parallel": 1,
    "genrm.gpu_memory_utilization": 0.95,
    "genrm.temperature": 0.6,
    "genrm.top_p": 0.95,
    "genrm.max_tokens": 16384,
    "genrm.request_timeout_s": 900.0,
    "genrm.deadline_s": 1800.0,
    "genrm.max_attempts": 4,
    "genrm.judge_eval": True,
    "reward.task": "policy",
    "reward.verifier": "recipe_string",
    "reward.flawed_penalty": 1.0,
    "reward.shape": "fapo",
    "reward.max_unscored_share": 0.1,
    "training.evaluation.samples.aime24": 32,
    "training.evaluation.samples.aime25": 32,
    "training.evaluation.samples.gpqa-diamond": 4,
    "training.evaluation.temperature": 1.0,
    "training.evaluation.top_p": 0.7,
}
SIZE_7B = {
    "cluster.train_nodes": 1,
    "cluster.rollout_nodes": 1,
    "policy.model_path": "models/Qwen2.5-Math-7B",
    "policy.max_position_embeddings": 32768,
    "policy.parallel.tensor": 4,
    "policy.parallel.data": 2,
    "policy.micro_batch_tokens": 20480,
    "policy.logprob_micro_batch_tokens": 30720,
    "rollout.tensor_parallel": 1,
    "rollout.max_response_tokens": 8192,
    "rollout.vllm.max_num_batched_tokens": 10240,
    "genrm.max_model_len": 32768,
    "training.steps": 200,
    "training.checkpoint.every_steps": 10,
}
SIZE_32B = {
    "cluster.train_nodes": 2,
    "cluster.rollout_nodes": 4,
    "policy.model_path": "models/Qwen2.5-32B",
    "policy.max_position_embeddings": None,
    "policy.parallel.tensor": 8,
    "policy.parallel.data": 2,
    "policy.micro_batch_tokens": 22528,
    "policy.logprob_micro_batch_tokens": 22528,
    "rollout.tensor_parallel": 4,
    "rollout.max_response_tokens": 20480,
    "rollout.vllm.max_num_batched_tokens": 22528,
    "genrm.max_model_len": 40960,
    "training.steps": 600,
    "training.checkpoint.every_steps": 20,
}
OWN_SERVERS = {
    "cluster.genrm_nodes": 2,
    "genrm.model_path": "models/FAPO-GenRM-4B",
    "genrm.servers": 16,
    "genrm.urls": [],
}
NO_SERVERS = {
    "cluster.genrm_nodes": 0,
    "genrm.model_path": None,
    "genrm.servers": 0,
    "genrm.served_model": "FAPO-GenRM-4B",
    "genrm.urls": [],
    "genrm.rendezvous": "runs/genrm_serve/rendezvous.json",
}
BASELINE = {"reward.flawed_penalty": 0.0}
GENRM = {
    "cluster.train_nodes": 2,
    "cluster.rollout_nodes": 2,
    "cluster.genrm_nodes": 0,
    "data.train": ["data/fapo-critic-train.parquet"],
    "data.eval.fpb": "data/fapo-critic-test.parquet",
    "data.eval.processbench": "data/processbench.parquet",
    "data.max_prompt_tokens": 5120,
    "policy.model_path": "models/Qwen3-4B-Instruct-2507",
    "policy.max_position_embeddings": None,
    "policy.parallel.tensor": 2,
    "policy.parallel.data": 8,
    "policy.micro_batch_tokens": 26624,
    "policy.logprob_micro_batch_tokens": 39936,
    "rollout.tensor_parallel": 1,
    "rollout.samples_per_prompt": 16,
    "rollout.max_response_tokens": 8192,
    "rollout.sampling.temperature": 1.2,
    "rollout.vllm.max_num_batched_tokens": 13312,
    "reward.task": "critic",
    "reward.critic_process": True,
    "training.steps": 500,
    "training.evaluation.samples_per_prompt": 1,
    "training.evaluation.temperature": 0.6,
    "training.evaluation.top_p": 0.95,
    "training.checkpoint.every_steps": 10,
    "training.checkpoint.best_metric": "eval/fpb/f1",
    "training.checkpoint.best_max_tokens": 2000.0,
}
EXPECTED: dict[str, dict[str, Any]] = {
    "genrm_4b": ALL | GENRM,
    "baseline_7b": ALL | POLICY | SIZE_7B | OWN_SERVERS | BASELINE,
    "fapo_7b": ALL | POLICY | SIZE_7B | OWN_SERVERS,
    "fapo_7b_remote": ALL | POLICY | SIZE_7B | NO_SERVERS,
    "baseline_32b": ALL | POLICY | SIZE_32B | OWN_SERVERS | BASELINE,
    "fapo_32b": ALL | POLICY | SIZE_32B | OWN_SERVERS,
    "fapo_32b_remote": ALL | POLICY | SIZE_32B | NO_SERVERS,
}

MODELS: dict[str, dict[str, Any]] = {
    "Qwen2.5-Math-7B": {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
    },
    "Qwen2.5-32B": {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
    },
    "Qwen3-4B-Instruct-2507": {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
}
MODELS["FAPO-GenRM-4B"] = MODELS["Qwen3-4B-Instruct-2507"]


def load(name: str, *overrides: str) -> Config:
    return load_config([EXAMPLES / f"{name}.yaml"], list(overrides), "train").config


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """An empty working directory on a disk without end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**60))
    return tmp_path


def install(root: Path, config: Config) -> None:
    """Put the models' descriptions and empty data files where the recipes look for them."""
    for name, description in MODELS.items():
        model = root / "models" / name
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps(description))
        (model / "model.safetensors").touch()
        (model / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": description["vocab_size"] - 1}}}))
        (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    (root / "data").mkdir()
    for path in (*config.data.train, *config.data.eval.values()):
        (root / path).touch()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_can_be_read(path):
    load_config([path], [])


@pytest.mark.parametrize("name", RUNS)
def test_settings_are_the_recipes(name):
    values = {".".join(key): value for key, value in leaves(load(name))}
    wrong = {key: (values.get(key, "absent"), want) for key, want in EXPECTED[name].items() if values[key] != want}
    assert not wrong


@pytest.mark.parametrize("name", RUNS)
def test_only_files_are_missing(name, elsewhere):
    """With the models and the data in place, preflight is content: layouts divide, prompts and responses fit."""
    config = load(name, "device=cpu")
    missing = preflight(config)
    assert missing
    assert all("no file " in problem or "no config.json in " in problem for problem in missing), missing
    install(elsewhere, config)
    assert preflight(config) == []


@pytest.mark.parametrize("name", RUNS)
def test_layouts_fill_whole_nodes(name, elsewhere):
    config = load(name)
    install(elsewhere, config)
    shape = read_model_shape(config.policy.model_path)
    assert layout_problems(shape, config.policy.parallel) == []
    assert shape.heads % config.rollout.tensor_parallel == 0
    servers = 0 if config.reward.task == "critic" else config.genrm.servers * config.genrm.tensor_parallel
    engines = config.rollout.replicas * config.rollout.tensor_parallel
    assert config.policy.parallel.world_size + engines + servers == GPUS[name]
    nodes = config.cluster
    roles = [["train"]] * nodes.train_nodes + [["rollout"]] * nodes.rollout_nodes + [["genrm"]] * nodes.genrm_nodes
    hosts = [Node(f"{i}", f"{i}", i, nodes.gpus_per_node, frozenset(role)) for i, role in enumerate(roles)]
    assert len(hosts) * nodes.gpus_per_node == GPUS[name], "no card is idle"
    plan = place(config, hosts, "gpu", policy=True, rollout=True, genrm=True)
    assert {*plan.policy, *plan.engines, *plan.servers} == set(hosts)


@pytest.mark.parametrize("name", RUNS)
def test_data_prepare_writes_what_the_recipes_read(name):
    written = {f"{s}{part}" for s, spec in SETS.items() for part in ([""] if spec.split else ["-train", "-test"])}
    config = load(name)
    for path in (*config.data.train, *config.data.eval.values()):
        assert Path(path).stem in written
        assert path == f"data/{Path(path).stem}.parquet"


@pytest.mark.parametrize("name", POLICIES)
def test_the_longest_solution_and_critique_fit_the_judge(name):
    config = load(name)
    scaffold = 512  # the prompt's own words and paragraph tags
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens + config.genrm.max_tokens + scaffold
    assert (config.genrm.max_model_len or 0) >= longest


@pytest.mark.parametrize("size", ["7b", "32b"])
def test_fapo_differs_from_its_baseline_in_the_reward_alone(size, capsys):
    assert main(["config", "diff", str(EXAMPLES / f"baseline_{size}.yaml"), str(EXAMPLES / f"fapo_{size}.yaml")]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("reward.flawed_penalty: 0.0 (")
    assert " -> 1.0 (" in line


@pytest.mark.parametrize("size", ["7b", "32b"])
def test_a_remote_judge_changes_where_the_servers_are_and_nothing_else(size):
    own, remote = (dict(leaves(load(f"fapo_{size}{suffix}"))) for suffix in ("", "_remote"))
    changed = {".".join(key) for key in own.keys() | remote.keys() if own.get(key) != remote.get(key)}
    where = {"rendezvous", "servers", "model_path", "served_model"}
    assert changed == {"cluster.genrm_nodes", *(f"genrm.{name}" for name in where)}


def test_the_judge_service_serves_what_the_remote_runs_ask_for(elsewhere):
    """The same servers as the runs' own, in a context that is long enough for both sizes, filling two nodes."""
    service = load_config([EXAMPLES / "genrm_serve.yaml"], ["device=cpu"], "serve").config
    asked = [load(f"fapo_{size}") for size in ("7b", "32b")]
    for field in ("model_path", "servers", "tensor_parallel", "gpu_memory_utilization"):
        assert {getattr(config.genrm, field) for config in (service, *asked)} == {getattr(service.genrm, field)}
    assert service.genrm.max_model_len == max(config.genrm.max_model_len or 0 for config in asked)
    assert service.genrm.served_model == load("fapo_32b_remote").genrm.served_model
    nodes = [Node(f"{i}", f"{i}", i, 8, frozenset(["train"])) for i in range(service.cluster.nodes)]
    plan = place(service, nodes, "gpu", policy=False, rollout=False, genrm=True)
    assert [plan.servers.count(node) for node in nodes] == [8, 8]
    (missing,) = preflight(service, "serve")
    assert "genrm.model_path" in missing
    install(elsewhere, asked[0])
    assert preflight(service, "serve") == []


def test_math_7b_needs_its_positions_raised(elsewhere):
    config = load("fapo_7b", "device=cpu", "policy.max_position_embeddings=null")
    install(elsewhere, config)
    (problem,) = preflight(config)
    assert "= 10240" in problem
    assert "policy.max_position_embeddings" in problem


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("genrm_4b", ["reward.critic_process=false"]),
        ("fapo_7b", ["reward.flawed_penalty=2"]),
        ("fapo_7b", ["reward.rho_shift=0.5"]),
        ("fapo_7b", ["reward.rho_shift_schedule=[[1,2.0],[200,0.5]]"]),
        ("fapo_7b", ["reward.shape=step_ratio"]),
        ("fapo_7b", ["genrm.prompt_form=raw"]),
        ("fapo_7b", ["genrm.model_path=models/Qwen3-4B-Instruct-2507"]),
        ("fapo_7b", ["reward.verifier=math_verify"]),
        ("fapo_7b", ["policy.parallel.data=1", "rollout.replicas=2", "genrm.servers=2"]),
        ("fapo_7b_remote", ["policy.parallel.data=1", "rollout.replicas=4"]),
        ("genrm_4b", ["policy.parallel.data=2", "rollout.replicas=4"]),
        ("baseline_7b", ["genrm.enabled=false"]),
    ],
)
def test_overrides_of_the_docs_are_accepted(name, overrides, elsewhere):
    assert all(override in (EXAMPLES.parent / "docs" / "recipes.md").read_text() for override in overrides)
    config = load(name, "device=cpu", *overrides)
    install(elsewhere, config)
    assert preflight(config) == []
