"""Jobs of the Slurm tests: real scripts of slurm/, submitted to the cluster, watched and disturbed."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from tests.slurm.cluster import SlurmCluster

ROOT = Path(__file__).parents[2]
TINY = "examples/slurm_cpu.yaml"
START_S, STEP_S, END_S = 600, 300, 120
"""They end a hang, and nothing else: beside other real runs, a start has taken 230 s of two cores."""


class Job:
    """One submitted script."""

    def __init__(self, cluster: SlurmCluster, place: Path, script: str, nodes: int, *arguments: str, **env: str):
        self.cluster, self.place, self.run_dir = cluster, place, place / "run"
        words = ["sbatch", "--parsable", f"--nodes={nodes}", f"--output={place}/job.log", f"slurm/{script}.sbatch"]
        own = {"FAPO_HOME": str(ROOT), "FAPO_LOGS": str(place / "logs"), "OMP_NUM_THREADS": "1", **env}
        self.id = subprocess.run(
            [*words, "-c", TINY, f"run_dir={self.run_dir}", *arguments],
            cwd=ROOT, env={**cluster.env, **own}, check=True, stdout=subprocess.PIPE, text=True,
        ).stdout.strip()  # fmt: skip

    def log(self) -> str:
        path = self.place / "job.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def state(self) -> str:
        return self.cluster.job(self.id)["JobState"]

    def nodes(self) -> list[str]:
        """Where it runs, in the order of its roles."""
        return self.cluster.run("scontrol", "show", "hostnames", self.cluster.job(self.id)["NodeList"]).split()

    def metrics(self) -> list[dict[str, Any]]:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def wait_attempt(self, number: int) -> None:
        """Until the job has been requeued so often and runs."""

        def there() -> bool:
            job = self.cluster.job(self.id)
            return int(job["Restarts"]) >= number and job["JobState"] == "RUNNING"

        self._wait(there, START_S, f"attempt {number} does not run")

    def wait_step(self, step: int) -> None:
        self._wait(lambda: self.metrics()[-1:] and self.metrics()[-1]["step"] >= step, START_S, f"no step {step}")

    def wait_said(self, text: str, times: int = 1) -> None:
        self._wait(lambda: self.log().count(text) >= times, STEP_S, f"never said {text!r}")

    def wait_state(self, *states: str) -> None:
        self._wait(lambda: self.state() in states, START_S, f"not {' or '.join(states)}")

    def _wait(self, condition: Any, seconds: float, what: str) -> None:
        try:
            self.cluster.wait(condition, seconds, what)
        except TimeoutError as error:
            job = self.cluster.run("scontrol", "show", "job", self.id, check=False)
            raise AssertionError(f"{error}\n{job}\n{self.log()[-6000:]}") from None

    def signal(self, name: str) -> None:
        """To the batch script alone, as Slurm does before the time limit."""
        self.cluster.run("scancel", "--batch", f"--signal={name}", self.id)

    def processes(self, pattern: str = "") -> list[int]:
        """Of this job, on whatever node, whose command line the pattern is found in."""
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                if f"SLURM_JOB_ID={self.id}".encode() not in (directory / "environ").read_bytes().split(b"\0"):
                    continue
                words = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # it ended between the listing and the look
                continue
            if words.strip() and re.search(pattern, words):
                found.append(int(directory.name))
        return found

    def wait_processes(self, pattern: str) -> None:
        self._wait(lambda: self.processes(pattern), START_S, f"no process {pattern}")

    def wait_gone(self) -> None:
        self._wait(lambda: not self.processes(), END_S, "processes are left")

    def end(self) -> None:
        """Cancel it if it is still there."""
        self.cluster.run("scancel", self.id, check=False)
        self.wait_gone()
