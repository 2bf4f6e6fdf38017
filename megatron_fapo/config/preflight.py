"""What can be known of a run before any process starts, by looking at files: models, data, devices, disk."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from megatron_fapo.config.policy import PolicyConfig
from megatron_fapo.config.root import Config, Purpose, asks_genrm, samplers
from megatron_fapo.device import choose_device, choose_dtype
from megatron_fapo.errors import UserError
from megatron_fapo.genrm.user_function import COMPUTE_SCORE, JUDGE_FUNCTION, ROUTER, accepts, load_function, offers
from megatron_fapo.observe.loggers import logger_problems
from megatron_fapo.policy.hf_config import layout_problems, read_model_shape

CHECKPOINT_BYTES_PER_PARAMETER = 18
"""float32 weights and two Adam moments (12), the working copy (up to 4) and a bfloat16 export (2)."""


def preflight(config: Config, purpose: Purpose = "train") -> list[str]:
    """All problems that the files and this machine show, each with its remedy; empty when the work may start.

    Only what `purpose` uses is looked at: a warm-up needs no prompts and no GenRM, a judge service nothing
    else, only training keeps checkpoints.
    """
    problems = _data_problems(config, purpose)
    if purpose != "serve":
        problems += _sampler_problems(config) if purpose == "label" else _model_problems(config, purpose)
    problems += _genrm_problems(config, purpose)
    problems += logger_problems(config) if purpose in ("train", "warmup") else []
    if config.device == "gpu":  # `auto` cannot fail, and looking takes seconds: it imports torch.
        try:
            choose_device(config.device)
        except UserError as error:
            problems.append(str(error))
    optimizer = config.policy.optimizer
    if (
        purpose in ("train", "warmup")
        and config.device == "cpu"
        and (optimizer.low_precision or optimizer.offload_fraction)
    ):
        from megatron_fapo.policy.optimizer import optimizer_problem

        problems += filter(None, [optimizer_problem(optimizer, choose_dtype(config.policy.dtype, "cpu"), "cpu")])
    return problems + (_function_problems(config) if purpose not in ("warmup", "serve") else [])


def _data_problems(config: Config, purpose: Purpose) -> list[str]:
    problems = []
    named = [("data.train", path) for path in config.data.train if purpose in ("train", "label")]
    if purpose in ("train", "evaluate"):
        named += [(f"data.eval.{name}", path) for name, path in config.data.eval.items()]
    if purpose in ("train", "label") and not config.data.train:
        problems.append("data.train is empty: name at least one JSONL or parquet file")
    if purpose == "evaluate" and not config.data.eval:
        problems.append("data.eval is empty: set data.eval.NAME to a JSONL or parquet file")
    return problems + [
        f"{key}: no file {path} (relative paths start at {Path.cwd()})"
        for key, path in named
        if not Path(path).is_file()
    ]


def _model_problems(config: Config, purpose: Purpose) -> list[str]:
    if not config.policy.model_path:
        return ["policy.model_path is empty: set it to an HF checkpoint directory"]
    root = Path(config.policy.model_path)
    problems = _checkpoint_problems("policy.model_path", root)
    if not (root / "config.json").is_file():
        return problems
    try:
        shape = read_model_shape(root, config.policy.max_position_embeddings)
    except UserError as error:
        return [*problems, str(error)]
    problems += layout_problems(shape, config.policy.parallel) + _tokenizer_problems(root, shape.vocab)
    if shape.heads % config.rollout.tensor_parallel:
        engine = config.rollout.tensor_parallel
        problems.append(f"{shape.heads} attention heads do not divide by rollout.tensor_parallel={engine}")
    total = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if total > shape.max_positions:
        problems.append(
            f"data.max_prompt_tokens + rollout.max_response_tokens = {total}, and {root} has"
            f" {shape.max_positions} positions: lower one of them, or set policy.max_position_embeddings"
        )
    return problems + (_disk_problems(config, shape.parameters) if purpose == "train" else [])


def _sampler_problems(config: Config) -> list[str]:
    problems = []
    for name, sampler in samplers(config).items():
        if sampler.model_path is not None:
            alone = config.model_copy(update={"policy": PolicyConfig(model_path=sampler.model_path)})
            problems += [f"sampler {name}: {problem}" for problem in _model_problems(alone, "label")]
        elif sampler.api_key_env is not None and sampler.api_key_env not in os.environ:
            problems.append(f"sampler {name}: the environment has no variable {sampler.api_key_env}; export it")
    return problems


def _checkpoint_problems(key: str, root: Path) -> list[str]:
    """Missing parts of an HF checkpoint directory."""
    if not (root / "config.json").is_file():
        return [f"{key}: no config.json in {root} (relative paths start at {Path.cwd()}); set it to an HF checkpoint"]
    problems = []
    if not any((root / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        problems.append(f"{key}: no tokenizer files in {root}; copy tokenizer.json and tokenizer_config.json there")
    index = root / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    else:
        shards = {"model.safetensors"}
    missing = sorted(shard for shard in shards if not (root / shard).is_file())
    if missing:
        problems.append(f"{key}: {root} lacks {', '.join(missing)}; complete the download or convert to safetensors")
    return problems


def _tokenizer_problems(root: Path, vocab_size: int) -> list[str]:
    problems = []
    settings_file = root / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
    if "chat_template" not in settings and not (root / "chat_template.jinja").is_file():
        problems.append(f"{root}: the tokenizer has no chat template; add chat_template.jinja")
    tokenizer = root / "tokenizer.json"
    if tokenizer.is_file():
        content = json.loads(tokenizer.read_text(encoding="utf-8"))
        vocab = content["model"]["vocab"]
        # A unigram vocabulary is a list of [token, score] whose place is the id.
        ids = [*vocab.values()] if isinstance(vocab, dict) else [len(vocab) - 1]
        ids += [token["id"] for token in content.get("added_tokens", [])]
        if max(ids) >= vocab_size:
            problems.append(
                f"{tokenizer}: token ids reach {max(ids)}, and config.json has vocab_size {vocab_size}:"
                " the tokenizer belongs to another model; put the right one there"
            )
    return problems


def _function_problems(config: Config) -> list[str]:
    problems, reward = [], config.reward
    offered = offers(config.genrm, servers=config.genrm.named)
    for path, role, kwargs in (
        (reward.compute_score, COMPUTE_SCORE, reward.compute_score_kwargs),
        (config.genrm.judge_function, JUDGE_FUNCTION, None),
    ):
        try:
            if path is not None:
                function = load_function(path, role, kwargs, offered)
                if role is COMPUTE_SCORE and offered and not accepts(function, ROUTER):
                    problems.append(
                        f"reward.compute_score = {path!r} does not accept {ROUTER}, and nobody else would ask the GenRM"
                        " that `genrm` names: set genrm.enabled=false"
                    )
        except UserError as error:
            problems.append(str(error))
    return problems


def _genrm_problems(config: Config, purpose: Purpose) -> list[str]:
    genrm, problems = config.genrm, []
    asked = purpose in ("train", "label", "serve") or (purpose == "evaluate" and genrm.judge_eval)
    if not asked or not asks_genrm(config):
        return []
    if genrm.servers > 0 and genrm.model_path is not None:
        problems += _checkpoint_problems("genrm.model_path", Path(genrm.model_path))
    if genrm.api_key_env is not None and genrm.api_key_env not in os.environ:
        problems.append(f"genrm.api_key_env: the environment has no variable {genrm.api_key_env}; export the API key")
    return problems


def _disk_problems(config: Config, parameters: int) -> list[str]:
    keep = config.training.checkpoint.keep + (config.training.checkpoint.best_metric is not None)
    # One more than is kept: a checkpoint is complete before the oldest is deleted.
    need = parameters * CHECKPOINT_BYTES_PER_PARAMETER * (keep + 1)
    place = Path(config.run_dir).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free >= need:
        return []
    return [
        f"run_dir = {config.run_dir}: {keep} checkpoints and one being written take about {need / 2**30:.1f} GiB,"
        f" and {place} has {free / 2**30:.1f} GiB free: choose another run_dir, lower training.checkpoint.keep"
        " or free space"
    ]
