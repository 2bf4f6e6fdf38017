"""NeMo-Run: our tasks as its scripts, our executors as its factories, and `fapo launch` on top of them.

NeMo-Run submits, keeps the record of what was submitted, and orders tasks; what happens inside a job (preflight, Ray,
driver, signals, requeue) is megatron_fapo.launch.job. The code runs in place, from the directory of the command, which
all nodes share: a packaged copy would not hold the models and data that configurations name by relative paths, and a
requeued job would resume with other code than the one that its checkout shows.

    nemo fapo train config=examples/fapo_7b.yaml run.executor=fapo_slurm run.executor.partition=gpu
    python -m megatron_fapo.launch.nemo --yes config=examples/tiny_cpu.yaml overrides="seed=2 run_dir=runs/two"

This is the only module that imports nemo_run, which takes seconds.
"""

# NeMo-Run's command line reads annotations: as text it cannot resolve them, and it knows Optional but not `| None`.
# ruff: noqa: UP045
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import nemo_run as run
from invoke.exceptions import UnexpectedExit
from nemo_run.config import get_nemorun_home
from nemo_run.core.execution.slurm import SlurmJobDetails

from megatron_fapo.config.show import show
from megatron_fapo.errors import UserError
from megatron_fapo.launch.experiment import Task, TaskSpec, Verb, check_tasks, refuse_rewritten_paths, script, task_spec
from megatron_fapo.launch.life import EXIT_INTERRUPTED, EXIT_SAVED

WARNING_S = 900
"""Between SIGUSR1 and the time limit: for the step under way and a checkpoint."""
_POLL_S = 5.0
_ENDED = re.compile("BOOT_FAIL|CANCELLED|COMPLETED|DEADLINE|FAILED|NODE_FAIL|OUT_OF_MEMORY|PREEMPTED|TIMEOUT")

# Slurm warns the batch shell alone, and bash answers a signal only when no command is in its foreground. So NeMo-Run's
# srun waits in the background, and the signal goes to one process, by its id: sent to the step it would also reach what
# that process has started, and Ray would die before the checkpoint.
_PASS_ON_SIGNAL = """\
rm -f "$FAPO_PID_FILE"
trap 'kill -USR1 "$(cat "$FAPO_PID_FILE")"' USR1
srun() {
  command srun "$@" &
  wait $!
  while kill -0 $! 2> /dev/null; do wait $!; done
  wait $!
}"""


@dataclass(kw_only=True)
class OneLog(SlurmJobDetails):
    """All attempts of a job in one file: who follows it does not lose it when the job is requeued."""

    @property
    def srun_stdout(self) -> Path:
        return Path(str(self.folder)) / f"log-{self.job_name}_%j.out"


def fapo_task(
    config: Sequence[str | Path],
    overrides: Sequence[str] = (),
    *,
    verb: Verb = "train",
    environment: Mapping[str, str] | None = None,
) -> run.Script:
    """`fapo train`, or another verb, as a task for an experiment of your own; it goes on from the newest checkpoint.

    Give it `slurm_executor()`, or any executor that runs one process on this machine.
    """
    spec = task_spec(verb, [Path(file) for file in config], overrides)
    return _script(spec, environment or {})


def _script(task: Task | TaskSpec, environment: Mapping[str, str], python: str = sys.executable) -> run.Script:
    text = script(task, environment=environment, directory=Path.cwd(), python=python)
    refuse_rewritten_paths([*text.splitlines(), get_nemorun_home()])
    return run.Script(inline=text)


