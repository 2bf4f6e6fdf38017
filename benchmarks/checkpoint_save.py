"""How long a checkpoint keeps the policy from training: saved in the background, and waited for.

    python benchmarks/checkpoint_save.py --model Qwen2.5-0.5B --dir /fast/disk
    python benchmarks/checkpoint_save.py --model Qwen3-8B --layers 12 --layout TP2 DP2 --dir /fast/disk
    python benchmarks/checkpoint_save.py --model tiny --layout TP1 DP2              # on a CPU

Prints one line of JSON per layout. Weights are random; each rank is a process with one GPU of this host. Seconds are
until the slowest rank is done, medians of --saves saves after one that plans for the others:

    copy_s      a rank is kept from training while its share is copied into host memory (asynchronous saves)
    save_s      and when it waits until everything is written (asynchronous: false); ratio = copy_s / save_s
    write_s     the background thread, alone; gb_per_s of all ranks together; hash_share of its time for SHA-256
    step_s      a train step; step_writing_s while a checkpoint is written; write_training_s: the thread meanwhile
    verify_s    hashes of all files, shared out over ranks; load_s what follows
    host_gib    copied by the rank that copies most; gather_gib: what mcore's fully_reshardable optimizer format has in
                host memory of that rank instead, for the optimizer alone (with --gather)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from policy_step import Job, RandomCheckpoint, draw_samples, find_model, parse_layout, timed, write_config

from megatron_fapo.checksums import FileSum
from megatron_fapo.config.algorithm import AlgorithmConfig
from megatron_fapo.config.load import load_config
from megatron_fapo.policy import checkpoint, hf_weights
from megatron_fapo.policy.optimizer_shards import optimizer_parts
from megatron_fapo.policy.parallel import Rank
from megatron_fapo.policy.worker import PolicyWorker


def run_rank(rank: int, job: Job, directory: Path, gather: bool, results: Any) -> None:
    policy = job.config.policy
    if job.device == "gpu":  # a policy rank takes the first card that it sees
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[rank] if visible else str(rank)
    hf_weights.HFCheckpoint = RandomCheckpoint  # type: ignore[assignment,misc]
    world = policy.parallel.world_size
    where = Rank(rank, world, "127.0.0.1", job.port)
    worker = PolicyWorker(where, policy, AlgorithmConfig(), device=job.device, dtype=job.dtype, seed=0)
    packs = [[sample] for sample in job.samples[worker.data_rank :: policy.parallel.data]]
    saver = checkpoint.Saver(worker)

    def clock(function: Callable[[], Any]) -> tuple[float, Any]:
        return timed(function, job.device)

    def complete(part: checkpoint.Part | None) -> dict[str, FileSum]:
        parts: list[Any] = [None] * world
        torch.distributed.all_gather_object(parts, part)
        files = [saver.complete(parts) if rank == 0 else {}]
        torch.distributed.broadcast_object_list(files)
        return files[0]

    worker.train(packs)
    step_s = statistics.median(clock(lambda: worker.train(packs))[0] for _ in range(job.steps))
    names = ("copy_s", "write_s", "save_s", "write_training_s", "step_writing_s")
    times: dict[str, list[float]] = {name: [] for name in names}
    hash_shares, path, files = [], directory / "policy", dict[str, FileSum]()
    part: checkpoint.Part | None = None
    for number in range(job.steps + 1):
        for training in (False, True):
            if rank == 0:
                shutil.rmtree(path, ignore_errors=True)
            copy_s = clock(lambda: saver.begin(path))[0]
            steps: list[float] = []
            part, began = None, time.perf_counter()
            while training and not (steps and _all(part)):
                steps.append(clock(lambda: worker.train(packs))[0])
                part = part or saver.part()
            part = part or saver.part(wait=True)
            assert part is not None
            files = complete(part)
            if number:
                times["copy_s"].append(copy_s)
                if training:
                    times["write_training_s"].append(part.seconds)
                    times["step_writing_s"].append(statistics.median(steps))
                else:
                    times["write_s"].append(part.seconds)
                    times["save_s"].append(copy_s + time.perf_counter() - began)
                    hash_shares.append(part.hash_s / part.seconds)
    assert part is not None
    row: dict[str, Any] = {name: statistics.median(values) for name, values in times.items()}
    row |= {
        "step_s": step_s,
        "hash_share": statistics.median(hash_shares),
        "bytes": sum(f.size for f in files.values()),
    }
    row["copied"] = sum(file.size for file in part.files.values())
    sums = {name: file.sha256 for name, file in files.items()}
    row["verify_s"], wrong = clock(lambda: checkpoint.verify(path, sums, rank, world))
    assert not wrong, wrong
    row["load_s"] = clock(lambda: checkpoint.load(worker, path))[0]
    row["gathered"] = gathered_bytes(worker) if gather else 0
    row["gpu"] = torch.cuda.get_device_name() if job.device == "gpu" else "none"
    results.put(row)
    worker.close()


def _all(part: checkpoint.Part | None) -> bool:
    """Whether every rank has written, so that all go on training or none."""
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, part is not None)
    return all(parts)


def gathered_bytes(worker: PolicyWorker) -> int:
    """Of the tensors in host memory at the end of mcore's gather over data ranks, before its save begins."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    kind = "distrib_optim_sharding_type"
    metadata = {kind: "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False}
    weights = checkpoint._sharded_weights(worker)
    states = [part.sharded_state_dict(weights, metadata=metadata) for part in optimizer_parts(worker.optimizer)]
    found = [value.data for value in nested_values([state["param_state"] for state in states])]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())


