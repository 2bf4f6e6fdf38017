"""A job of Slurm from its first node: preflight, Ray on all nodes, the driver, and what becomes of the job afterwards.

    python -m megatron_fapo.launch.job VERB ARGUMENTS-OF-THE-VERB     (slurm/*.sbatch and `fapo launch` run this)

In: an allocation, and a verb of `fapo` that works on a cluster (`train`, `genrm train`, `genrm serve`, ...). Everything
else is a Slurm step: one of preflight and one of Ray over all nodes, one of the driver on the first. Signals: SIGUSR1
(sent before the time limit) stops the driver with everything saved, then the job is requeued and goes on; SIGTERM
stops it for good. Decisions are in life.py; exit codes too. Standard library only, Python 3.9 or later: with a
container, the batch host's own Python runs this.

Logs: FAPO_LOGS (runs/slurm) / JOBID.ATTEMPT / {preflight,ray}-NODE.{json,log}, job.json.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_fapo.launch import life, slurm
from megatron_fapo.launch.preflight import judge, read_reports
from megatron_fapo.launch.ray_node import address_towards

PREFLIGHT_S = 180.0
"""For all nodes to report; a hung file system is the usual reason for none."""
CANARY_S = 120.0
IMAGE_S = 900.0
"""More, where nodes may have to fetch and unpack a container image first."""
RAY_S = 300.0
"""For the head of Ray to listen; on cold nodes the imports alone take a minute. Likewise for the driver to begin."""
NODE_LOST_S = 60.0
"""How long a driver may go on after a node's Ray has ended: it saves what it can, or waits in vain."""
RAY_NOTICE_S = 15.0
"""`ray start --block` looks after its processes every few seconds."""
TEARDOWN_S = 45.0
TOGETHER_S = 10.0
"""Nodes whose Ray ends later than so after the first were taken along by it."""
IDLE_RESTARTS = 2
"""cluster.idle_restarts, while the configuration could not be read."""
REQUEUE_BEFORE_S = 60.0
"""A driver that has not stopped so long before the time limit is given up: after the limit nothing is requeued."""
RESUMABLE = ("train", "genrm train")
GOES_ON = (*RESUMABLE, "genrm serve")
_CPU_STORE_MB = 1024
_TAIL_LINES = 25
_POLL_S = 0.5


class Stop:
    """What the job was asked to do by a signal: life.TIME_LIMIT, life.CANCEL, or None."""

    def __init__(self) -> None:
        self.asked: str | None = None
        signal.signal(signal.SIGUSR1, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, _: object) -> None:
        if number == signal.SIGTERM:  # whatever came before
            self.asked = life.CANCEL
        elif self.asked is None:
            self.asked = life.TIME_LIMIT
        say(f"{signal.Signals(number).name}: {self.asked}")


