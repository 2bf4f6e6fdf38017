"""Slurm's commands, as a job's first node uses them. Standard library only, for the Python of the batch host."""

from __future__ import annotations

import datetime
import os
import re
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence

COMMAND_S = 60.0
"""For an answer of the controller; a busy one takes many seconds."""
PATIENCE_S = 300.0
"""A controller that restarts or fails over refuses for minutes: so long it is asked again."""
_AGAIN_S = 5.0
_UPDATE_S = 15.0
_OF_A_STEP = ("SLURM_STEP", "SLURM_CPU_BIND", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NNODES", "SLURM_TASKS_PER_NODE")
"""A step's own variables: an inner srun would take them as its options. They are there when NeMo-Run started us."""


class SlurmError(RuntimeError):
    """A command of Slurm failed."""


def run(*command: str, patience_s: float = PATIENCE_S) -> str:
    """What a command prints; asked again until `patience_s` have passed.

    Raises:
        SlurmError: with the command's own words.
    """
    end = time.monotonic() + patience_s
    while True:
        try:
            done = subprocess.run(
                command,
                text=True,
                timeout=COMMAND_S,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
                env={**os.environ, "SLURM_TIME_FORMAT": "standard"},
            )
            if done.returncode == 0:
                return done.stdout.strip()
            what = f"exit code {done.returncode}: {done.stdout.strip()}"
        except subprocess.TimeoutExpired:
            what = f"no answer within {COMMAND_S:g} s"
        if time.monotonic() > end:
            raise SlurmError(f"{shlex.join(command)}: {what}")
        time.sleep(_AGAIN_S)


def _told(job_id: str) -> dict[str, str]:
    """What `scontrol show job` says."""
    found: dict[str, str] = {}
    for name, value in re.findall(r"(\S+?)=(\S*)", run("scontrol", "show", "job", job_id)):
        found.setdefault(name, "" if value == "(null)" else value)
    return found


def hostnames(nodelist: str) -> list[str]:
    """node[1-3] -> node1, node2, node3."""
    return run("scontrol", "show", "hostnames", nodelist).split()


def end_time(job_id: str) -> float | None:
    """When the job's time limit ends it, Unix seconds; None without a limit."""
    told = _told(job_id).get("EndTime", "Unknown")
    return None if told == "Unknown" else datetime.datetime.fromisoformat(told).timestamp()


def requeues(job_id: str) -> int:
    """How often the job has been put back into the queue, the controller's own doing included."""
    return int(_told(job_id).get("Restarts", 0))


def spare_nodes(job_id: str, used: Sequence[str]) -> int:
    """Nodes that could take the place of some of `used`: up, in the partition, not excluded already.

    0 where the job may not use all of its partition (a reservation, features, named nodes): excluding a node there may
    leave too few, and the job would wait for ever.
    """
    told = _told(job_id)
    if any(told.get(name) for name in ("Reservation", "Features", "ReqNodeList")):
        return 0
    partition, excluded = told["Partition"], told.get("ExcNodeList")
    up = run("sinfo", "-h", "-N", "-p", partition, "-t", "idle,alloc,mix,comp", "-o", "%N").split()
    return len(set(up) - set(used) - set(hostnames(excluded) if excluded else ()))


def requeue(job_id: str, exclude: Sequence[str]) -> None:
    """Put the job back into the queue; it then avoids `exclude` too. The caller is killed soon after."""
    avoided = _told(job_id).get("ExcNodeList")
    run("scontrol", "requeue", job_id)
    if not exclude:
        return
    # Slurm takes a new list only from a pending job, which this one is in a moment.
    nodes = ",".join(filter(None, [avoided, *exclude]))
    end = time.monotonic() + _UPDATE_S
    while True:
        try:
            run("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={nodes}", patience_s=0)
            return
        except SlurmError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def step(
    nodes: Sequence[str], command: Sequence[str], env: Mapping[str, str], logs: str, output: str | None = None
) -> list[str]:
    """The srun that starts one task of `command` on each of `nodes`, beside whatever runs there.

    With FAPO_CONTAINER (an image for pyxis) the task runs in it. Mounted at the same paths are the checkout, `logs`,
    FAPO_MOUNTS, and /tmp, where a node's raylet and the driver meet although each has a container of its own.
    """
    words = ["srun", "--overlap", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1"]
    # Sites may set that one task's end ends its step; here each node's end is looked at by itself.
    words += [f"--nodelist={','.join(nodes)}", "--mem=0", "--kill-on-bad-exit=0", "--wait=0"]
    if output is not None:
        words.append(f"--output={output}")
    if image := env.get("FAPO_CONTAINER"):
        here = os.getcwd()
        mounts = ",".join(filter(None, [f"{here}:{here}", f"{logs}:{logs}", "/tmp:/tmp", env.get("FAPO_MOUNTS", "")]))
        words += [f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={here}"]
        words.append("--no-container-mount-home")
    return [*words, *command]


def step_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The environment for `step`: ours without what belongs to the step that we may be in ourselves."""
    kept = {name: value for name, value in env.items() if not name.startswith(_OF_A_STEP)}
    # Else the one task, and with it all of Ray, is bound to one core; and sbatch --export=... would strip the step.
    return {**kept, "SLURM_CPU_BIND": "none", "SLURM_EXPORT_ENV": "ALL"}
