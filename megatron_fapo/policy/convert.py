"""`fapo convert`: HF checkpoints to megatron's distributed format and back, for models larger than memory.

hf-to-megatron  HF directory -> what Megatron-LM's --load takes: latest_checkpointed_iteration.txt and release/, which
                holds the weights and in hf/ what describes the model
megatron-to-hf  such a directory, a run's checkpoint or the policy/ in it, saved under any layout, with or without an
                optimizer -> HF directory that vLLM and transformers load

Both go parameter by parameter, without Ray, GPUs or other processes. What is written appears under its name when it is
complete; until then it is NAME.partial.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_fapo.config.policy import ParallelConfig
from megatron_fapo.errors import UserError
from megatron_fapo.observe.files import force_to_disk
from megatron_fapo.policy.actor import copy_model_files
from megatron_fapo.policy.describe import (
    WHOLE,
    Parameter,
    RankContents,
    conversion_layout,
    describe_rank,
    taking_the_part_of,
)
from megatron_fapo.policy.hf_config import ModelShape, layout_problems, read_model_shape
from megatron_fapo.policy.hf_weights import HFCheckpoint, shard_name, write_index
from megatron_fapo.policy.stored import PARTIAL, RELEASE, StoredWeights, weights_of
from megatron_fapo.policy.streams import SHARD_BYTES, deal, write_megatron, write_safetensors
from megatron_fapo.policy.verify import LIMIT, Agreement, compare


def hf_to_megatron(hf: Path, out: Path, *, tensor: int, pipeline: int, expert: int, verify: bool) -> int:
    """Convert the HF checkpoint `hf` into the new directory `out`, in one file per rank of these model-parallel sizes.

    Any layout loads it; the one that it was cut for reads the least. Weights get the type that config.json names.
    Returns the exit code.

    Raises:
        UserError: all that is wrong with `hf`, the layout and `out`; then nothing was written.
    """
    shape = read_model_shape(hf)
    parallel = conversion_layout(shape, tensor, pipeline, expert)
    dtype, source = getattr(torch, shape.dtype), HFCheckpoint(hf)
    problems = _layout_problems(shape, parallel)
    problems += _hf_problems(source, shape, describe_rank(shape, WHOLE, 0, dtype))
    problems += _out_problems(out, shape.parameters * dtype.itemsize)
    if problems:
        raise UserError("\n  ".join([f"{hf} cannot be converted:", *problems]))

    def cut(parameter: Parameter) -> torch.Tensor:
        whole = [source[name] for name in parameter.rule.hf_names]
        return parameter.rule.split(whole, parameter.tensor_ranks, parameter.tensor_rank).to(dtype)

    partial = _begin(out)
    release = partial / RELEASE
    copy_model_files(hf, release / "hf")
    # Without its version, Megatron-LM would reorder Q, K and V as it does for checkpoints of 2019.
    common = {"checkpoint_version": 3.0, "iteration": 0}
    ranks = [describe_rank(shape, parallel, rank, dtype) for rank in range(parallel.world_size)]
    write_megatron(release, ranks, cut, common, on_file=_say)
    (partial / "latest_checkpointed_iteration.txt").write_text(RELEASE + "\n")
    return _finish(partial, out, lambda: compare(hf, release), verify=verify)


def megatron_to_hf(megatron: Path, out: Path, *, verify: bool) -> int:
    """Convert the megatron checkpoint `megatron` into the new HF directory `out`, in files of at most 5 GB.

    Weights keep the type in which they were saved, and config.json names it. Returns the exit code.

    Raises:
        UserError: `megatron` is no complete checkpoint of the model that it describes, or what is wrong with `out`.
    """
    source = weights_of(megatron)
    shape = read_model_shape(source / "hf")
    stored = StoredWeights(source, describe_rank(shape, WHOLE, 0, torch.float32).parameters)
    planned = stored.hf_tensors()
    if problems := _out_problems(out, sum(entry.nbytes for entry in planned)):
        raise UserError("\n  ".join(problems))
    partial = _begin(out)
    copy_model_files(source / "hf", partial)
    _set_dtype(partial, planned[0].dtype)
    files = deal(planned, SHARD_BYTES)
    with taking_the_part_of(0, WHOLE):
        tensors = stored.read()
        for number, contents in enumerate(files):
            write_safetensors(partial / shard_name(number, len(files)), contents, tensors)
            _say(number + 1, len(files))
    write_index(partial, [[entry.name for entry in contents] for contents in files])
    return _finish(partial, out, lambda: compare(partial, source), verify=verify)


def _layout_problems(shape: ModelShape, parallel: ParallelConfig) -> list[str]:
    """In the words of the command line."""
    options = {"tensor": "--tp", "pipeline": "--pp", "expert": "--ep"}
    problems = layout_problems(shape, parallel)
    for field, option in options.items():
        problems = [problem.replace(f"policy.parallel.{field}=", f"{option} ") for problem in problems]
    return problems


def _hf_problems(source: HFCheckpoint, shape: ModelShape, whole: RankContents) -> list[str]:
    """How the tensors of an HF checkpoint differ from those of the model that its config.json describes."""
    wanted = {
        name: expected
        for parameter in whole.parameters
        for name, expected in zip(parameter.rule.hf_names, parameter.rule.hf_shapes, strict=True)
    }
    present = set(source.names())
    problems = [f"tensor {name} is missing" for name in wanted.keys() - present]
    problems += [
        f"tensor {name} has shape {tuple(source[name].shape)} where config.json asks for {wanted[name]}"
        for name in wanted.keys() & present
        if tuple(source[name].shape) != wanted[name]
    ]
    # A tied output layer and tables of rotary frequencies are copies of what is known anyway.
    known = {"lm_head.weight"} if shape.tied else set()
    problems += [
        f"tensor {name} belongs to no parameter of a {shape.architecture}"
        for name in present - wanted.keys() - known
        if not name.endswith("rotary_emb.inv_freq")
    ]
    return sorted(problems)


def _out_problems(out: Path, nbytes: int) -> list[str]:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return [f"{out} exists and is not empty; give a new directory"]
    parent = next(path for path in out.resolve().parents if path.exists())
    if (free := shutil.disk_usage(parent).free) < nbytes:
        return [f"{out} needs {nbytes / 2**30:.1f} GiB and {parent} has {free / 2**30:.1f} GiB free: free some"]
    return []


def _begin(out: Path) -> Path:
    """The empty directory to fill; what an interruption has left of it goes."""
    partial = out.with_name(out.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def _finish(partial: Path, out: Path, agreement: Callable[[], Agreement], *, verify: bool) -> int:
    """Give what was filled its name, once it is on disk and, if asked for, verified. Returns the exit code."""
    if verify:
        found = agreement()
        print(
            f"log-probabilities of {found.tokens} tokens by megatron-core and transformers differ by at most "
            f"{found.largest:.1e} and on average {found.mean:.1e} nats; the limit is {LIMIT:g}"
        )
        if not found.largest <= LIMIT:  # nor NaN
            print(f"fapo: the converted model is not the same; {partial} is left for inspection", file=sys.stderr)
            return 1
    for path in (*partial.rglob("*"), partial):
        force_to_disk(path)
    partial.rename(out)
    force_to_disk(out.parent)
    print(out)
    return 0


def _set_dtype(directory: Path, dtype: torch.dtype) -> None:
    """config.json names the type of the weights beside it."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config.pop("torch_dtype", None)
    path.write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n")


def _say(done: int, of: int) -> None:
    print(f"file {done} of {of} is written", file=sys.stderr)
