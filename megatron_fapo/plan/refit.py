"""`fapo plan refit`: the plan of a refit between a policy and engines that do not run, with its bytes and seconds."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_fapo.config.policy import ParallelConfig
from megatron_fapo.config.weight_sync import WeightSyncConfig
from megatron_fapo.errors import UserError
from megatron_fapo.plan.hardware import KINDS
from megatron_fapo.plan.shapes import find_shape
from megatron_fapo.plan.targets import planned_target, target_problems
from megatron_fapo.policy.hf_config import layout_problems
from megatron_fapo.policy.source_index import planned_indexes
from megatron_fapo.weight_sync.plan import LINKS, Endpoint, make_plan
from megatron_fapo.weight_sync.predict import LinkRates, all_pull_s, broadcast_s, predict
from megatron_fapo.weight_sync.regions import Index

TRAIN = {
    "tp": "tensor", "pp": "pipeline", "vpp": "virtual_pipeline", "cp": "context", "ep": "expert",
    "etp": "expert_tensor", "dp": "data",
}  # fmt: skip
ROLLOUT = ("tp", "replicas")


def refit_command(
    *, model: str, train: str, rollout: str, gpus_per_node: int, colocated: bool, kind: str, json_path: Path | None
) -> int:
    """Print the plan; returns 0.

    Raises:
        UserError: a model, layout or kind that cannot be; names everything that is wrong.
    """
    problems: list[str] = []
    kinds = {name.lower(): name for name in KINDS}
    if kind.lower() not in kinds:
        problems.append(f"--kind {kind}: one of {', '.join(KINDS)}")
    if gpus_per_node < 1:
        problems.append(f"--gpus-per-node {gpus_per_node}: 1 or more")
    policy, engines = _numbers("--train", train, TRAIN, problems), _numbers("--rollout", rollout, ROLLOUT, problems)
    shape, origin = find_shape(model, "--model")
    ranks = {TRAIN[name]: value for name, value in policy.items()}
    parallel = ParallelConfig(**ranks, sequence_parallel=policy.get("tp", 1) > 1)
    tensor, replicas = engines.get("tp", 1), engines.get("replicas", 1)
    problems += layout_problems(shape, parallel) + target_problems(shape, tensor)
    if tensor > gpus_per_node:
        problems.append(f"--rollout tp={tensor}: an engine's workers share a node, and one has {gpus_per_node} GPUs")
    elif colocated and replicas > (room := _engines_beside(parallel.world_size, tensor, gpus_per_node)):
        problems.append(f"--colocated: {replicas} engines of {tensor} GPUs, and the policy's have room for {room}")
    if problems:
        raise UserError("\n  ".join(["plan refit:", *problems]))
    rates = KINDS[kinds[kind.lower()]]
    links = LinkRates(rates.memory_gbs, rates.link_gbs, rates.network_gbs)
    began = time.perf_counter()
    cpu = kind.lower() == "cpu"
    dtype = "float32" if cpu else "bfloat16"
    sources = on_nodes(planned_indexes(shape, parallel, dtype), 1, gpus_per_node, 0)
    workers = [planned_target(shape, tensor, rank, dtype) for rank in range(tensor)] * replicas
    targets = on_nodes(workers, tensor, gpus_per_node, 0 if colocated else len(sources))
    plan = make_plan(sources, targets)
    prediction = predict(
        plan, sources, targets, links, node_messages=not cpu, bucket_bytes=WeightSyncConfig().bucket_mb * 2**20
    )
    nbytes = shape.parameters * (4 if cpu else 2)
    found: dict[str, Any] = {
        "model": origin,
        "train": policy,
        "rollout": engines,
        "colocated": colocated,
        "gpus_per_node": gpus_per_node,
        "ranks": {"policy": plan.sources, "engines": plan.targets},
        "plan_seconds": time.perf_counter() - began,
        "bytes": plan.bytes_by_link(),
        "minimum_bytes": dict(plan.minimum),
        "bytes_over_minimum": plan.bytes_over_minimum,
        "predicted_s": prediction.total_s,
        "predicted_parts_s": {
            "local": prediction.local_s,
            "node": prediction.node_s,
            "network": prediction.network_s,
            "fill": prediction.fill_s,
        },
        "instead_s": {
            "every_replica_pulls": all_pull_s(nbytes, replicas, min(plan.sources, plan.targets), links),
            "one_rank_sends": broadcast_s(nbytes, links),
        },
        "limits": prediction.limits,
        "critical": prediction.critical,
        "hops": len(plan.hops),
        "depth": max(hop.depth for hop in plan.hops),
        "parts": len(plan.parts),
        "copies": sum(len(part.copies) for part in plan.parts),
        "kind": kinds[kind.lower()],
        "rates": asdict(links),
    }
    print("\n".join(_lines(found)))
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def on_nodes(indexes: Sequence[Index], together: int, gpus_per_node: int, first: int) -> list[Endpoint]:
    """A GPU for each process, from GPU `first` of all nodes' on; `together` consecutive ones share a node."""
    nodes = (
        range(max(first, low), low + gpus_per_node)
        for low in itertools.count(first // gpus_per_node * gpus_per_node, gpus_per_node)
    )
    free = (gpu for gpus in nodes for gpu in gpus[: len(gpus) // together * together])
    return [
        Endpoint(str(gpu // gpus_per_node), str(gpu % gpus_per_node), index)
        for gpu, index in zip(free, indexes, strict=False)
    ]


def _engines_beside(gpus: int, tensor: int, gpus_per_node: int) -> int:
    """Engines that nodes with so many GPUs in use have room for, none on two nodes."""
    nodes, rest = divmod(gpus, gpus_per_node)
    return nodes * (gpus_per_node // tensor) + rest // tensor


def _numbers(option: str, text: str, known: Sequence[str] | Mapping[str, str], problems: list[str]) -> dict[str, int]:
    """Of `tp=4,pp=4`; what is wrong with it is added to the problems."""
    found: dict[str, int] = {}
    for word in filter(None, text.split(",")):
        name, _, value = word.partition("=")
        if name not in known or not value.isdigit() or int(value) < 1 or name in found:
            problems.append(f"{option}: {word!r} is not one of {', '.join(f'{each}=N' for each in known)}, each once")
        else:
            found[name] = int(value)
    return found


def _instead(seconds: Mapping[str, float]) -> str:
    pulled, sent = seconds["every_replica_pulls"], seconds["one_rank_sends"]
    return f"instead, over the network: every replica pulls a copy {pulled:.3f} s, one rank sends all {sent:.3f} s"


def _lines(found: Mapping[str, Any]) -> list[str]:
    ranks, seconds = found["ranks"], found["predicted_parts_s"]
    lines = [
        f"{found['model']}: {ranks['policy']} policy ranks to {ranks['engines']} engine workers, "
        f"{found['gpus_per_node']} GPUs a node{', colocated' if found['colocated'] else ''}",
        f"planned in {found['plan_seconds']:.2f} s: {found['hops']} hops of {found['parts']} parts with "
        f"{found['copies']} copies, depth {found['depth']}",
        f"{'link':<8}{'GB':>10}{'least GB':>10}{'s':>8}",
    ]
    for link in LINKS:
        moved, least = found["bytes"][link] / 1e9, found["minimum_bytes"][link] / 1e9
        lines.append(f"{link:<8}{moved:>10.2f}{least:>10.2f}{seconds[link]:>8.3f}")
    rates = ", ".join(f"{name} {value:g}" for name, value in found["rates"].items())
    return [
        *lines,
        f"predicted {found['predicted_s']:.3f} s ({seconds['fill']:.3f} s of it filling the chains), bytes over minimum"
        f" {found['bytes_over_minimum']:.3f}",
        f"limit: {found['limits']}, {found['critical']}",
        *([_instead(found["instead_s"])] if found["bytes"]["network"] else []),
        f"rates of {found['kind']}, GB/s: {rates}",
    ]
