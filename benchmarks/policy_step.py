"""Train steps and log-probability passes of the policy alone, by layout: seconds, tokens/s, MFU, memory, waste.

    python benchmarks/policy_step.py --model Qwen3-8B --layers 12 --set policy.recompute=selective
    python benchmarks/policy_step.py --model Qwen3-8B --layout TP2+SP PP2 --sequence-tokens 4096 --samples 8
    python benchmarks/policy_step.py --model Qwen2.5-0.5B --lengths mean=900,p99=4000 --samples 64
    python benchmarks/policy_step.py --model tiny --layout TP1 TP2 TP2+SP PP2 DP2      # on a CPU: relative cost

Prints one line of JSON per layout. Weights are random, and the same in every layout: `logprob_mean` and the first
`grad_norm` must agree between layouts to rounding. Each rank is a process with one GPU of this host; Ray and vLLM have
no part in it. A step is forward, backward and optimizer over all samples; seconds are medians after the warm-up.

MFU counts, per step, over the samples' own tokens (no padding, nothing that is recomputed):
    mfu     6 x weights of the layers x tokens + 6 x hidden x vocabulary x response tokens
            + 6 x layers x heads x head size x sum of length^2 (causal half of the attention scores)
    mfu_6n  6 x all weights, embedding included, x tokens + the same attention term: as baselines often count it
over seconds x GPUs x the dense bf16 peak (989e12 for H100 SXM and H200). Of a mixture of experts only the weights that
a token meets count.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import resource
import socket
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from kernel_groups import summarize

from megatron_fapo.config.algorithm import AlgorithmConfig
from megatron_fapo.config.load import load_config
from megatron_fapo.config.root import Config
from megatron_fapo.errors import UserError
from megatron_fapo.plan.lengths import find_lengths
from megatron_fapo.plan.shapes import find_shape
from megatron_fapo.policy import hf_weights
from megatron_fapo.policy.batch import TrainSample
from megatron_fapo.policy.hf_config import ModelShape, layout_problems, read_model_shape
from megatron_fapo.policy.packing import CostModel, schedule_for, waste
from megatron_fapo.policy.parallel import Rank
from megatron_fapo.policy.worker import PolicyWorker

TINY = ModelShape(
    architecture="Qwen3ForCausalLM", layers=4, hidden=256, ffn=768, heads=4, kv_heads=2, head_dim=64, vocab=4096,
    max_positions=4096, rope_theta=1e6, rope_scaling=None, norm_eps=1e-6, tied=True, qkv_bias=False, qk_norm=True,
    dtype="float32",
)  # fmt: skip
DIMENSIONS = {
    "tp": "tensor", "pp": "pipeline", "vpp": "virtual_pipeline", "cp": "context", "ep": "expert",
    "etp": "expert_tensor", "dp": "data",
}  # fmt: skip
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}


@dataclasses.dataclass(frozen=True)
class Job:
    """What every rank of a layout does."""

    config: Config
    samples: list[TrainSample]
    steps: int
    warmup: int
    device: str
    dtype: str
    port: int
    profile: Path | None


class RandomCheckpoint:
    """In place of the safetensors of an HF directory: each tensor is drawn from a seed of its own name, so that every
    layout has the same model and nothing is written."""

    def __init__(self, path: str | Path) -> None:
        self.shape = read_model_shape(path)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = getattr(torch, self.shape.dtype)

    def __getitem__(self, name: str) -> torch.Tensor:
        size = tensor_size(name, self.shape)
        if len(size) == 1:
            fill = torch.zeros if name.endswith("bias") else torch.ones
            return fill(size, device=self.device, dtype=self.dtype)
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        return torch.randn(size, generator=generator, device=self.device, dtype=self.dtype).mul_(0.02)


def tensor_size(name: str, shape: ModelShape) -> tuple[int, ...]:
    """Of a tensor of the HF checkpoint."""
    q, kv, hidden = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.hidden
    ffn = shape.experts.ffn if shape.experts else shape.ffn
    part, kind = name.split(".")[-2:]
    out = {"q_proj": q, "k_proj": kv, "v_proj": kv, "q_norm": shape.head_dim, "k_norm": shape.head_dim}
    if kind == "bias" or part.endswith("norm"):
        return (out.get(part, hidden),)
    out |= {"o_proj": hidden, "gate_proj": ffn, "up_proj": ffn, "down_proj": hidden}
    out |= {"embed_tokens": shape.vocab, "lm_head": shape.vocab, "gate": shape.experts.count if shape.experts else 0}
    return out[part], {"o_proj": q, "down_proj": ffn}.get(part, hidden)


def write_config(shape: ModelShape, directory: Path) -> None:
    """config.json of the shape, as `read_model_shape` reads it."""
    raw: dict[str, Any] = {
        "architectures": [shape.architecture],
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.max_positions,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tied,
        "dtype": shape.dtype,
    }
    if shape.experts:
        raw |= {
            "num_experts": shape.experts.count,
            "num_experts_per_tok": shape.experts.per_token,
            "moe_intermediate_size": shape.experts.ffn,
            "norm_topk_prob": shape.experts.normalised,
        }
    (directory / "config.json").write_text(json.dumps(raw))


def parse_layout(text: str) -> dict[str, Any]:
    """`TP2xPP2+SP` -> fields of policy.parallel."""
    fields: dict[str, Any] = {}
    for part in re.split("[x+]", text.lower()):
        match = re.fullmatch(r"([a-z]+)(\d+)", part)
        if part == "sp":
            fields["sequence_parallel"] = True
        elif match and match[1] in DIMENSIONS:
            fields[DIMENSIONS[match[1]]] = int(match[2])
        else:
            raise UserError(f"--layout {text}: {part}: write sp or a number after one of {', '.join(DIMENSIONS)}")
    return fields


def draw_samples(lengths: Sequence[tuple[int, int]], vocab: int) -> list[TrainSample]:
    """Samples of random tokens, (prompt, response) tokens long, with all that the policy loss asks for."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for i, (prompt, response) in enumerate(lengths):
        tokens = torch.randint(0, vocab, (prompt + response,), generator=generator).tolist()
        old = (-torch.log(torch.tensor(float(vocab))),) * response
        samples.append(
            TrainSample(
                prompt_ids=tuple(tokens[:prompt]),
                response_ids=tuple(tokens[prompt:]),
                advantage=1.0 if i % 2 else -1.0,
                old_logprobs=tuple(map(float, old)),
            )
        )
    return samples


