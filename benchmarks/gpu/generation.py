"""What an engine generates a second, by setting: engines as a run starts them, one after another, a process each.

    python benchmarks/gpu/generation.py --model Qwen2.5-0.5B --prompts 64 --samples 8 --tokens 512 \\
        --variant "" --variant max_num_seqs=512 --variant "max_num_seqs=512 enforce_eager=true" --json FILE
    python benchmarks/gpu/generation.py --model tiny --prompts 8 --tokens 32   # on a CPU

A variant is a list of settings of `rollout` over the configuration's defaults. Models: those of benchmarks/refit.py,
with random weights, whose samples end at --tokens in all but a few cases; tokens are counted, not assumed. Seconds run
from the request to the last sample, the Python of the engine's actor included; medians of --repeats rounds after one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.refits.models import make_model
from benchmarks.run_table import machine
from megatron_fapo.config.load import load_config
from megatron_fapo.data.records import Prompt
from megatron_fapo.device import choose_device, choose_dtype

PROMPT_TOKENS = 128


def make_prompts(count: int, number: int) -> list[Prompt]:
    """Prompts of arbitrary tokens, others in every round: none is in the prefix cache."""
    return [
        Prompt(
            f"{number}/{i}", "", (), "", "", tuple(3 + (number + 11 * i + 7 * j) % 250 for j in range(PROMPT_TOKENS))
        )
        for i in range(count)
    ]


async def measure(args: argparse.Namespace, model: Path, device: str, variant: str) -> dict[str, Any]:
    """One engine from start to end."""
    from megatron_fapo.rollout.engine import RolloutEngine

    overrides = [f"rollout.{each}" for each in variant.split()]
    cfg = load_config([], [f"policy.model_path={model}", "genrm.enabled=false", *overrides]).config.rollout
    positions = PROMPT_TOKENS + args.tokens
    engine = RolloutEngine(str(model), cfg, device=device, dtype=args.dtype, max_model_len=positions, log_path=None)
    facts = await engine.start()
    seconds, counts = [], []
    try:
        for number in range(args.repeats + 1):
            prompts, began = make_prompts(args.prompts, number), time.perf_counter()
            stream = engine.generate(
                prompts, [0] * len(prompts), n=args.samples, sampling=cfg.sampling, max_tokens=args.tokens
            )
            counts.append(sum([len(sample.token_ids) async for sample in stream]))
            seconds.append(time.perf_counter() - began)
    finally:
        await engine.shutdown()
    rates = [count / s for count, s in zip(counts, seconds, strict=True)][1:]
    return {
        "variant": variant,
        "tokens_per_s": statistics.median(rates),
        "seconds": seconds,
        "tokens": counts,
        "start_s": facts["start_s"],
        "kv_cache_tokens": facts["kv_cache_tokens"],
    }


def in_process(args: argparse.Namespace, model: Path, device: str, variant: str, answers: Any) -> None:
    answers.put(asyncio.run(measure(args, model, device, variant)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8, help="of each prompt")
    parser.add_argument("--tokens", type=int, default=512, help="most tokens of a sample")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--variant", action="append", metavar="KEY=VALUE ...")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        device = choose_device(
            "auto"
        )  # here: asked in the engine's process, CUDA could not start in vLLM's forks of it
        args.dtype = choose_dtype("auto", device)
        positions = PROMPT_TOKENS + args.tokens
        model = make_model(args.model, Path(name) / "model", layers=None, dtype=args.dtype, positions=positions)
        for variant in args.variant or [""]:
            answers = context.Queue()
            process = context.Process(target=in_process, args=(args, model, device, variant, answers))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"variant {variant!r} failed: exit code {process.exitcode}")
            rows.append(answers.get())
            print("{variant:60} {tokens_per_s:10,.0f} tokens/s, up in {start_s:.0f} s".format(**rows[-1]), flush=True)
    if args.json:
        facts = {"command": f"python benchmarks/gpu/generation.py {' '.join(sys.argv[1:])}", "machine": machine()}
        args.json.write_text(json.dumps(facts | {"model": args.model, "variants": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