def measure(name: str, job: Job, directory: Path, gather: bool) -> dict[str, Any]:
    world = job.config.policy.parallel.world_size
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(run_rank, args=(job, directory, gather, results), nprocs=world)
    ranks = [results.get() for _ in range(world)]
    slowest = {key: round(max(r[key] for r in ranks), 4) for key in ranks[0] if key.endswith("_s")}
    row: dict[str, Any] = {"layout": name, "ranks": world, "gb": round(ranks[0]["bytes"] / 1e9, 3)} | slowest
    row["ratio"] = round(slowest["copy_s"] / slowest["save_s"], 4)
    row["gb_per_s"] = round(ranks[0]["bytes"] / 1e9 / slowest["write_s"], 3)
    row["hash_share"] = round(statistics.mean(r["hash_share"] for r in ranks), 3)
    row["host_gib"] = round(max(r["copied"] for r in ranks) / 2**30, 3)
    if gather:
        row["gather_gib"] = round(max(r["gathered"] for r in ranks) / 2**30, 3)
    return row | {"gpu": ranks[0]["gpu"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, a shape of plan/shapes.py, or a directory")
    parser.add_argument("--layers", type=int, help="in place of the model's")
    parser.add_argument("--layout", nargs="+", default=["TP1"], help="such as TP2+SP, PP2+VPP2, TP2xDP2, EP2xDP2")
    parser.add_argument("--samples", type=int, default=4, help="of a step, over all data ranks")
    parser.add_argument("--sequence-tokens", type=int, default=512, help="of every sample")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument(
        "--dir", type=Path, help="where checkpoints are written and removed; default: a new one in /tmp"
    )
    parser.add_argument("--gather", action="store_true", help="also measure mcore's own optimizer format")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the configuration")
    args = parser.parse_args()
    shape = find_model(args)
    gpu = torch.cuda.is_available()
    samples = draw_samples([(1, args.sequence_tokens - 1)] * args.samples, shape.vocab)
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        dtype = "bfloat16" if gpu else "float32"
        write_config(dataclasses.replace(shape, dtype=dtype), Path(scratch))
        for layout in args.layout:
            fields = [f"policy.parallel.{key}={value}" for key, value in parse_layout(layout).items()]
            config = load_config([], [*args.set, *fields, f"policy.model_path={scratch}"]).config
            job = Job(config, samples, args.saves, 0, "gpu" if gpu else "cpu", dtype, _free_port(), None)
            print(json.dumps(measure(layout, job, Path(scratch), args.gather)), flush=True)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


if __name__ == "__main__":
    main()