def timed(function: Callable[[], Any], device: str) -> tuple[float, Any]:
    """(seconds until all ranks are done, result of this one)."""

    def meet() -> None:
        if device == "gpu":
            torch.cuda.synchronize()
        torch.distributed.barrier()

    meet()
    begin = time.perf_counter()
    result = function()
    meet()
    return time.perf_counter() - begin, result


def run_rank(rank: int, job: Job, results: Any) -> None:
    """One rank, from its start to the row that it puts into `results`."""
    policy = job.config.policy
    if job.device == "gpu":  # a policy rank takes the first card that it sees
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[rank] if visible else str(rank)
    hf_weights.HFCheckpoint = RandomCheckpoint  # type: ignore[assignment,misc]
    worker = PolicyWorker(
        Rank(rank, policy.parallel.world_size, "127.0.0.1", job.port),
        policy,
        AlgorithmConfig(),
        device=job.device,
        dtype=job.dtype,
        seed=0,
    )
    cost, lengths = CostModel.from_shape(worker.shape), [s.tokens for s in job.samples]

    def packs(max_tokens: int) -> list[list[TrainSample]]:
        dealt = schedule_for(policy.parallel, cost, lengths, max_tokens).micro_batches[worker.data_rank]
        return [[job.samples[i] for i in pack] for pack in dealt]

    training, scoring = packs(policy.micro_batch_tokens), packs(policy.logprob_micro_batch_tokens)

    def update() -> float:
        with torch.profiler.record_function("optimizer"):
            updated, norm, _ = worker.optimizer.step()
        assert updated, "gradients hold inf or nan"
        worker.scheduler.step(increment=1)
        return float(norm)

    if job.device == "gpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    score_s, logprobs = zip(*(timed(lambda: worker.logprobs(scoring), job.device) for _ in range(2)), strict=True)
    model_s, update_s, norms = [], [], []
    for _ in range(job.warmup + job.steps):
        model_s.append(timed(lambda: worker.gradients(training), job.device)[0])
        seconds, norm = timed(update, job.device)
        update_s.append(seconds)
        norms.append(norm)
    values = [x for pack in logprobs[0] or () for sample in pack for x in sample.tolist()]
    row = {
        "reports": worker.reports and worker.context[0] == 0,
        "logprobs": (sum(values), len(values)),
        "grad_norm": norms[0],
        "score_s": score_s[-1],
        "model_s": model_s[job.warmup :],
        "update_s": update_s[job.warmup :],
        "micro_batches": len(training),
        "gpu": torch.cuda.get_device_name() if job.device == "gpu" else "none",
        "gib": torch.cuda.max_memory_allocated() / 2**30
        if job.device == "gpu"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    if job.profile is not None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if job.device == "gpu" else []
        with torch.profiler.profile(activities=activities) as profile:
            seconds, _ = timed(lambda: (worker.gradients(training), update()), job.device)
        if rank == 0:
            row["profile_ms"], text = summarize(profile, seconds)
            job.profile.write_text(text)
    results.put(row)
    worker.close()


def measure(name: str, job: Job, shape: ModelShape) -> dict[str, Any]:
    """The layout's row."""
    policy, world = job.config.policy, job.config.policy.parallel.world_size
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(run_rank, args=(job, results), nprocs=world)
    ranks = [results.get() for _ in range(world)]
    lengths, tokens = [s.tokens for s in job.samples], sum(s.tokens for s in job.samples)
    cost = CostModel.from_shape(shape)
    lost = waste(
        schedule_for(policy.parallel, cost, lengths, policy.micro_batch_tokens),
        lengths,
        cost,
        max_tokens=policy.micro_batch_tokens,
        round_to=2 * policy.parallel.context if policy.parallel.context > 1 else 1,
    )
    first, (total, count) = ranks[0], map(sum, zip(*(r["logprobs"] for r in ranks if r["reports"]), strict=True))
    step_s = statistics.median(a + b for a, b in zip(first["model_s"], first["update_s"], strict=True))
    row = {
        "layout": name,
        "ranks": world,
        "step_s": round(step_s, 4),
        "steps_s": [round(a + b, 4) for a, b in zip(first["model_s"], first["update_s"], strict=True)],
        "optimizer_s": round(statistics.median(first["update_s"]), 4),
        "logprobs_s": round(first["score_s"], 4),
        "tokens": tokens,
        "tokens_per_s_per_rank": round(tokens / step_s / world),
        "logprob_tokens_per_s_per_rank": round(tokens / first["score_s"] / world),
        "micro_batches": first["micro_batches"],
        "peak_gib": round(max(r["gib"] for r in ranks), 2),
        "waste": round(lost.total, 4),
        "padding": round(lost.padding, 4),
        "logprob_mean": round(total / count, 6),
        "grad_norm": first["grad_norm"],
    }
    gpu = first["gpu"]
    peak = next((flops for key, flops in PEAK_FLOPS.items() if key in gpu and "PCIe" not in gpu), None)
    if peak is not None:
        responses = sum(len(s.response_ids) for s in job.samples)
        mfu = step_flops(shape, lengths, responses)
        row |= {key: round(flops / step_s / world / peak, 4) for key, flops in mfu.items()}
    profiles = [r["profile_ms"] for r in ranks if "profile_ms" in r]
    return row | {"gpu": gpu} | ({"profile_ms": profiles[0]} if profiles else {})


def step_flops(shape: ModelShape, lengths: Sequence[int], responses: int) -> dict[str, float]:
    """FLOPs of a step by both ways of counting, as the head of this file says."""
    head, tokens = shape.hidden * shape.vocab, sum(lengths)
    layers = shape.active_parameters - head * (1 if shape.tied else 2)
    scores = 6.0 * shape.layers * shape.heads * shape.head_dim * sum(n * n for n in lengths)
    return {
        "mfu": 6.0 * layers * tokens + 6.0 * head * responses + scores,
        "mfu_6n": 6.0 * shape.active_parameters * tokens + scores,
    }


def find_model(args: argparse.Namespace) -> ModelShape:
    shape = TINY if args.model == "tiny" else find_shape(args.model, "--model")[0]
    positions = max(shape.max_positions, args.sequence_tokens)
    return dataclasses.replace(shape, layers=args.layers or shape.layers, max_positions=positions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, a shape of plan/shapes.py, or a directory")
    parser.add_argument("--layers", type=int, help="in place of the model's")
    parser.add_argument("--layout", nargs="+", default=["TP1"], help="such as TP2+SP, PP2+VPP2, TP2xDP2, EP2xDP2")
    parser.add_argument("--samples", type=int, default=4, help="of a step, over all data ranks")
    parser.add_argument("--sequence-tokens", type=int, default=4096, help="of every sample")
    parser.add_argument("--prompt-tokens", type=int, default=1, help="of every sample, of its tokens")
    parser.add_argument("--lengths", help="draw lengths instead, as fapo plan --lengths has it")
    parser.add_argument("--micro-batch-tokens", type=int, help="default: --sequence-tokens")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not counted")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="profile one more step, kernels by group")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the configuration")
    args = parser.parse_args()
    shape = find_model(args)
    gpu = torch.cuda.is_available()
    lengths = [(args.prompt_tokens, args.sequence_tokens - args.prompt_tokens)] * args.samples
    if args.lengths:
        drawn = find_lengths(args.lengths, load_config([], args.set).config, False).draw(args.samples, 0)
        lengths = [(max(1, s.prompt), s.response) for s in drawn]
    with tempfile.TemporaryDirectory() as directory:
        for name in args.layout:
            parallel = [f"policy.parallel.{key}={value}" for key, value in parse_layout(name).items()]
            budget = args.micro_batch_tokens or args.sequence_tokens
            sizes = [f"policy.micro_batch_tokens={budget}", f"policy.model_path={directory}"]
            config = load_config([], [*sizes, *parallel, *args.set]).config
            dtype = {"auto": "bfloat16" if gpu else "float32"}.get(config.policy.dtype, config.policy.dtype)
            write_config(dataclasses.replace(shape, dtype=dtype), Path(directory))
            if problems := layout_problems(shape, config.policy.parallel):
                raise UserError(f"--layout {name}: {'; '.join(problems)}")
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            job = Job(
                config, draw_samples(lengths, shape.vocab), args.steps, args.warmup, "gpu" if gpu else "cpu", dtype,
                port, args.profile and args.profile / f"{name}.txt",
            )  # fmt: skip
            if args.profile:
                args.profile.mkdir(parents=True, exist_ok=True)
            print(json.dumps({"model": args.model, "layers": shape.layers} | measure(name, job, shape)), flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
