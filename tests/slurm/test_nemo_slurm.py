"""`fapo launch --executor slurm` against a real cluster, and our executor in an experiment of a user's own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_fapo.config.load import load_config
from megatron_fapo.observe.metrics import read_metrics
from tests.launch.tiny import genrm_config, policy_config
from tests.slurm.cluster import SlurmCluster

pytestmark = pytest.mark.timeout(1800)
ROOT = Path(__file__).parents[2]


def launch(cluster: SlurmCluster, root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "megatron_fapo.cli", "launch", "--executor=slurm", "--time=60", *arguments,
         f"--env=FAPO_LOGS={root / 'jobs'}"],
        env={**{k: v for k, v in cluster.env.items() if k != "NEMORUN_HOME"}, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, cwd=ROOT,
    )  # fmt: skip


def jobs(output: str) -> dict[str, str]:
    """Task -> job, as `fapo launch` says."""
    return dict(re.findall(r"^(\w+): job (\d+)$", output, re.MULTILINE))


def test_a_genrm_is_trained_exported_and_judges_the_policy(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    """Three jobs that wait for one another; the first is warned and goes on, the second makes the third's GenRM."""
    runs = tmp_path / "runs"
    file = tmp_path / "chain.yaml"
    tasks = [
        {"name": "genrm", "verb": "genrm train", "config": [str(genrm_config(tmp_path))]},
        {
            "name": "export",
            "verb": "convert",
            "source": f"{runs}/genrm/checkpoints/best",
            "target": f"{runs}/genrm/hf",
            "after": ["genrm"],
        },
        {
            "name": "policy",
            "verb": "train",
            "config": [str(policy_config(tmp_path, steps=2))],
            "overrides": [f"genrm.model_path={runs}/genrm/hf"],
            "after": ["export"],
        },
    ]
    file.write_text(json.dumps({"tasks": tasks}))

    def warn() -> None:
        metrics = runs / "genrm" / "metrics.jsonl"
        slurm_cluster.wait(lambda: metrics.exists() and read_metrics(runs / "genrm"), 900, "no evaluation was made")
        (job,) = slurm_cluster.run("squeue", "-h", "-t", "RUNNING", "--name=fapo.genrm", "-o", "%i").split()
        slurm_cluster.run("scancel", "--batch", "--signal=USR1", job)

    with ThreadPoolExecutor() as pool:
        warned = pool.submit(warn)
        result = launch(slurm_cluster, tmp_path, "--experiment", str(file))
        warned.result()
    assert result.returncode == 0, result.stdout[-6000:]
    ids = jobs(result.stdout)
    ended = {name: slurm_cluster.job(job) for name, job in ids.items()}
    assert [ended[name]["JobState"] for name in ("genrm", "export", "policy")] == ["COMPLETED"] * 3
    assert ended["genrm"]["EndTime"] <= ended["export"]["StartTime"]
    assert ended["export"]["EndTime"] <= ended["policy"]["StartTime"]
    assert (runs / "genrm" / "hf" / "config.json").exists()
    assert not (runs / "genrm" / "hf.partial").exists()
    assert load_config([runs / "policy" / "config.yaml"], []).config.genrm.model_path == f"{runs}/genrm/hf"
    assert [record["step"] for record in read_metrics(runs / "policy")] == [1, 2]
    assert ended["genrm"]["Restarts"] == "1"
    # Followed to the end, both attempts in order, and NeMo-Run knows the experiment.
    assert result.stdout.count("decision: not requeued (the run is complete)") == 2
    requeued, done = (result.stdout.rindex(text) for text in ("decision: requeued", "decision: not requeued"))
    assert requeued < result.stdout.rindex("resumed from") < done
    status = re.search(r"NEMORUN_HOME=(\S+) nemo experiment status (\S+)", result.stdout)
    assert status is not None
    assert Path(status[1]) == runs / ".nemo_run"
    nemo = str(Path(sys.executable).with_name("nemo"))
    answer = slurm_cluster.run(nemo, "experiment", "status", status[2], NEMORUN_HOME=status[1])
    assert answer.count("SUCCEEDED") == 3, answer


