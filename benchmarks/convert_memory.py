"""Conversion of a model that is larger than the memory it may use, both ways: peak memory, time, bitwise result.

    python benchmarks/convert_memory.py --gib 4 --limit-gib 2 [--tp 2 --pp 2] [--dir DIR]

Writes a random bfloat16 Qwen3 of about --gib into --dir, runs `fapo convert hf-to-megatron` and `megatron-to-hf` as
processes of a memory control group that the kernel holds to --limit-gib, and prints a JSON line for each. The limit
includes the page cache, which the kernel reclaims; it kills a process whose own memory does not fit. The group needs
root; --limit-gib 0 does without. --dir needs three times --gib for a while. `anonymous_mib` is the peak of RssAnon,
sampled every 10 ms; `of_imports_mib` is that of converting the tiny model of the examples: what libraries take.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_fapo.policy.hf_weights import HFCheckpoint, shard_name, write_index
from megatron_fapo.policy.streams import HFTensor, deal, write_safetensors

TINY = Path(__file__).parents[1] / "examples" / "models" / "policy"
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 65537, "hidden_act": "silu",
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


def tensors(layers: int) -> list[HFTensor]:
    """Names and shapes of the model."""
    hidden, ffn, q, kv = 2048, 6144, 2048, 1024
    layer = {
        "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q), "self_attn.q_norm": (128,), "self_attn.k_norm": (128,),
        "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn),
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    whole = {"embed_tokens": (CONFIG["vocab_size"], hidden), "norm": (hidden,)}
    shapes = {f"model.{name}.weight": shape for name, shape in whole.items()}
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in layer.items()}
    shapes["lm_head.weight"] = whole["embed_tokens"]
    return [HFTensor(name, shape, torch.bfloat16) for name, shape in shapes.items()]


def write_random(directory: Path, gib: float) -> int:
    """Write a model of about `gib` in files of 1 GB; returns its bytes."""
    per_layer = sum(t.nbytes for t in tensors(2)) - sum(t.nbytes for t in tensors(1))
    layers = round((gib * 2**30 - sum(t.nbytes for t in tensors(0))) / per_layer / 2) * 2
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    files = deal(tensors(layers), 10**9)

    def values() -> Iterator[tuple[str, torch.Tensor]]:
        for tensor in tensors(layers):
            # Bit patterns below that of 2: fast to draw, and finite.
            yield tensor.name, torch.randint(0x4000, tensor.shape, dtype=torch.int16).view(tensor.dtype)

    source = values()
    for number, contents in enumerate(files):
        write_safetensors(directory / shard_name(number, len(files)), contents, source)
    write_index(directory, [[tensor.name for tensor in contents] for contents in files])
    return sum(tensor.nbytes for tensor in tensors(layers))


class Group:
    """A memory control group of its own for one process at a time; without a limit, none."""

    def __init__(self, limit_gib: float) -> None:
        self._limit = int(limit_gib * 2**30)
        first = Path("/sys/fs/cgroup/memory")
        root, self._file = (first, "limit_in_bytes") if first.is_dir() else (Path("/sys/fs/cgroup"), "max")
        self._path = root / f"fapo-convert-{os.getpid()}"

    def __enter__(self) -> Group:
        if self._limit:
            self._path.mkdir()
            (self._path / f"memory.{self._file}").write_text(str(self._limit))
        return self

    def __exit__(self, *_: object) -> None:
        if self._limit:
            self._path.rmdir()

    def join(self) -> None:
        """Called in the new process."""
        if self._limit:
            (self._path / "cgroup.procs").write_text(str(os.getpid()))


def convert(group: Group, *arguments: object) -> tuple[float, float]:
    """(seconds, peak of anonymous memory in MiB) of `fapo convert`.

    Raises:
        SystemExit: it failed, or the kernel killed it.
    """
    began, peak = time.perf_counter(), 0
    command = [sys.executable, "-m", "megatron_fapo.cli", "convert", *map(str, arguments)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, preexec_fn=group.join, **quiet)  # type: ignore[call-overload]
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max(peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode} (-9: killed for memory)")
    return time.perf_counter() - began, peak / 1024


def main() -> None:
    """Write, convert there and back, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--limit-gib", type=float, default=2.0)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="convert_memory_", dir=args.dir))
    try:
        nbytes = write_random(root / "hf", args.gib)
        layout = ("--tp", args.tp, "--pp", args.pp)
        steps: dict[str, tuple[object, ...]] = {
            "hf-to-megatron": ("--hf", root / "hf", "--out", root / "megatron", *layout),
            "megatron-to-hf": ("--megatron", root / "megatron", "--out", root / "back"),
        }
        tiny: dict[str, tuple[object, ...]] = {
            "hf-to-megatron": ("--hf", TINY, "--out", root / "tiny"),
            "megatron-to-hf": ("--megatron", root / "tiny", "--out", root / "tiny-back"),
        }
        for direction, arguments in steps.items():
            with Group(args.limit_gib) as group:
                seconds, peak = convert(group, direction, *arguments)
            with Group(0) as group:
                seconds_of_imports, of_imports = convert(group, direction, *tiny[direction])
            row = {
                "direction": direction, "model_gib": round(nbytes / 2**30, 2), "limit_gib": args.limit_gib,
                "tp": args.tp, "pp": args.pp, "anonymous_mib": round(peak), "of_imports_mib": round(of_imports),
                "seconds": round(seconds, 1), "of_imports_s": round(seconds_of_imports, 1),
                "mb_per_s": round(nbytes / (seconds - seconds_of_imports) / 1e6),
            }  # fmt: skip
            print(json.dumps(row), flush=True)
        before, after = HFCheckpoint(root / "hf"), HFCheckpoint(root / "back")
        same = before.names() == after.names() and all(torch.equal(before[n], after[n]) for n in before.names())
        print(json.dumps({"bitwise": same}))
        raise SystemExit(0 if same else 1)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