def slurm_executor(
    *,
    nodes: int = 0,
    gpus_per_node: Optional[int] = None,
    partition: Optional[str] = None,
    account: Optional[str] = None,
    time: Optional[str] = None,
    dependency: Optional[str] = None,
    container: Optional[str] = None,
    mounts: str = "",
    sbatch: Optional[dict[str, Any]] = None,
) -> run.SlurmExecutor:
    """Whole nodes of the Slurm cluster that this machine submits to, for `fapo_task`.

    Args:
        nodes: 0: `fapo launch` and `nemo fapo train` take those of config.cluster; anywhere else give a number.
        time: as in `sbatch --time`; unset: the partition's.
        container: an image for pyxis, in which the processes of the run are started, with `mounts` (A:B,C:D).
        sbatch: further options of sbatch by their long names; True for one without a value.
    """
    environment = {"FAPO_EXECUTOR": "slurm", "FAPO_PID_FILE": "/nemo_run/pid"}
    if container is not None:
        environment |= {"FAPO_CONTAINER": container, "FAPO_MOUNTS": mounts}
    more = {"requeue": True, "kill_on_invalid_dep": "yes"}
    return run.SlurmExecutor(
        account=account,
        partition=partition,
        job_name_prefix="fapo.",
        time=time,
        nodes=nodes,
        ntasks_per_node=1,
        gpus_per_node=gpus_per_node,
        exclusive=True,
        mem="0",  # all of it: some clusters give a small default even to whole nodes
        signal=f"B:USR1@{WARNING_S}",
        additional_parameters=more | ({"dependency": dependency} if dependency else {}) | (sbatch or {}),
        # One process on the first node, the batch shell's, which can then signal it by its id.
        srun_args=["--nodes=1", "--ntasks=1", "--relative=0", "--overlap", "--cpu-bind=none", "--open-mode=append"],
        setup_lines=_PASS_ON_SIGNAL,
        env_vars=environment,
        job_details=OneLog(),
        tunnel=run.LocalTunnel(job_dir=""),
        packager=run.Packager(),
        poll_estimated_start_time=False,
    )


@run.cli.factory(name="fapo_local")
def _local_factory() -> run.Config[run.LocalExecutor]:
    return run.Config(run.LocalExecutor)


@run.cli.factory(name="fapo_slurm")
def _slurm_factory() -> run.Config[run.SlurmExecutor]:
    return run.Config(slurm_executor)


@run.cli.entrypoint(name="train", namespace="fapo", type="experiment", default_executor=run.Config(run.LocalExecutor))
def train(ctx: run.cli.RunContext, config: str, overrides: str = "", verb: str = "train") -> None:
    """Train a policy, or a GenRM with verb="genrm train"; a run that was stopped goes on.

    Args:
        config: files, separated by commas; later ones win.
        overrides: section.key=value, separated by spaces, quoted as in a shell.
    """
    spec = task_spec(verb, [Path(file) for file in config.split(",")], shlex.split(overrides))  # type: ignore[arg-type]
    executor = ctx.executor
    on_slurm = isinstance(executor, run.SlurmExecutor)
    (task,) = check_tasks([spec], look_for_gpu=not on_slurm)
    if on_slurm:
        executor.nodes = task.nodes(executor.nodes or None)
        executor.gpus_per_node = executor.gpus_per_node or task.gpus_per_node
    with run.Experiment("fapo") as experiment:
        experiment.add(_script(task, {}), executor=executor, name=spec.name, tail_logs=True)
        ctx.launch(experiment)


def run_local(title: str, tasks: Sequence[Task], environment: Mapping[str, str], *, dry_run: bool) -> int:
    """The tasks one after another on this machine, with their output; stops at the first that fails and returns its
    exit code. Signals are the tasks' to answer, by saving."""
    if dry_run:
        for task in tasks:
            _print_task(task, _script(task, environment).inline)
        return 0
    with tempfile.TemporaryDirectory() as directory:
        pid_file = Path(directory) / "pid"
        asked = []

        def pass_on(number: int, _: object) -> None:
            asked.append(number)
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # between two tasks
                os.kill(int(pid_file.read_text()), number)

        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, pass_on) for number in signals}
        try:
            for task in tasks:
                pid_file.unlink(missing_ok=True)
                executor = run.LocalExecutor(env_vars={"FAPO_PID_FILE": str(pid_file)})
                with run.Experiment(title, skip_status_at_exit=True, enable_goodbye_message=False) as experiment:
                    experiment.add(_script(task, environment), executor=executor, name=task.spec.name)
                    experiment.run(tail_logs=True)
                if code := _local_exit_code(Path(experiment.jobs[0].executor.job_dir)):
                    return code
                if asked and task is not tasks[-1]:
                    return EXIT_INTERRUPTED if asked[0] == signal.SIGINT else EXIT_SAVED
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return 0


def _local_exit_code(job_dir: Path) -> int:
    """NeMo-Run only tells failure from success; torchx, which it runs on, leaves the code in a file."""
    (record,) = job_dir.glob("*/*/SUCCESS")
    ((replica,),) = json.loads(record.read_text())["roles"].values()
    code = int(replica["exitcode"])
    return code if code >= 0 else 128 - code


