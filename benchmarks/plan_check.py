"""What `fapo plan` predicts of memory, beside what mcore really allocates; and the speed of the step that was measured.

    python benchmarks/plan_check.py [--device cpu|gpu] [--json FILE]

Models with random weights and no files but a config.json go through `PolicyWorker` as a run's would: built, DDP buffers
and optimizer made, log-probabilities taken, updates made. One process, one GPU; nothing is downloaded. On a CPU the
allocations are those that PyTorch's profiler saw (shapes small, megatron's own kernels), on a GPU those of PyTorch's
allocator (Transformer Engine where it can be imported).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.run_table import machine
from megatron_fapo.config.algorithm import AlgorithmConfig
from megatron_fapo.config.policy import OptimizerConfig, ParallelConfig, PolicyConfig
from megatron_fapo.plan import memory
from megatron_fapo.policy.batch import TrainSample
from megatron_fapo.policy.flops import train_flops
from megatron_fapo.policy.model import use_transformer_engine
from megatron_fapo.policy.parallel import Rank
from megatron_fapo.policy.worker import PolicyWorker

PROMPT, _PACKS = 64, 4
"""Tokens of a prompt; micro-batches of an update."""
ONE_RANK, OPTIMIZER = ParallelConfig(), OptimizerConfig(warmup_steps=0)
TINY = {"architecture": "Qwen3", "layers": 4, "hidden": 128, "ffn": 256, "heads": 4, "kv": 2, "dim": 32, "vocab": 515}
TINY |= {"tied": True}
GPU_MODELS: dict[str, dict[str, Any]] = {
    "0.5B (Qwen2.5)": {"architecture": "Qwen2", "layers": 24, "hidden": 896, "ffn": 4864, "heads": 14, "kv": 2,
                       "dim": 64, "vocab": 151936, "tied": True},
    "1.5B (Qwen2.5)": {"architecture": "Qwen2", "layers": 28, "hidden": 1536, "ffn": 8960, "heads": 12, "kv": 2,
                       "dim": 128, "vocab": 151936, "tied": True},
    "3.6B (12 layers of Qwen3-8B)": {"architecture": "Qwen3", "layers": 12, "hidden": 4096, "ffn": 12288, "heads": 32,
                                     "kv": 8, "dim": 128, "vocab": 151936, "tied": False},
}  # fmt: skip
CPU_MODELS: dict[str, dict[str, Any]] = {
    "tiny Qwen3": TINY,
    "tiny Qwen2": TINY | {"architecture": "Qwen2", "tied": False},
    "tiny Qwen3Moe": TINY | {"architecture": "Qwen3Moe", "experts": (4, 2, 64)},
    "36M Qwen3": TINY | {"layers": 6, "hidden": 384, "ffn": 1024, "heads": 6, "dim": 64, "vocab": 32000},
}  # fmt: skip
# Model -> (recompute, micro_batch_tokens, tokens of a sample).
GPU_CASES = {
    "0.5B (Qwen2.5)": (("none", 4096, 1024), ("none", 16384, 1024), ("full", 16384, 4096)),
    "1.5B (Qwen2.5)": (("none", 8192, 2048), ("full", 16384, 2048)),
    "3.6B (12 layers of Qwen3-8B)": (("full", 4096, 4096), ("none", 4096, 2048), ("full", 8192, 2048)),
}
CPU_CASES = {
    "tiny Qwen3": (("none", 512, 128), ("selective", 512, 128), ("full", 512, 128)),
    "tiny Qwen2": (("none", 512, 128), ("full", 512, 256)),
    "tiny Qwen3Moe": (("none", 512, 128), ("full", 512, 128)),
    "36M Qwen3": (("none", 512, 128), ("selective", 512, 256), ("full", 512, 128)),
}


def write_config(directory: Path, model: dict[str, Any]) -> Path:
    """A checkpoint directory that has a config.json and nothing else."""
    raw = {
        "architectures": [f"{model['architecture']}ForCausalLM"],
        "num_hidden_layers": model["layers"], "hidden_size": model["hidden"], "intermediate_size": model["ffn"],
        "num_attention_heads": model["heads"], "num_key_value_heads": model["kv"], "head_dim": model["dim"],
        "vocab_size": model["vocab"], "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": model["tied"],
    }  # fmt: skip
    if "experts" in model:
        names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
        raw |= dict(zip(names, model["experts"], strict=True))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def random_weights(chunks: Any, *_: Any) -> None:
    """In place of reading them: nothing that is measured depends on their values."""
    for parameter in itertools.chain.from_iterable(chunk.parameters() for chunk in chunks):
        torch.nn.init.normal_(parameter.data, 0.0, 0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter.data)


def alone() -> Rank:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return Rank(0, 1, "127.0.0.1", int(free.getsockname()[1]))


def make_worker(rank: Rank, cfg: PolicyConfig, device: str) -> PolicyWorker:
    dtype = "bfloat16" if device == "gpu" else "float32"
    with mock.patch("megatron_fapo.policy.hf_weights.load_hf", random_weights):
        return PolicyWorker(rank, cfg, AlgorithmConfig(), device=device, dtype=dtype, seed=1)


def samples(count: int, tokens: int) -> list[TrainSample]:
    response = tokens - PROMPT
    ids = tuple(i * 37 % 500 for i in range(tokens))
    return [TrainSample(ids[:PROMPT], ids[PROMPT:], 1.0, (-6.0,) * response, None) for _ in range(count)]


def packs(count: int, tokens: int, length: int) -> list[list[TrainSample]]:
    """Micro-batches of `tokens`, all full."""
    return [samples(tokens // length, length) for _ in range(count)]


def cpu_peak(work: Callable[[], Any]) -> tuple[int, float]:
    """(most bytes allocated at once on top of what there was, seconds), from the profiler's record of the allocator."""
    began = time.monotonic()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    seconds = time.monotonic() - began
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]"]
    live = peak = 0
    for _, _, change in sorted(changes):
        live += change
        peak = max(peak, live)
    return peak, seconds


