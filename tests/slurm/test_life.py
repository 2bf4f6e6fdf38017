"""The life of a job, for real: the scripts that users submit, on nodes of different roles, stopped and broken."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megatron_fapo.data.datasets import write_testbed
from tests.slurm.cluster import SlurmCluster
from tests.slurm.jobs import TINY, Job

pytestmark = pytest.mark.timeout(1800)
HOW = ("phase_s/", "memory/", "weight_sync/", "genrm/", "observe/", "alarm/", "trace/")
"""Metrics of how a step went, not of what was learned; so are those that end with _s, seconds."""
STEPS = "training.steps=3"
ONE_RANK = "policy.parallel.tensor=1"
"""Each rank imports megatron, which two cores notice."""
Submit = Callable[..., Job]


class Served(NamedTuple):
    service: Job
    address: Path
    runs: list[Job]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("data")
    write_testbed(directory, 200, 4, 1)
    return f"data.train=[{directory}/train.jsonl]"


@contextlib.contextmanager
def _submitting(cluster: SlurmCluster, root: Path, prompts: str) -> Iterator[Submit]:
    """Jobs begin on a cluster that has recovered from what was done to it before, and end with the test."""
    cluster.wait_settled()
    jobs: list[Job] = []

    def start(script: str, nodes: int, *arguments: str, place: str = ".", **env: str) -> Job:
        (root / place).mkdir(exist_ok=True)
        jobs.append(Job(cluster, root / place, script, nodes, prompts, *arguments, **env))
        return jobs[-1]

    try:
        yield start
    finally:
        for job in jobs:
            job.end()


@pytest.fixture
def submit(slurm_cluster: SlurmCluster, tmp_path: Path, prompts: str) -> Iterator[Submit]:
    with _submitting(slurm_cluster, tmp_path, prompts) as start:
        yield start


def learned(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The metrics without those that say how long things took, by which way, and after how many attempts."""
    return [
        {n: value for n, value in each.items() if not n.startswith(HOW) and not n.endswith("_s")} for each in metrics
    ]


@pytest.fixture(scope="module")
def served(slurm_cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory, prompts: str) -> Iterator[Served]:
    """Two whole runs, each on one node, that were judged by the service of a third job, which goes on."""
    root = tmp_path_factory.mktemp("served")
    address = root / "service" / "rendezvous.json"
    with _submitting(slurm_cluster, root, prompts) as start:
        service = start(
            "genrm_serve", 1, "--rendezvous", str(address), "cluster.rollout_nodes=0", "cluster.genrm_nodes=0",
            "genrm.tensor_parallel=1", place="service",
        )  # fmt: skip
        remote = ("-c", "examples/fapo_7b_remote.yaml", "-c", TINY)
        own = ("cluster.genrm_nodes=0", "cluster.rollout_nodes=0", "genrm.servers=0", "genrm.model_path=null")
        more = (STEPS, ONE_RANK, f"genrm.rendezvous={address}")
        runs: list[Job] = []
        for i in range(2):
            # One after the other: an agent of Ray's must be up within 30 s, which nothing can set, or its node ends.
            (runs or [service])[-1].wait_processes("ray::DashboardAgent")
            runs.append(start("fapo_7b", 1, *remote, *own, *more, place=f"run{i}"))
        for run in runs:
            run.wait_state("COMPLETED", "FAILED")
        yield Served(service, address, runs)


def test_two_runs_share_the_judge_service_of_a_third_job(served: Served) -> None:
    service, address = served.service, served.address
    for run in served.runs:
        assert run.state() == "COMPLETED", run.log()[-6000:]
        assert run.metrics()[-1]["score/judged"] > 0
    server = json.loads(address.read_text())["urls"]
    assert len(server) == 1
    assert service.state() == "RUNNING"
    assert {"127.0.0.1" in url for url in server} == {False}
    service.signal("TERM")
    service.wait_state("FAILED")  # with exit code 75: stopped for good
    assert not address.exists()
    service.wait_gone()


def test_a_dead_server_is_replaced_and_the_run_ends_as_if_nothing_had_been(submit: Submit, served: Served) -> None:
    job = submit("fapo_32b", 3, STEPS, ONE_RANK, "training.checkpoint.every_steps=1")
    job.wait_processes("ray::GenRMServer")
    trainer, roller, judge = job.nodes()
    roles = {each: _nodes_of(job, each) for each in ("policy", "rollout", "genrm")}
    assert roles == {"policy": {trainer}, "rollout": {roller}, "genrm": {judge}}
    job.wait_step(1)
    os.kill(job.processes("ray::GenRMServer")[0], signal.SIGKILL)  # without its actor a server is not started again
    job.wait_said("requeued (a process of the run was lost)")
    assert f"first to fail: genrm-0 on {judge}" in job.log()
    assert json.loads((job.run_dir / "failure.json").read_text())["exit_code"] == 76
    job.wait_state("COMPLETED", "FAILED")
    assert job.state() == "COMPLETED", job.log()[-6000:]
    assert "resumed from" in job.log()
    job.wait_gone()
    # With the tiny models laid over them, the recipes differ only in who judges where: the same GenRM, greedily.
    for whole in served.runs:
        assert learned(job.metrics()) == learned(whole.metrics())


