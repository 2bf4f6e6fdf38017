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
_AGAIN_S = 5.0
_UPDATE_S = 15.0
_OF_A_STEP = ("SLURM_STEP", "SLURM_CPU_BIND", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NNODES", "SLURM_TASKS_PER_NODE")
"""A step's own variables: an inner srun would take them as its options. They are there when NeMo-Run started us."""


class SlurmError(RuntimeError):
    """A command of Slurm failed."""


def run(*command: str, tries: int = 3) -> str:
    """What a command prints. A controller that is busy or fails over refuses now and then: it is asked again.

    Raises:
        SlurmError: with the command's own words.
    """
    for left in reversed(range(tries)):
        done = subprocess.run(
            command, text=True, timeout=COMMAND_S, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        if done.returncode == 0:
            return done.stdout.strip()
        if left:
            time.sleep(_AGAIN_S)
    raise SlurmError(f"{shlex.join(command)}: exit code {done.returncode}: {done.stdout.strip()}")


def hostnames(nodelist: str) -> list[str]:
    """node[1-3] -> node1, node2, node3."""
    return run("scontrol", "show", "hostnames", nodelist).split()


def end_time(job_id: str) -> float | None:
    """When the job's time limit ends it, Unix seconds; None without a limit."""
    found = re.search(r"EndTime=(\S+)", run("scontrol", "show", "job", job_id))
    if found is None or found.group(1) == "Unknown":
        return None
    return datetime.datetime.fromisoformat(found.group(1)).timestamp()


def requeues(job_id: str) -> int:
    """How often the job has been put back into the queue, the controller's own doing included."""
    found = re.search(r"Restarts=(\d+)", run("scontrol", "show", "job", job_id))
    return 0 if found is None else int(found.group(1))


def spare_nodes(partition: str, used: Sequence[str]) -> int:
    """Nodes of the partition that are neither in `used` nor down nor drained."""
    up = run("sinfo", "-h", "-N", "-p", partition, "-t", "idle,alloc,mix,comp,planned", "-o", "%N").split()
    return len(set(up) - set(used))


def requeue(job_id: str, exclude: Sequence[str]) -> None:
    """Put the job back into the queue; it then avoids `exclude` too. The caller is killed soon after."""
    before = re.search(r"ExcNodeList=(\S+)", run("scontrol", "show", "job", job_id))
    run("scontrol", "requeue", job_id)
    if not exclude:
        return
    avoided = [] if before is None or before.group(1) == "(null)" else [before.group(1)]
    # Slurm takes a new list only from a pending job, which this one is in a moment.
    end = time.monotonic() + _UPDATE_S
    while True:
        try:
            run("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join([*avoided, *exclude])}", tries=1)
            return
        except SlurmError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def step(nodes: Sequence[str], command: Sequence[str], env: Mapping[str, str], output: str | None = None) -> list[str]:
    """The srun that starts one task of `command` on each of `nodes`, beside whatever runs there.

    With FAPO_CONTAINER (an image for pyxis) the task runs in it: the checkout and FAPO_MOUNTS are mounted.
    """
    words = ["srun", "--overlap", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1"]
    words += [f"--nodelist={','.join(nodes)}", "--mem=0"]
    if output is not None:
        words.append(f"--output={output}")
    if image := env.get("FAPO_CONTAINER"):
        mounts = ",".join(filter(None, [f"{os.getcwd()}:{os.getcwd()}", env.get("FAPO_MOUNTS", "")]))
        words += [f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={os.getcwd()}"]
        words.append("--no-container-mount-home")
    return [*words, *command]


def step_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The environment for `step`: ours without what belongs to the step that we may be in ourselves."""
    kept = {name: value for name, value in env.items() if not name.startswith(_OF_A_STEP)}
    return {**kept, "SLURM_CPU_BIND": "none"}  # else the one task, and with it all of Ray, is bound to one core