def gpu_peak(work: Callable[[], Any]) -> tuple[int, float]:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, time.monotonic() - began


def state_bytes(worker: PolicyWorker) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state that the rank really holds."""
    buffers = [buffer for ddp in worker.ddp for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers)]
    optimizer = 0
    for part in getattr(worker.optimizer, "chained_optimizers", [worker.optimizer]):
        for parameter, state in part.optimizer.state.items():
            optimizer += sum(v.nbytes for v in state.values() if torch.is_tensor(v) and v.dim())
            optimizer += parameter.nbytes if parameter.dtype == torch.float32 and part.config.bf16 else 0
    return {
        "weights": sum(b.param_data.nbytes for b in buffers),
        "gradients": sum(b.grad_data.nbytes for b in buffers),
        "optimizer": optimizer,
    }


def check(
    rank: Rank, name: str, model: dict[str, Any], case: tuple[str, int, int], device: str, path: Path,
    parallel: ParallelConfig = ONE_RANK, optimizer: OptimizerConfig = OPTIMIZER,
) -> dict[str, Any]:  # fmt: skip
    """One model in one setting: predicted and real bytes of this rank, seconds and MFU of an update."""
    recompute, tokens, length = case
    cfg = PolicyConfig(
        model_path=str(write_config(path / name.replace(" ", "-"), model)), recompute=recompute, parallel=parallel,
        micro_batch_tokens=tokens, logprob_micro_batch_tokens=tokens, optimizer=optimizer,
    )  # fmt: skip
    # gloo's threads let go of tensors when they get to it, which can only add to a peak.
    measure, times = (gpu_peak, 1) if device == "gpu" else (cpu_peak, 3 if parallel.world_size > 1 else 1)

    def peak(work: Callable[[], Any]) -> tuple[int, float]:
        return min(measure(work) for _ in range(times))

    logging.getLogger("megatron").setLevel(logging.ERROR)
    worker = make_worker(rank, cfg, device)
    stage = worker.state.get_pipeline_model_parallel_rank()
    element, fused = (2, use_transformer_engine()) if device == "gpu" else (4, False)
    inputs = packs(_PACKS, tokens, length)
    responses = tokens // length * (length - PROMPT)
    pack = memory.Pack(tokens // parallel.context, responses // parallel.context)
    worker.train(inputs)  # compilation, libraries' workspaces, Adam's state where it is made late
    worker.logprobs(inputs)
    real_state = state_bytes(worker)
    logprob_bytes, logprob_s = peak(lambda: worker.logprobs(inputs))
    train_bytes, train_s = peak(lambda: worker.gradients(inputs))
    step_bytes, step_s = (train_bytes, train_s) if device == "cpu" else peak(lambda: worker.train(inputs))
    predicted_state = memory.rank_state(worker.shape, cfg, stage, element)
    working = memory.train_working(worker.shape, cfg, stage, pack, _PACKS, element, fused)
    scoring = memory.logprob_working(worker.shape, cfg, stage, pack, element, fused)
    inputs_bytes = memory.BATCH_BYTES * pack.tokens
    base = sum(predicted_state.values())
    flops = train_flops(worker.shape, [s.tokens for each in inputs for s in each], _PACKS * responses)
    result: dict[str, Any] = {
        "model": name, "parameters": worker.shape.parameters, "recompute": recompute, "micro_batch_tokens": tokens,
        "sample_tokens": length, "element": element, "fused": fused,
        "state": {"predicted": predicted_state, "real": real_state},
        "train": {"predicted": base + sum(working.values()) + inputs_bytes, "parts": working,
                  "real": sum(real_state.values()) + train_bytes},
        "logprobs": {"predicted": base + sum(scoring.values()) + inputs_bytes, "parts": scoring,
                     "real": sum(real_state.values()) + logprob_bytes},
        "update_bytes": step_bytes,
        "update_s": step_s, "logprobs_s": logprob_s, "tokens_per_s": _PACKS * tokens / step_s,
        "model_tflops_per_s": flops / step_s / 1e12,
    }  # fmt: skip
    if device == "gpu":
        free, total = torch.cuda.mem_get_info()
        result |= {
            "allocated_at_rest": torch.cuda.memory_allocated(),
            "reserved_peak": torch.cuda.max_memory_reserved(),
            "outside_allocator": total - free - torch.cuda.memory_reserved(),
            "mfu": flops / step_s / 989e12,
        }
    for phase in ("train", "logprobs"):
        result[phase]["error"] = result[phase]["predicted"] / result[phase]["real"] - 1
        beside = result[phase]["real"] - sum(real_state.values())
        result[phase]["working_error"] = (result[phase]["predicted"] - base) / beside - 1
    worker.close()
    return result


def release(device: str) -> None:
    """Give the memory of a worker that is gone back, so that the next case starts from nothing."""
    gc.collect()
    if device == "gpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    models, cases = (GPU_MODELS, GPU_CASES) if args.device == "gpu" else (CPU_MODELS, CPU_CASES)
    rows = []
    print(f"{'':<30}{'recompute':>10}{'tokens':>8}{'state':>8}{'train':>20}{'logprobs':>20}{'MFU':>7}{'tokens/s':>10}")
    with tempfile.TemporaryDirectory() as path:
        for name, model in models.items():
            for case in cases[name]:
                row = check(alone(), name, model, case, args.device, Path(path))
                release(args.device)
                rows.append(row)
                state = sum(row["state"]["predicted"].values()) / sum(row["state"]["real"].values()) - 1
                cells = "".join(
                    f"{row[p]['real'] / 2**20:>10,.0f}M {row[p]['error']:>+8.1%}" for p in ("train", "logprobs")
                )
                speed = f"{row.get('mfu', 0):>7.2f}{row['tokens_per_s']:>10,.0f}"
                print(f"{name:<30}{case[0]:>10}{case[1]:>8}{state:>+8.2%}{cells}{speed}", flush=True)
                if args.json:  # after every case: a run that is cut off keeps what it has
                    args.json.write_text(json.dumps({"machine": machine(), "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