def run_slurm(
    title: str,
    tasks: Sequence[Task],
    environment: Mapping[str, str],
    nodes: int | None,
    options: Mapping[str, Any],
    *,
    detach: bool,
    dry_run: bool,
) -> int:
    """Submit one job per task, each after those that it builds on; print (dry_run), follow or leave (detach) them.

    `nodes` and `options` (arguments of `slurm_executor`) are what a person asked for.
    """
    with run.Experiment(title, skip_status_at_exit=True, enable_goodbye_message=False) as experiment:
        for task in tasks:
            own = dict(options) | ({"dependency": None} if task.spec.after else {})
            executor = slurm_executor(nodes=task.nodes(nodes), gpus_per_node=task.gpus_per_node, **own)
            inside = options["container"] is not None and task.spec.verb == "convert"
            if inside:  # A run's own processes are put into containers by launch.job; this one has no such nurse.
                here = f"{Path.cwd()}:{Path.cwd()}"
                executor.container_image = options["container"]
                executor.container_mounts = [here, *filter(None, options["mounts"].split(","))]
            text = _script(task, environment, "python3" if inside else sys.executable)
            experiment.add(text, executor=executor, name=task.spec.name, dependencies=list(task.spec.after))
        folder = Path(experiment.jobs[0].executor.experiment_dir)
        if dry_run:
            experiment.dryrun(log=False, delete_exp_dir=False)
            for task in tasks:
                _print_task(task, (folder / task.spec.name / "scripts" / f"{task.spec.name}.sh").read_text())
                jobs = "".join(f":JOB-OF-{name}" for name in task.spec.after)
                after = f" --dependency=afterok{jobs}" if jobs else ""
                print(f"##### {task.spec.name}: sbatch --requeue --parsable{after}")
                print((folder / f"{task.spec.name}_sbatch.sh").read_text())
            shutil.rmtree(folder)
            return 0
        try:
            experiment.run(detach=True)
        except UnexpectedExit as error:
            submitted = [job.handle.rsplit("/", 1)[-1] for job in experiment.jobs if job.handle]
            if submitted:
                subprocess.run(["scancel", *submitted], check=False)
            raise UserError(f"{error.result.stderr.strip()}; nothing was submitted") from error
    logs = {}
    for each in experiment.jobs:
        job = each.handle.rsplit("/", 1)[-1]
        logs[job] = folder / each.id / f"log-fapo.{each.id}_{job}.out"
        print(f"{each.id}: job {job}\n  follow: tail -F {logs[job]}\n  cancel: scancel {job}")
    print(f"  state:  NEMORUN_HOME={get_nemorun_home()} nemo experiment status {folder.name}", flush=True)
    return 0 if detach else _follow(logs)


def _print_task(task: Task, text: str) -> None:
    if task.spec.verb != "convert":
        print(f"##### {task.spec.name}: configuration\n{show(task.loaded)}")
    print(f"##### {task.spec.name}: script\n{text}")


def _follow(logs: Mapping[str, Path]) -> int:
    """Print what jobs write until all have ended; the first exit code that is not 0. Ctrl-C leaves them running.

    Not by NeMo-Run: its follower asks the accounting ten times a second, and takes a requeue for an end.
    """
    read, said, codes = dict.fromkeys(logs, 0), dict.fromkeys(logs, ""), dict[str, int]()
    try:
        while True:
            for job in logs.keys() - codes.keys():
                state, code = _state(job)
                if state != said[job]:
                    said[job] = state
                    print(f"job {job}: {state}", file=sys.stderr)
                if code is not None:
                    codes[job] = code
            for job, log in logs.items():
                if log.exists():
                    with log.open(errors="replace") as file:
                        file.seek(read[job])
                        print(file.read(), end="", flush=True)
                        read[job] = file.tell()
            if len(codes) == len(logs):
                return next((codes[job] for job in logs if codes[job]), 0)
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        running = logs.keys() - codes.keys()
        print(f"\nno longer following; not ended: {', '.join(running)} (scancel ends them)", file=sys.stderr)
        return 130


def _state(job: str) -> tuple[str, int | None]:
    """What Slurm says of a job, and its exit code once it has ended."""
    answer = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True, check=False)
    found = re.search(r"JobState=(\S+) Reason=(\S+) .*? ExitCode=(\d+):(\d+)", answer.stdout)
    if found is None:
        # Slurm forgets ended jobs after minutes; any other failure is a controller that is busy, and the job goes on.
        return answer.stderr.strip(), 1 if "Invalid job id" in answer.stderr else None
    state, reason, code, number = found.groups()
    if not _ENDED.fullmatch(state):
        return f"{state} ({reason})" if state == "PENDING" else state, None
    killed = 128 + int(number) if int(number) else 0
    return state, int(code) or killed or int(state != "COMPLETED")


if __name__ == "__main__":
    run.cli.main(train)
