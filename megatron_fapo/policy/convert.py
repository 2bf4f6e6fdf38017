"""`fapo convert`: HF checkpoint to the policy's distributed format and back, without an optimizer and without Ray.

hf-to-megatron  HF directory           -> directory with weights and hf/ (the model's description)
megatron-to-hf  such a directory, or   -> HF directory that vLLM and transformers load
                a run's checkpoint
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_fapo.config.policy import PolicyConfig
from megatron_fapo.device import choose_device
from megatron_fapo.errors import UserError
from megatron_fapo.policy.actor import copy_model_files


def convert_command(direction: str, *, source: Path, target: Path) -> int:
    """Convert `source` into the new directory `target`; returns the exit code.

    Weights keep the type that config.json names; a round trip is bitwise.

    Raises:
        UserError: `source` is not a checkpoint of the expected kind, or `target` exists and is not empty.
    """
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} exists and is not empty; give a new directory")
    if direction == "hf-to-megatron":
        _hf_to_megatron(source, target)
    else:
        _megatron_to_hf(source, target)
    print(target)
    return 0


def _single_rank_model(description: Path) -> tuple[Any, Any]:
    """(mcore model, ModelShape) on one rank, for the config.json in `description`; weights not loaded."""
    import torch

    if choose_device("auto") == "cpu":
        from megatron_fapo.policy import cpu_backend

        cpu_backend.install()
    from megatron.core import parallel_state, tensor_parallel

    from megatron_fapo.policy.hf_config import read_model_shape
    from megatron_fapo.policy.model import build_model

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        backend = "gloo" if choose_device("auto") == "cpu" else "nccl"
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(0)
    shape = read_model_shape(description)
    cfg = PolicyConfig(model_path=str(description))
    return build_model(shape, cfg, getattr(torch, shape.dtype)), shape


def _hf_to_megatron(source: Path, target: Path) -> None:
    from megatron.core import dist_checkpointing

    from megatron_fapo.policy.checkpoint import metadata, write_in_this_process
    from megatron_fapo.policy.hf_weights import load_hf

    model, shape = _single_rank_model(source)
    load_hf(model, shape, source)
    target.mkdir(parents=True, exist_ok=True)
    write_in_this_process()
    weights = model.sharded_state_dict(prefix="model.", metadata=metadata())
    dist_checkpointing.save({"model": weights}, str(target))
    copy_model_files(source, target / "hf")


def _megatron_to_hf(source: Path, target: Path) -> None:
    from megatron.core import dist_checkpointing

    from megatron_fapo.policy.checkpoint import metadata
    from megatron_fapo.policy.hf_weights import export_hf, save_stage, write_index

    # A run's checkpoint keeps the policy in a directory of its own.
    source = source / "policy" if (source / "policy").is_dir() else source
    if not (source / "metadata.json").is_file() or not (source / "hf").is_dir():
        raise UserError(f"{source} is not a policy checkpoint (metadata.json and hf/ are missing)")
    model, shape = _single_rank_model(source / "hf")
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict(prefix="model.", metadata=metadata())}, source)
    model.load_state_dict({name.removeprefix("model."): t for name, t in loaded["model"].items()})
    copy_model_files(source / "hf", target)
    write_index(target, [save_stage(export_hf(model, shape), target, 0, 1)])
    _set_dtype(target, shape.dtype)


def _set_dtype(directory: Path, dtype: str) -> None:
    """config.json names the type of the weights beside it."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config.pop("torch_dtype", None)
    path.write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n")
