"""Models as a vLLM worker holds them, without engines: two processes that import vLLM once and build tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from megatron_fapo.weight_sync.landing import Landing
from megatron_fapo.weight_sync.trace import Checkpoint

HIDDEN, HEADS, FFN, EXPERTS, EXPERT_FFN, LAYERS = 64, 4, 128, 4, 32, 2
VOCAB = 515  # odd: padded rows, all of them on the last rank


@dataclass(frozen=True)
class Case:
    family: str
    tied: bool = False
    kv_heads: int = 2

    @property
    def head_dim(self) -> int:
        return 32 if self.family.startswith("qwen3") else HIDDEN // HEADS

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """HF name -> shape, as transformers names and shapes them."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
        kv = self.kv_heads * self.head_dim
        for layer in (f"model.layers.{i}" for i in range(LAYERS)):
            attention = f"{layer}.self_attn"
            for part, rows in (("q", HEADS * self.head_dim), ("k", kv), ("v", kv)):
                found[f"{attention}.{part}_proj.weight"] = (rows, HIDDEN)
                if self.family == "qwen2":
                    found[f"{attention}.{part}_proj.bias"] = (rows,)
                if self.family.startswith("qwen3") and part != "v":
                    found[f"{attention}.{part}_norm.weight"] = (self.head_dim,)
            found[f"{attention}.o_proj.weight"] = (HIDDEN, HEADS * self.head_dim)
            mlps, width = [f"{layer}.mlp"], FFN
            if self.family == "qwen3_moe":
                found[f"{layer}.mlp.gate.weight"] = (EXPERTS, HIDDEN)
                mlps, width = [f"{layer}.mlp.experts.{i}" for i in range(EXPERTS)], EXPERT_FFN
            for mlp in mlps:
                found[f"{mlp}.gate_proj.weight"] = found[f"{mlp}.up_proj.weight"] = (width, HIDDEN)
                found[f"{mlp}.down_proj.weight"] = (HIDDEN, width)
            found[f"{layer}.input_layernorm.weight"] = found[f"{layer}.post_attention_layernorm.weight"] = (HIDDEN,)
        found["model.norm.weight"] = (HIDDEN,)
        if not self.tied:
            found["lm_head.weight"] = (VOCAB, HIDDEN)
        return found

    def checkpoint(self) -> Checkpoint:
        return {name: (shape, "float32") for name, shape in self.shapes().items()}

    def tensors(self, seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(shape, generator=generator) for name, shape in self.shapes().items()}

    def write(self, directory: Path, seed: int) -> str:
        """A checkpoint directory, from which vLLM loads."""
        from safetensors.torch import save_file

        from tests.policy.models import write_config

        directory.mkdir(parents=True)
        write_config(directory, self.family, self.tied)
        path = directory / "config.json"
        path.write_text(
            json.dumps(
                json.loads(path.read_text())
                | {
                    "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "layer_types": None,
                    "head_dim": self.head_dim, "num_attention_heads": HEADS, "num_key_value_heads": self.kv_heads,
                    "num_experts": EXPERTS, "moe_intermediate_size": EXPERT_FFN,
                }
            )
        )  # fmt: skip
        save_file(self.tensors(seed), directory / "model.safetensors", {"format": "pt"})
        return str(directory)


def _start(rank: int, rendezvous: str) -> None:
    import tests.weight_sync.vllm_preload  # noqa: F401  (forkserver forgets what failed in it)

    global _rank, _rendezvous
    _rank, _rendezvous = rank, rendezvous


def build(path: str, tensor_parallel: int) -> tuple[Any, Any]:
    """The model and its configuration, loaded by vLLM from a checkpoint directory."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    config = EngineArgs(
        model=path, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=128,
        tensor_parallel_size=tensor_parallel, seed=0,
    ).create_engine_config()  # fmt: skip
    with set_current_vllm_config(config):
        parallel_state.init_distributed_environment(2, _rank, f"file://{_rendezvous}", _rank, "gloo")
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor_parallel)
        return get_model(vllm_config=config), config


def contents(model: Any) -> dict[str, torch.Tensor]:
    """Everything that kernels compute with: parameters, buffers, and what packed copies give for the identity."""
    found = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    found = {name: tensor.detach().clone() for name, tensor in found.items()}
    for name, layer in model.named_modules():
        if hasattr(layer, "cpu_linear"):
            names = ("input_size_per_partition", "input_size", "embedding_dim")
            width = next(getattr(layer, size) for size in names if hasattr(layer, size))
            found[f"{name}.packed"] = layer.cpu_linear(torch.eye(width), layer.weight, None)
        for experts, width in (("gate_up_linear", "hidden_dim"), ("down_linear", "intermediate_size_per_partition")):
            for i, packed in enumerate(getattr(layer, experts, ())):
                found[f"{name}.{experts}.{i}"] = packed(torch.eye(getattr(layer.moe_config, width)))
    return found


def different(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not equal bit for bit."""
    return sorted(one.keys() ^ other.keys()) + [n for n in one if n in other and not torch.equal(one[n], other[n])]


def refit(landing: Landing, tensors: Mapping[str, torch.Tensor], leave_out: str = "") -> None:
    """What executors do: every region of the index, in its order."""
    landing.begin()
    for region in landing.index().regions:
        if region.name == leave_out:
            continue
        box = tuple(slice(first, first + n) for first, n in zip(region.start, region.shape, strict=True))
        view = region.view
        landing.view(view.tensor, view.offset, region.shape, view.stride).copy_(tensors[region.name][box])
        landing.wrote(view.tensor, tensors[region.name][box].numel())
    landing.finish()


class VllmRanks:
    """Two processes with vLLM; they start when first used, and again after a failure."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._pools: list[ProcessPoolExecutor] = []

    def run[T](self, function: Callable[..., T], *args: Any) -> list[T]:
        """The function's results on both ranks: setting up parallelism takes both, whatever its degree."""
        if not self._pools:
            context = get_context("forkserver")
            context.set_forkserver_preload(["tests.weight_sync.vllm_preload"])
            rendezvous = str(self._directory / str(uuid4()))
            self._pools = [ProcessPoolExecutor(1, context, _start, (rank, rendezvous)) for rank in range(2)]
        futures = [pool.submit(function, *args) for pool in self._pools]
        done, _ = wait(futures, 240, FIRST_EXCEPTION)
        if any(future.exception() for future in done) or len(done) < len(futures):
            self.close()  # the other rank may wait for the failed one for ever
        return [future.result(0) for future in sorted(futures, key=lambda future: future not in done)]

    def close(self) -> None:
        for pool in self._pools:
            for process in list(pool._processes.values()):
                process.kill()
            pool.shutdown(cancel_futures=True)
        self._pools = []