def test_what_waits_for_a_failed_task_is_cancelled(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    config = policy_config(tmp_path, steps=1)
    (tmp_path / "data" / "train.jsonl").write_text("{}\n")  # what only the run itself can see
    tasks = [
        {"name": name, "verb": "train", "config": [str(config)], "overrides": [f"run_dir={tmp_path / name}"], **more}
        for name, more in (("one", {}), ("two", {"after": ["one"]}))
    ]
    (tmp_path / "two.yaml").write_text(json.dumps({"tasks": tasks}))
    result = launch(slurm_cluster, tmp_path, "--experiment", str(tmp_path / "two.yaml"))
    assert result.returncode == 2, result.stdout[-6000:]
    states = {name: slurm_cluster.job(job)["JobState"] for name, job in jobs(result.stdout).items()}
    assert states == {"one": "FAILED", "two": "CANCELLED"}
    assert not (tmp_path / "two").exists()


def test_an_experiment_is_submitted_whole_or_not_at_all(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    config = policy_config(tmp_path, steps=1)
    tasks = [
        {"name": "one", "verb": "train", "config": [str(config)], "overrides": [f"run_dir={tmp_path}/one"]},
        {
            "name": "two",
            "verb": "train",
            "config": [str(config)],
            "overrides": [f"run_dir={tmp_path}/two", "device=auto", "cluster.gpus_per_node=99"],
            "after": ["one"],
        },
    ]
    (tmp_path / "two.yaml").write_text(json.dumps({"tasks": tasks}))
    before = set(slurm_cluster.run("squeue", "-h", "-t", "all", "-o", "%i").split())
    result = launch(slurm_cluster, tmp_path, "--experiment", str(tmp_path / "two.yaml"))
    assert result.returncode == 2, result.stdout[-6000:]
    assert "nothing was submitted" in result.stdout
    assert "Requested node configuration is not available" in result.stdout
    new = set(slurm_cluster.run("squeue", "-h", "-t", "all", "-o", "%i").split()) - before
    states = {slurm_cluster.job(job)["JobName"]: slurm_cluster.job(job)["JobState"] for job in new}
    # Slurm remembers what it refused as a job that failed.
    assert states.pop("fapo.one") == "CANCELLED"
    assert states in ({}, {"fapo.two": "FAILED"})


OWN = '''
import nemo_run as run
from megatron_fapo.launch.nemo import slurm_executor

TEXT = """
echo $$ > "$FAPO_PID_FILE"
exec python3 -u -c '
import signal, subprocess, sys, time
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
child = subprocess.Popen(["sleep", "60"])
print("ready", flush=True)
end = time.monotonic() + 60
while not asked and time.monotonic() < end:
    time.sleep(0.1)
time.sleep(1)
print("asked", len(asked), "child", child.poll(), flush=True)
child.kill()
sys.exit(75)
'
"""

if __name__ == "__main__":
    with run.Experiment("own", skip_status_at_exit=True, enable_goodbye_message=False) as experiment:
        experiment.add(run.Script(inline=TEXT), executor=slurm_executor(nodes=2, time="60"), name="own")
        experiment.run(detach=True)
    job = experiment.jobs[0]
    print("JOB", job.handle.rsplit("/", 1)[-1], job.executor.job_dir)
'''


def test_the_warning_reaches_one_process_only_and_the_exit_code_comes_back(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    """Slurm signals the batch shell; its step waits on a node beside another; what the process started is spared."""
    (tmp_path / "own.py").write_text(OWN)
    path = {"PYTHONPATH": str(ROOT), "NEMORUN_HOME": str(tmp_path / "home"), "PYTHONWARNINGS": "ignore"}
    output = slurm_cluster.run(sys.executable, str(tmp_path / "own.py"), **path)
    _, job, folder = output.splitlines()[-1].split()
    log = Path(folder) / f"log-fapo.own_{job}.out"
    slurm_cluster.wait(lambda: log.exists() and "ready" in log.read_text(), 60, "the task has not begun")
    slurm_cluster.run("scancel", "--batch", "--signal=USR1", job)
    slurm_cluster.wait(lambda: slurm_cluster.job(job)["JobState"] == "FAILED", 60, "the job goes on")
    assert "asked 1 child None" in log.read_text()
    assert slurm_cluster.job(job)["ExitCode"] == "75:0"
