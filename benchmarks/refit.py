"""A refit beside what the machine allows and beside vLLM's own way: seconds by phase, bytes, rates.

    python benchmarks/refit.py --model tiny                                  # on a CPU
    python benchmarks/refit.py --case colocated --model 8B --generations     # on one GPU
    python benchmarks/refit.py --case disaggregated --model 14B --json FILE  # policy and engine on cards of their own

Cases: `colocated` (policy and engine take turns on one card), `disaggregated` (TP2 -> TP2 where there are four cards,
else one -> one), `tp4-colocated`, `pp2-tp2` (two stages -> TP2, on cards of their own); --tensor, --pipeline and
--rollout-tensor change a case. Models: `tiny`, the built-in shapes (8B, 14B and 32B for short) with random weights, or
an HF directory.

In one run, round by round: our refit (`Cluster.refit`); the reference path (refits/reference.py: gathered HF tensors
through vLLM's native weight transfer; on CPUs an export that vLLM reloads); and what the same processes copy, map and
send at most (refits/floors.py). The floor is what each worker takes of the plan's bytes, over the rate of the best way
that there is.

Fails if the engine does not generate the same, to the last bit of every log-probability, after either path; with
--generations also if an engine that loads an HF export does not. `token_mult_prob_error` is the mean over the tokens of
--text (paragraphs of a file) of exp(|log-probability of the engine - of the policy|).
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.refits import floors, stack
from benchmarks.refits.models import make_model
from benchmarks.refits.profiles import begin_profile, end_profile
from benchmarks.refits.reference import Native
from benchmarks.run_table import machine
from megatron_fapo.config.root import Config
from megatron_fapo.device import choose_device, choose_dtype
from megatron_fapo.errors import UserError
from megatron_fapo.policy.batch import TrainSample
from megatron_fapo.training.cluster import Cluster

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, float]


def find_case(args: argparse.Namespace, cards: int) -> stack.Case:
    """The case of the command line."""
    two = 2 if cards >= 4 else 1
    cases = {
        "colocated": stack.Case(1, 1, 1, colocated=True),
        "disaggregated": stack.Case(two, 1, two, colocated=False),
        "tp4-colocated": stack.Case(4, 1, 4, colocated=True),
        "pp2-tp2": stack.Case(1, 2, 2, colocated=False),
    }
    given = {"tensor": args.tensor, "pipeline": args.pipeline, "rollout_tensor": args.rollout_tensor}
    case = dataclasses.replace(cases[args.case], **{name: size for name, size in given.items() if size})
    if 0 < cards < case.gpus:
        raise UserError(f"--case {args.case} takes {case.gpus} GPUs, and this machine has {cards}")
    return case


async def ours(cluster: Cluster, version: int) -> Row:
    """One refit: its `weight_sync/...` metrics, and the seconds of the whole call."""
    began = time.perf_counter()
    metrics = await cluster.refit(version)
    seconds = time.perf_counter() - began
    return {name.removeprefix("weight_sync/"): value for name, value in metrics.items()} | {"call_s": seconds}


async def theirs(cluster: Cluster, native: Native, version: int) -> Row:
    """One refit by the reference path, with its gather alone beside it."""
    await cluster.enter("refit")
    gather_s = await native.gather_s()
    row = await native.refit(version)
    await cluster.enter("rollout")
    return row | {"gather_alone_s": gather_s}


async def measure_floors(cluster: Cluster, case: stack.Case, native: Native, mib: int) -> Row:
    """Rates with the engines' and the policy's weights where they are during a refit."""
    await cluster.enter("refit")
    send = cluster.device == "cpu" or not case.colocated
    rates = await floors.measure(native.ranks, native.engines, case.rollout_tensor, mib * 2**20, send=send)
    await cluster.enter("rollout")
    return {f"{kind}_gb_s": rate / 1e9 for kind, rate in rates.items()}


async def profile(cluster: Cluster, native: Native, version: int, directory: Path) -> None:
    """One more refit of ours, with what every worker does written into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    await asyncio.gather(*(engine.on_workers.remote(begin_profile) for engine in native.engines))
    await ours(cluster, version)
    await asyncio.gather(*(e.on_workers.remote(end_profile, str(directory), i) for i, e in enumerate(native.engines)))


async def compare_outputs(cluster: Cluster, native: Native, version: int) -> list[Any]:
    """Refit both ways with the same weights, and ours with others in between; returns what is generated.

    Raises:
        RuntimeError: the engine generates something else after one path than after the other, or always the same.
    """
    found = []
    for path, number in ((theirs, 1), (ours, 2), (ours, 1)):
        await cluster.enter("refit")
        await asyncio.gather(*(rank.set_weights.remote(number) for rank in native.ranks))
        version += 1
        await (ours(cluster, version) if path is ours else theirs(cluster, native, version))
        found.append(await stack.generations(cluster))
    reference, other, same = found
    if same != reference:
        raise RuntimeError("greedy generations after our refit differ from those after the reference path")
    if other == reference:
        raise RuntimeError("other weights gave the same log-probabilities: a refit did not reach the engine")
    return same