def _nodes_of(job: Job, role: str) -> set[str]:
    """Host names that processes of a role see, by the kind of Ray actor."""
    actor = {"policy": "PolicyActor", "rollout": "RolloutEngine", "genrm": "GenRMServer"}[role]
    found = set()
    job.wait_processes(f"ray::{actor}")
    for pid in job.processes(f"ray::{actor}"):
        space = ["nsenter", "-t", str(pid), "-u", "hostname"]
        found.add(subprocess.run(space, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())
    return found


def test_every_process_of_a_running_job_may_die_and_a_cancelled_one_leaves_nothing(
    slurm_cluster: SlurmCluster, submit: Submit
) -> None:
    job = submit(
        "baseline_7b", 2, "cluster.genrm_nodes=0", "cluster.idle_restarts=9", "genrm.enabled=false", ONE_RANK,
        "training.steps=100000", "training.checkpoint.every_steps=0",
        # For so long, 60 s by default, a driver looks for the head of its Ray.
        RAY_gcs_rpc_server_reconnect_timeout_s="15",
    )  # fmt: skip
    job.wait_step(1)
    node = job.nodes()[0]
    os.kill(job.processes("ray::PolicyActor")[0], signal.SIGKILL)
    job.wait_said("decision: requeued (a process of the run was lost)")
    assert re.search(rf"first to fail: policy-0 on {node} after step \d+: its process is gone", job.log())
    assert not list(job.run_dir.glob("checkpoints/step_*")), "a policy that is gone cannot be saved"

    seen = job.metrics()[-1]["step"]
    job.wait_attempt(1)
    job.wait_step(seen + 1)  # anew, though there are metrics
    job.signal("USR1")
    job.wait_said("requeued (stopped for the time limit with everything saved)")
    saved = job.metrics()[-1]["step"]
    assert (job.run_dir / f"checkpoints/step_{saved:06d}/state.json").exists()

    job.wait_attempt(2)
    job.wait_processes("ray::RolloutEngine")  # while it starts
    dead = job.nodes()[1]
    slurm_cluster.run("scontrol", "update", f"nodename={dead}", "state=down", "reason=test")
    job.wait_said("decision: requeued by Slurm (a node went down")

    deaths = (
        # whose process, what the screen says, whether a node is avoided afterwards; the first while the run starts
        (r"^\S*python\S* -m megatron_fapo.cli train", r"the driver was killed by signal 9", False),
        (r"gcs/gcs_server", r"NODE0: Ray ended with exit code 1[\s\S]*avoids NODE0$", True),
        (r"raylet/raylet .*fapo_node_1", r"NODE1: Ray ended with exit code 1[\s\S]*avoids NODE1$", True),
    )
    avoided = [dead]
    for attempt, (pattern, said, avoids) in enumerate(deaths, start=3):
        job.wait_attempt(attempt)
        nodes = job.nodes()
        assert not set(avoided) & set(nodes)
        seen = len(job.log())
        if attempt == 3:
            job.wait_processes("ray::RolloutEngine")
        else:
            job.wait_step(job.metrics()[-1]["step"] + 1)
        os.kill(job.processes(pattern)[-1], signal.SIGKILL)
        job.wait_said("decision: requeued", times=attempt + 1)
        for index, node in enumerate(nodes):
            said = said.replace(f"NODE{index}", node)
        assert re.search(said, job.log()[seen:], re.M), job.log()[seen:]
        avoided += [nodes[1 if "fapo_node_1" in pattern else 0]] if avoids else []
    job.wait_attempt(attempt + 1)
    job.wait_processes("ray::RolloutEngine")
    slurm_cluster.run("scancel", job.id)
    job.wait_state("CANCELLED")
    job.wait_gone()
    job.wait_said("not requeued (cancelled")
    assert len({each["step"] for each in job.metrics()}) == len(job.metrics())


def test_a_bad_node_is_named_and_avoided_and_a_killed_batch_script_leaves_nothing(
    slurm_cluster: SlurmCluster, submit: Submit, tmp_path: Path
) -> None:
    # One node does not mount the shared file system: it sees an empty directory of its own there.
    slurmd = int((slurm_cluster.root / "run/slurmd.node2.pid").read_text())
    (tmp_path / "logs").mkdir()
    mount = ["nsenter", "-t", str(slurmd), "-m", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "logs")]
    subprocess.run(mount, check=True)
    try:
        job = submit("fapo_7b", 3, ONE_RANK, FAPO_CANARY_S="5")
        job.wait_attempt(0)
        assert "node2" in job.nodes(), "Slurm takes the first of the nodes that are idle, and all are"
        job.wait_said("decision: requeued (preflight refused node2)")
        assert re.search(r"^node2: sent no report", job.log(), re.M)
        assert "the next attempt avoids node2" in job.log()
    finally:
        subprocess.run([*mount[:4], "umount", str(tmp_path / "logs")], check=True)
    job.wait_attempt(1)
    assert "node2" not in job.nodes()
    job.wait_processes("raylet/raylet")
    os.kill(job.processes("megatron_fapo.launch.job")[0], signal.SIGKILL)
    job.wait_state("FAILED")  # nobody is left to requeue it
    job.wait_gone()


def test_bad_input_ends_the_job_before_ray_starts(submit: Submit) -> None:
    job = submit("fapo_32b", 2)
    job.wait_state("FAILED")
    assert job.cluster.job(job.id)["ExitCode"] == "2:0"
    assert "configuration: cluster asks for 3 nodes, and the job has 2" in job.log()
    assert not list((job.place / "logs").glob("*/ray-*"))


def test_an_error_of_the_runs_own_is_not_tried_again(submit: Submit, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("def compute_score(*a, **k):\n    raise RuntimeError('broken reward')\n")
    broken = f"reward.compute_score={tmp_path}/reward.py:compute_score"
    job = submit("baseline_7b", 2, "cluster.genrm_nodes=0", "genrm.enabled=false", ONE_RANK, broken)
    job.wait_state("FAILED")
    assert job.cluster.job(job.id)["ExitCode"] == "1:0"
    assert "not requeued (the run failed by an error of its own" in job.log()
    assert "unscored" in job.log()
    job.wait_gone()
