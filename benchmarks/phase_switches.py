"""Policy and engine in turns, many times over: what is left behind by a switch.

    python benchmarks/phase_switches.py OUT [--device cpu] [--rounds 50] [--json FILE] [dotted overrides]

Each round enters training and takes an update, refits the engine and generates. After round 5, when every workspace and
buffer has been taken once, and after the last round every process below this one is read: resident memory, open files,
threads, mapped shared memory; so are Ray's object store and the policy's ledger (docs/memory.md). Fails if anything has
grown by more than TOLERANCE. Writes a random model into OUT; on a GPU both share one card.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.run_table import machine
from megatron_fapo.config.load import load_config
from megatron_fapo.data.records import Prompt
from megatron_fapo.data.tokenizer import init_tiny_model
from megatron_fapo.policy.batch import TrainSample
from megatron_fapo.training.cluster import Cluster, launch

SETTLED = 5
"""Rounds, after which nothing may grow."""
TOLERANCE = {"mib": 64.0, "files": 2, "threads": 2, "shared_maps": 0, "objects": 2, "stored_mib": 0.1}
"""What each of 45 switches left behind would be more. The C allocator's memory takes some twenty rounds to settle, and
Ray opens connections and drops objects when it gets to it."""
SHARED = ("/memfd:", "/dev/shm/")
PROMPT_TOKENS, RESPONSE_TOKENS = 32, 32


@dataclass(frozen=True)
class Held:
    """By one process."""

    title: str
    resident_mib: float
    files: int
    threads: int
    shared_maps: int
    """Mapped pieces of shared memory."""


@dataclass(frozen=True)
class Reading:
    """Of one moment, in the phase of rollout."""

    processes: Mapping[int, Held]
    stored_objects: int
    stored_mib: float
    ledger: Mapping[str, float]
    """Metrics `memory/...` of the round, in GiB."""


def residue(early: Reading, late: Reading) -> list[str]:
    """What has grown, and what is there that was not."""
    found = [f"{held.title} ({pid}) is new" for pid, held in late.processes.items() if pid not in early.processes]

    def compare(whose: str, what: str, before: float, after: float, tolerance: float) -> None:
        if after - before > tolerance:
            found.append(f"{whose} has {after - before:.4g} {what} more")

    for pid in early.processes.keys() & late.processes.keys():
        before, after = early.processes[pid], late.processes[pid]
        whose = f"{before.title} ({pid})"
        compare(whose, "MiB resident", before.resident_mib, after.resident_mib, TOLERANCE["mib"])
        for what in ("files", "threads", "shared_maps"):
            compare(whose, what, getattr(before, what), getattr(after, what), TOLERANCE[what])
    compare("the object store", "objects", early.stored_objects, late.stored_objects, TOLERANCE["objects"])
    compare("the object store", "MiB", early.stored_mib, late.stored_mib, TOLERANCE["stored_mib"])
    for name, size in late.ledger.items():
        owned = name.rpartition("/")[2] in ("parameters_gib", "gradients_gib", "optimizer_gib", "pinned_gib")
        compare(name, "MiB", early.ledger[name] * 1024, size * 1024, 0 if owned else TOLERANCE["mib"])
    return found


def read(ledger: Mapping[str, float]) -> Reading:
    """What everything below this process holds now, itself included."""
    import ray
    from ray._private.internal_api import node_stats  # Ray has no public way to ask without its dashboard

    gc.collect()
    me = psutil.Process()
    processes = {process.pid: mine for process in (me, *me.children(recursive=True)) if (mine := held(process))}
    nodes = [(node["NodeManagerAddress"], node["NodeManagerPort"]) for node in ray.nodes()]
    stores = [node_stats(*node).store_stats for node in nodes]
    sizes = {name: value for name, value in ledger.items() if name.endswith("_gib")}
    used = sum(store.object_store_bytes_used for store in stores) / 2**20
    return Reading(processes, sum(store.num_local_objects for store in stores), used, sizes)


def held(process: psutil.Process) -> Held | None:
    """What a process holds now; None: it has ended since it was listed."""
    try:
        maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        words = [Path(word).name for word in process.cmdline()]
        title = next((word for word in words if word.endswith(".py")), "".join(words[:1]))
        resident, threads = process.memory_info().rss / 2**20, process.num_threads()
        shared = sum(any(mark in line for mark in SHARED) for line in maps)
        return Held(title, round(resident, 1), process.num_fds(), threads, shared)
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return None


async def switch(cluster: Cluster, version: int) -> dict[str, float]:
    """One round: train, refit, generate. Returns seconds by phase and the ledger."""
    assert cluster.policy is not None
    assert cluster.rollout is not None
    prompts = [
        Prompt(f"switch/{i}", "switch", (), "", "", tuple(3 + (11 * i + 7 * j) % 200 for j in range(PROMPT_TOKENS)))
        for i in range(8)
    ]
    began = time.monotonic()
    await cluster.enter("train")
    entered = time.monotonic()
    batch = [TrainSample(p.token_ids, p.token_ids[:RESPONSE_TOKENS][::-1], 1.0) for p in prompts]
    await cluster.policy.train(batch, loss="supervised")
    trained = time.monotonic()
    refit = await cluster.refit(version)
    refitted = time.monotonic()
    sampling = cluster.config.rollout.sampling
    stream = cluster.rollout.generate(prompts, [version] * 8, n=1, sampling=sampling, max_tokens=RESPONSE_TOKENS)
    assert {sample.weight_version async for sample in stream} == {version}
    seconds = {
        "enter_train_s": entered - began,
        "train_s": trained - entered,
        "refit_s": refit["weight_sync/total_s"],
        "switch_and_refit_s": refitted - trained,
        "rollout_s": time.monotonic() - refitted,
    }
    return seconds | cluster.take_memory()


async def switches(cluster: Cluster, rounds: int, settled: int) -> tuple[list[dict[str, float]], Reading, Reading]:
    """All rounds, and what was held after `settled` of them and after the last."""
    found = [await switch(cluster, version + 1) for version in range(settled)]
    early = read(found[-1])
    found += [await switch(cluster, version + 1) for version in range(settled, rounds)]
    return found, early, read(found[-1])


def overrides(args: argparse.Namespace) -> list[str]:
    values: dict[str, Any] = {
        "run_dir": args.out / "run",
        "device": args.device,
        "data.max_prompt_tokens": PROMPT_TOKENS,
        "policy.model_path": args.out / "model",
        "policy.offload": "true",
        "policy.optimizer.warmup_steps": 0,
        "rollout.colocated": "true",
        "rollout.gpu_memory_utilization": 0.6,
        "rollout.max_response_tokens": RESPONSE_TOKENS,
        "genrm.enabled": "false",
    }
    return [f"{key}={value}" for key, value in values.items()]


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    config = load_config([], [*overrides(args), *args.overrides]).config
    async with launch(config, judges_only=True) as cluster:
        rounds, early, late = await switches(cluster, args.rounds, SETTLED)
    names = [name for name in rounds[0] if name.endswith("_s") and not name.startswith("memory/")]
    return {
        "rounds": args.rounds,
        "median_s": {name: round(statistics.median(each[name] for each in rounds[1:]), 4) for name in names},
        "tolerance": TOLERANCE,
        "residue": residue(early, late),
        "after": {SETTLED: asdict(early), args.rounds: asdict(late)},
        "machine": machine(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="gpu")
    parser.add_argument("--hidden", type=int, default=1024, help="of the model on a GPU")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    if args.rounds <= SETTLED:
        parser.error(f"--rounds: more than {SETTLED}")
    args.out = args.out.resolve()
    heads = {"num_attention_heads": args.hidden // 64, "num_key_value_heads": args.hidden // 64, "head_dim": 64}
    sizes = heads | {"hidden_size": args.hidden, "intermediate_size": 8 * args.hidden // 3 // 64 * 64}
    sizes |= {"num_hidden_layers": args.layers, "initializer_range": 0.02}
    init_tiny_model(args.out / "model", 0, **(sizes if args.device == "gpu" else {}))
    result = asyncio.run(measure(args))
    for pid, before in result["after"][SETTLED]["processes"].items():
        after = result["after"][args.rounds]["processes"].get(pid)
        print(f"{before['title']:<40} {pid:>8}", *(f"{before[k]} -> {after and after[k]}" for k in list(before)[1:]))
    print(json.dumps(result["median_s"]))
    print("\n".join(result["residue"]) or f"nothing has grown in {args.rounds - SETTLED} switches")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(result["residue"]))


if __name__ == "__main__":
    sys.exit(main())