async def prob_error(cluster: Cluster, native: Native, text: Path) -> Row:
    """How far policy and engine are apart on real text, after a refit."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(cluster.config.policy.model_path)
    paragraphs = (part.strip() for part in text.read_text(encoding="utf-8").split("\n\n"))
    texts = [tokenizer.encode(part)[: stack.TEXT_TOKENS] for part in paragraphs if len(part) > 200][:16]
    if not texts:
        raise UserError(f"--text {text} has no paragraph of more than 200 characters")
    engine = await native.engines[0].score.remote(texts)
    await cluster.enter("logprobs")
    assert cluster.policy is not None
    policy = await cluster.policy.logprobs([TrainSample(tuple(t[:1]), tuple(t[1:])) for t in texts])
    apart = [abs(a - b) for x, y in zip(engine, policy, strict=True) for a, b in zip(x, y.tolist(), strict=True)]
    return {
        "token_mult_prob_error": statistics.fmean(map(math.exp, apart)),
        "logprob_abs_mean": statistics.fmean(apart),
        "logprob_abs_max": max(apart),
        "tokens": len(apart),
    }


async def run(args: argparse.Namespace, case: stack.Case, config: Config, backend: str, work: Path) -> dict[str, Any]:
    """Everything that is measured."""
    rounds: dict[str, list[Row]] = {"ours": [], "reference": [], "floors": []}
    exported = work / "export"
    async with stack.start(config) as cluster:
        native = Native(cluster, backend, work / "reload")
        await cluster.enter("refit")
        await native.open()
        first = await ours(cluster, 1)
        await theirs(cluster, native, 2)
        for number in range(args.repeats):
            rounds["floors"].append(await measure_floors(cluster, case, native, args.floor_mib))
            rounds["reference"].append(await theirs(cluster, native, 2 * number + 3))
            rounds["ours"].append(await ours(cluster, 2 * number + 4))
            print(json.dumps({kind: rows[-1] for kind, rows in rounds.items()}), flush=True)
        if args.profile:
            await profile(cluster, native, 2 * args.repeats + 3, args.profile.resolve())
        generated = await compare_outputs(cluster, native, 2 * args.repeats + 4)
        agreement = await prob_error(cluster, native, args.text)
        assert cluster.refits is not None
        assert cluster.refits._plan is not None
        plan = {"bytes_over_minimum": cluster.refits._plan.bytes_over_minimum, "hops": len(cluster.refits._plan.hops)}
        if args.generations:
            await cluster.enter("refit")
            assert cluster.policy is not None
            await cluster.policy.export(exported)
    if args.generations:
        async with stack.start(stack.of_export(config, exported), policy=False) as cluster:
            if await stack.generations(cluster) != generated:
                raise RuntimeError("greedy generations after our refit differ from those of a freshly loaded export")
    return {"first": first, "plan": plan, "rounds": rounds, "agreement": agreement}


def summarize(found: dict[str, Any], case: stack.Case) -> dict[str, Any]:
    """Medians over the rounds, and ratios of them."""
    medians = {
        kind: {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        for kind, rows in found["rounds"].items()
    }
    own, reference, rates = medians["ours"], medians["reference"], medians["floors"]
    workers = case.rollout_tensor * case.replicas
    sent = rates.get("send_gb_s", 0.0)
    best = {"local": rates["pull_gb_s"], "node": max(rates["pull_gb_s"], sent), "network": sent}
    moved = {link: own[f"{link}_bytes"] for link in best if own[f"{link}_bytes"]}
    floor_s = sum(size / workers / best[link] / 1e9 for link, size in moved.items())
    return medians | {
        "floor_s": floor_s,
        "ours_over_floor": own["total_s"] / floor_s,
        "transfer_over_floor": own["transfer_s"] / floor_s,
        "reference_over_ours": reference["total_s"] / own["total_s"],
    }


def table(summary: dict[str, Any]) -> str:
    """For people."""
    lines = []
    for kind in ("ours", "reference", "floors"):
        lines += [f"{kind}:"] + [f"  {name:<16} {value:>14.6g}" for name, value in summary[kind].items()]
    names = ("floor_s", "transfer_over_floor", "ours_over_floor", "reference_over_ours")
    return "\n".join(lines + [f"{name:<18} {summary[name]:>14.4g}" for name in names])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = ("colocated", "disaggregated", "tp4-colocated", "pp2-tp2")
    parser.add_argument("--case", choices=cases, default="disaggregated")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--layers", type=int, help="in place of the model's, where weights are random")
    parser.add_argument("--tensor", type=int, help="tensor-parallel ranks of the policy")
    parser.add_argument("--pipeline", type=int, help="pipeline stages of the policy")
    parser.add_argument("--rollout-tensor", type=int, help="GPUs of the engine")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, after one that is not counted")
    parser.add_argument("--floor-mib", type=int, default=None, help="size of a copy; default 512, on CPUs 64")
    parser.add_argument("--generations", action="store_true", help="compare with an engine that loads an export")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="write what workers do in one more refit")
    parser.add_argument("--text", type=Path, default=ROOT / "README.md", help="real text, in paragraphs")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the configuration")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    device = choose_device("auto")
    args.floor_mib = args.floor_mib or (512 if device == "gpu" else 64)
    cards = 0
    if device == "gpu":
        import torch

        cards = torch.cuda.device_count()
    case = find_case(args, cards)
    backend = "reload" if device == "cpu" else "ipc" if case.colocated else "nccl"
    # For Ray's and vLLM's processes, which import the benchmark's actors and functions.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as name:
        work, dtype = Path(name), choose_dtype("auto", device)
        positions = stack.TEXT_TOKENS + stack.RESPONSE_TOKENS
        model = make_model(args.model, work / "model", layers=args.layers, dtype=dtype, positions=positions)
        config = stack.make_config(case, model.resolve(), work / "run", device, backend, args.set)
        found = asyncio.run(run(args, case, config, backend, work))
    summary = summarize(found, case)
    print(table(summary) + "\n" + json.dumps(found["plan"] | found["agreement"]))
    if args.json:
        command = {"command": f"python benchmarks/refit.py {' '.join(sys.argv[1:])}", "machine": machine()}
        facts = command | {"model": args.model, "case": dataclasses.asdict(case), "backend": backend, "dtype": dtype}
        args.json.write_text(json.dumps(facts | {"summary": summary} | found, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