class Job:
    """One attempt of the job that SLURM_JOB_ID names."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], stop: Stop) -> None:
        self.stop = stop
        self.argv, self.id, self.attempt = list(argv), env["SLURM_JOB_ID"], int(env.get("SLURM_RESTART_COUNT") or 0)
        self.verb = " ".join(itertools.takewhile(str.isalpha, self.argv))
        self.env = slurm.step_environment(env)
        self.nodes = slurm.hostnames(env["SLURM_JOB_NODELIST"])
        root = Path(env.get("FAPO_LOGS", "runs/slurm")).resolve()
        self.root, self.logs, self.history = root, root / f"{self.id}.{self.attempt}", root / f"{self.id}.json"
        self.logs.mkdir(parents=True, exist_ok=True)
        self._pid_file = self.logs / "driver.pid"
        # In a container the image's Python has the packages, else the one that runs this.
        self.python = env.get("FAPO_CONTAINER_PYTHON", "python3") if env.get("FAPO_CONTAINER") else sys.executable
        self.description: dict[str, Any] = {}
        self.steps: list[subprocess.Popen[bytes]] = []
        self.ray: subprocess.Popen[bytes] | None = None
        self.run_dir: Path | None = None
        self.start_steps: list[int] = json.loads(self.history.read_text()) if self.history.exists() else []
        self.started = len(self.start_steps)
        """Attempts before this one that are on record."""
        self.evidence: dict[str, Any] = {}

    def run(self) -> int:
        """The whole attempt; returns the batch script's exit code."""
        self._record_start()
        say(f"job {self.id} attempt {self.attempt} on {', '.join(self.nodes)}; logs: {self.logs}")
        try:
            if self._preflight():
                self._work()
        except (slurm.SlurmError, OSError) as error:  # the controller, or a name that does not resolve
            self.evidence["overdue"] = f"{self.nodes[0]}: {error}"
        finally:
            self._teardown()
        return self._finish()

    def _start(self, nodes: Sequence[str], *command: str, output: str | None = None) -> subprocess.Popen[bytes]:
        path = None if output is None else f"{self.logs}/{output}"
        words = slurm.step(nodes, command, self.env, str(self.root), path)
        # A session of its own: signals of the batch shell's group are ours to pass on.
        self.steps.append(subprocess.Popen(words, env=self.env, stdin=subprocess.DEVNULL, start_new_session=True))
        return self.steps[-1]

    def _until(self, deadline_s: float, what: str) -> Iterator[None]:
        """A turn every half second; ends when a stop is asked for, and at the deadline, which becomes evidence."""
        end = time.monotonic() + deadline_s
        while self.stop.asked is None:
            yield
            if time.monotonic() > end:
                self.evidence["overdue"] = f"{what} after {deadline_s:g} s"
                return
            time.sleep(_POLL_S)

    def _preflight(self) -> bool:
        """Whether the nodes and the configuration are fit for the run."""
        canary = float(self.env.get("FAPO_CANARY_S", CANARY_S))
        module = [self.python, "-m", "megatron_fapo.launch.preflight", f"--out={self.logs}", f"--canary-s={canary}"]
        checks = self._start(self.nodes, *module, "--", *self.argv, output="preflight-%N.log")
        deadline = max(PREFLIGHT_S, canary + 60) + (IMAGE_S if self.env.get("FAPO_CONTAINER") else 0)
        for _ in self._until(deadline, "preflight has not ended"):
            if checks.poll() is not None:
                break
        if self.stop.asked is not None:
            return False
        reports = read_reports(self.logs)
        path = self.logs / "job.json"
        self.description = json.loads(path.read_text()) if path.exists() else {}
        if not self.description:
            self.evidence.pop("overdue", None)
            what = f"told nothing of the job; srun ended with exit code {checks.poll()}"
            self.evidence["bad_nodes"] = {self.nodes[0]: what}
            return False
        if "run_dir" in self.description:
            self.run_dir = Path(self.description["run_dir"])
            self._record_start()
        bad_input: list[str] = list(self.description.get("problems", []))
        bad_nodes: dict[str, str] = {}
        for problem in () if bad_input else judge(reports, self.nodes):
            what = f"{problem.what}; {problem.remedy}"
            if not problem.stops:
                say(f"warning: {problem.node}: {what}")
            elif problem.fatal_for_all or not problem.node:
                bad_input.append(f"{problem.node or 'all nodes'}: {what}")
            else:
                bad_nodes[problem.node] = f"{bad_nodes[problem.node]}; {what}" if problem.node in bad_nodes else what
        self.evidence.update(bad_input=bad_input, bad_nodes=bad_nodes)
        if self.evidence["bad_nodes"] or self.evidence["bad_input"]:
            self.evidence.pop("overdue", None)  # nodes that did not report are named
            return False
        if self.run_dir is None or not self.run_dir.is_dir():
            what = f"{self.run_dir} is no directory on {self.nodes[0]} itself: mounts of containers keep the same path"
            self.evidence["bad_input"] = [what]
            return False
        if life.idle_attempts(self.start_steps[:-1], self.step()) > self.description["idle_restarts"]:
            self.start_steps.pop()
            self.evidence["overdue"] = "nothing was started"
            return False
        (self.run_dir / "failure.json").unlink(missing_ok=True)
        say(f"preflight: {len(self.nodes)} nodes are fit; run_dir {self.run_dir}")
        return True

    def _record_start(self) -> None:
        """Keep the step at which each attempt of the job begins: Slurm requeues after node failures without asking.

        Done at once, and again when preflight has told where the checkpoints are.
        """
        del self.start_steps[self.started :]
        self.start_steps.append(self.step())
        beside = self.history.with_suffix(".partial")
        beside.write_text(json.dumps(self.start_steps))
        beside.replace(self.history)

    def step(self) -> int:
        """Step of the newest complete checkpoint; -1 without any. What was last known, where run_dir is not."""
        if self.run_dir is None:
            return self.start_steps[-1] if self.start_steps else -1
        found = [p.parent.name for p in self.run_dir.glob("checkpoints/step_*/state.json")]
        return max((int(name[5:]) for name in found if name[5:].isdigit()), default=-1)

    def _work(self) -> None:
        """Ray on all nodes, then the driver, until one of them ends."""
        head = self._head_address()
        self.env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        # Other nodes give the head's raylet 40 s to be known, and the driver 60 s: fewer than it takes on a busy node.
        self.env = {"RAY_NUM_REDIS_GET_RETRIES": "60", "RAY_gcs_server_request_timeout_seconds": "120"} | self.env
        roles, gpus = json.dumps(self.description["roles"]), self.description["gpus"]
        store = 0 if gpus else _CPU_STORE_MB  # nodes without GPUs may share one machine, and Ray takes 30 % of it each
        module = [self.python, "-m", "megatron_fapo.launch.ray_node", f"--head={head}", f"--roles={roles}"]
        options = [f"--out={self.logs}", f"--gpus={gpus}", f"--object-store-mb={store}", f"--deadline={RAY_S}"]
        self.ray = self._start(self.nodes, *module, *options, output="ray-%N.log")
        for _ in self._until(RAY_S, f"the head of Ray does not listen on {head}"):
            if self._ray_ended():
                return
            if _listens(head):
                break
        if self.stop.asked is not None or "overdue" in self.evidence:
            return
        self.env["RAY_ADDRESS"] = head
        resume = ["--resume", "auto"] if self.verb in RESUMABLE else []
        # Its pid, because srun passes signals on to all that a step has started: reward workers, loggers, compilers.
        note_pid = ["bash", "-c", 'echo $$ > "$0.partial" && mv "$0.partial" "$0" && exec "$@"', str(self._pid_file)]
        command = [self.python, "-m", "megatron_fapo.cli", *self.argv, *resume]
        driver = self._start(self.nodes[:1], *note_pid, *command)
        self._watch(driver)

    def _watch(self, driver: subprocess.Popen[bytes]) -> None:
        """Until the driver has ended, by itself or by us."""
        passed_on = False
        give_up: float | None = None
        limit, began = slurm.end_time(self.id), time.monotonic()
        while driver.poll() is None:
            if self.stop.asked is not None and not passed_on:
                passed_on = self._stop_driver()
            if give_up is None and self._ray_ended():
                # scancel ends all steps at once, and us shortly after: nothing can be saved without Ray.
                left = 0.0 if self.stop.asked == life.CANCEL else NODE_LOST_S
                where = ", ".join(self._lost_nodes()) or "all nodes"
                say(f"Ray has ended on {where}; the driver has {left:g} s to save")
                give_up = time.monotonic() + left
            if not self._pid_file.exists() and time.monotonic() > began + RAY_S:
                self.evidence["overdue"] = f"the driver's step has not begun after {RAY_S:g} s"
                return
            out_of_time = limit is not None and time.time() > limit - REQUEUE_BEFORE_S
            if out_of_time and (moved := slurm.end_time(self.id)) != limit:  # somebody has given the job more time
                limit, out_of_time = moved, False
            if out_of_time or (give_up is not None and time.monotonic() > give_up):
                if out_of_time:
                    self.evidence["overdue"] = f"the driver did not stop until {REQUEUE_BEFORE_S:g} s before the limit"
                return
            time.sleep(_POLL_S)
        code = driver.returncode
        self.evidence["driver"] = code if code >= 0 else 128 - code  # as a shell has it, and srun for its task
        # Without its head, Ray ends the driver at once and without a word, before the node's own end is noticed.
        end = time.monotonic() + RAY_NOTICE_S
        while code and self._failure().get("what", "its node is gone") == "its node is gone" and not self._ray_ended():
            if time.monotonic() > end or code in (life.EXIT_BAD_INPUT, life.EXIT_SAVED):
                break
            time.sleep(_POLL_S)

    def _stop_driver(self) -> bool:
        """Ask the driver to save and end; False while it has not begun. It is on this node."""
        if not self._pid_file.exists():
            return False
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(int(self._pid_file.read_text()), signal.SIGUSR1)
        return True

    def _head_address(self) -> str:
        """Where the head of Ray listens: ports that follow from the job's id, so that jobs on one node differ."""
        address = address_towards(self.nodes[1] if len(self.nodes) > 1 else socket.gethostname())
        ports = [20000 + (int(self.id) * 8 + 800 * k) % 8000 for k in range(10)]
        for port in ports:
            if not _listens(f"{address}:{port}"):
                return f"{address}:{port}"
        raise slurm.SlurmError(f"all of the ports {ports} are taken on {self.nodes[0]}")

    def _lost_nodes(self) -> dict[str, str]:
        """Nodes whose Ray ended first; others end because these have."""
        ended = [json.loads(path.read_text()) for path in self.logs.glob("ray-*.json")]
        first = min((each["time"] for each in ended), default=0.0)
        return {each["node"]: each["what"] for each in ended if each["time"] <= first + TOGETHER_S}

    def _failure(self) -> dict[str, Any]:
        """What the driver has left in failure.json; empty when it left none."""
        path = None if self.run_dir is None else self.run_dir / "failure.json"
        return json.loads(path.read_text()) if path is not None and path.exists() else {}

    def _ray_ended(self) -> bool:
        assert self.ray is not None
        if self.ray.poll() is not None:
            self.evidence["overdue"] = f"the step of Ray ended with exit code {self.ray.returncode}"
        return self.ray.poll() is not None or bool(self._lost_nodes())

    def _teardown(self) -> None:
        """End every step; returns when none of them is left."""
        self.evidence["lost_nodes"] = self._lost_nodes()  # before we end the others
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGKILL):
            alive = [step for step in self.steps if step.poll() is None]
            for step in alive:
                # Only Ray's nodes know SIGUSR2; a driver that is still there at this point has had its time.
                step.send_signal(number if step is self.ray else signal.SIGKILL)
            end = time.monotonic() + TEARDOWN_S
            while any(step.poll() is None for step in alive) and time.monotonic() < end:
                time.sleep(0.1)

    def _finish(self) -> int:
        """Decide, explain, and requeue where that is the decision."""
        evidence = life.Evidence(
            asked=self.stop.asked,
            slurm_requeued=self.stop.asked == life.CANCEL and slurm.requeues(self.id) > self.attempt,
            failure=self._failure() or None,
            start_steps=tuple(self.start_steps),
            step=self.step(),
            **self.evidence,
        )
        bad = bool(evidence.bad_nodes or evidence.lost_nodes)
        spare = slurm.spare_nodes(self.id, self.nodes) if bad and evidence.driver != life.EXIT_DONE else 0
        idle_restarts = self.description.get("idle_restarts", IDLE_RESTARTS)
        decision = life.decide(evidence, idle_restarts, spare, goes_on=self.verb in GOES_ON)
        print(life.screen(f"job {self.id} attempt {self.attempt}", evidence, decision, self._tails(evidence)))
        sys.stdout.flush()
        if decision.requeue:
            slurm.requeue(self.id, decision.exclude)
            # Slurm ends us now. We wait for that, because an exit before it could be taken for the job's; but no
            # longer: a process that ignores SIGTERM holds the nodes for the whole of KillWait.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            end = time.monotonic() + 600
            while self.stop.asked != life.CANCEL and time.monotonic() < end:
                time.sleep(_POLL_S)
        return decision.exit_code

    def _tails(self, evidence: life.Evidence) -> dict[str, str]:
        """The logs that tell what happened, the first failure's first; nothing when nothing failed."""
        if evidence.driver == life.EXIT_DONE or (evidence.asked and evidence.driver == life.EXIT_SAVED):
            return {}
        paths = [] if evidence.failure is None else [Path(str(evidence.failure["log_path"]))]
        paths += [self.logs / f"ray-{node}.log" for node in evidence.lost_nodes]
        paths += [self.logs / f"preflight-{node}.log" for node in evidence.bad_nodes]
        if evidence.driver not in (None, life.EXIT_BAD_INPUT) and not paths and self.run_dir is not None:
            paths.append(self.run_dir / "logs" / "driver-0.log")
        tails = {}
        for path in paths:
            with contextlib.suppress(FileNotFoundError):  # the one that failed may not have come to write any
                tails[str(path)] = "\n".join(path.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
        return tails


def say(text: str) -> None:
    """One line of the job's own output."""
    print(f"[{time.strftime('%F %T')}] {text}", flush=True)


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        probe.settimeout(2.0)
        return probe.connect_ex((host, int(port))) == 0


def main(argv: Sequence[str] | None = None) -> int:
    """
    Raises:
        SystemExit: outside of a Slurm allocation.
    """
    stop = Stop()  # first of all: the warning may come while we still ask Slurm who we are
    words = sys.argv[1:] if argv is None else list(argv)
    absent = [name for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST") if name not in os.environ]
    if absent or not words:
        print(f"job: runs inside of a Slurm job ({', '.join(absent)} unset); submit slurm/*.sbatch or use fapo launch")
        return life.EXIT_BAD_INPUT
    return Job(words, os.environ, stop).run()


if __name__ == "__main__":
    sys.exit(main())
