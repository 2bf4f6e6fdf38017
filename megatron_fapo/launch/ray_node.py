"""Ray on one node of an allocation: started, watched, and ended with everything that it started.

    python -m megatron_fapo.launch.ray_node --head IP:PORT --roles '[["train"], ["rollout"], ["genrm"]]' --out DIR ...

One task per node of one Slurm step. The first node (SLURM_NODEID 0) runs the head; the others wait for its port. Each
node has one Ray resource per role, `train`, `rollout` or `genrm`, and `fapo_node_I`, its place in the allocation.
SIGUSR2 and SIGTERM end it. When Ray ends by itself, `ray-NODE.json` in DIR says so and `ray-NODE.log` why.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_fapo.rollout.guard import Guard

MEMBER = 1000
"""Of a role's resource: a mark of membership, never used up."""
_POLL_S = 0.2
_LOG_LINES = 10
_GRAVE = re.compile(r"\[[^]]* [EFC] \d+ \d+\]")
"""A line of Ray's that is neither information, nor a warning, nor a part of a dump."""


def address_towards(host: str) -> str:
    """This node's address on the network that leads to `host`.

    Raises:
        OSError: no such host, or no way to it.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing: it only chooses the interface
        return str(probe.getsockname()[0])


def wait_for_port(address: str, deadline_s: float, asked: Callable[[], bool] = lambda: False) -> None:
    """Until somebody listens there, or `asked` to stop.

    Raises:
        TimeoutError: nobody listens there.
    """
    host, _, port = address.rpartition(":")
    end = time.monotonic() + deadline_s
    while not asked():
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise TimeoutError(f"nothing listens on {address} after {deadline_s:g} s: {error}") from error
            time.sleep(_POLL_S)


def temporary_directory() -> Path:
    """Where this attempt's Ray keeps sockets, logs and spilled objects of the node: nobody else's, and short, because
    socket paths end at 107 characters."""
    job, attempt = os.environ.get("SLURM_JOB_ID", "0"), os.environ.get("SLURM_RESTART_COUNT", "0")
    return Path(f"/tmp/fapo-{os.getuid()}") / f"{job}.{attempt}"


def ray_command(index: int, head: str, address: str, roles: Sequence[str], args: argparse.Namespace) -> list[str]:
    """`ray start` for a node: ports that other jobs on the node do not use, roles as resources."""
    resources = dict.fromkeys(roles, MEMBER) | {f"fapo_node_{index}": 1}
    port = int(head.rpartition(":")[2])
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={address}"]
    words += [f"--temp-dir={temporary_directory()}", "--disable-usage-stats"]
    words += [f"--resources={json.dumps(resources)}", f"--num-gpus={args.gpus}"]
    words += [f"--dashboard-agent-listen-port={port + 1}", f"--metrics-export-port={port + 2}"]
    words += ["--include-log-monitor=false"]  # it reads what workers print, and ours write files of their own
    if args.object_store_mb:
        words.append(f"--object-store-memory={args.object_store_mb * 2**20}")
    if index:
        return [*words, f"--address={head}"]
    return [*words, "--head", f"--port={port}", f"--ray-client-server-port={port + 3}", "--include-dashboard=false"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run Ray until asked to end; 0 then, 1 when it ended by itself or never came up."""
    parser = argparse.ArgumentParser(prog="ray_node")
    parser.add_argument("--head", required=True, help="address:port")
    parser.add_argument("--roles", type=json.loads, required=True, help="for each node, its roles")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--object-store-mb", type=int, default=0, help="0: Ray's own choice")
    parser.add_argument("--deadline", type=float, default=300.0, help="for the head to listen, seconds")
    args = parser.parse_args(argv)
    index = int(os.environ["SLURM_NODEID"])
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    asked = False

    def end(*_: object) -> None:
        nonlocal asked
        asked = True

    signal.signal(signal.SIGUSR2, end)
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    temporary_directory().mkdir(parents=True, exist_ok=True)
    guard = Guard()
    log = args.out / f"ray-{node}.log"
    try:
        with log.open("ab") as output:
            if index:
                wait_for_port(args.head, args.deadline, lambda: asked)
            host = args.head.rpartition(":")[0]
            address = host if index == 0 else address_towards(host)
            process = subprocess.Popen(
                ray_command(index, args.head, address, args.roles[index], args),
                # Ray gives a raylet 30 s by itself, which a busy node exceeds. Workers that it starts beforehand, one
                # per core, have not the environment of our actors and are never used. Engines and ranks are what the
                # node is for: at Ray's niceness of 15 any process beside them, as verifiers or checks, goes first.
                env={
                    "RAY_worker_niceness": "0",
                    "RAY_raylet_start_wait_time_s": "120",
                    "RAY_prestart_worker_first_driver": "0",
                    **os.environ,
                    **guard.environment,
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        while not asked and process.poll() is None:
            time.sleep(_POLL_S)
        ended = None if asked else f"Ray ended with exit code {process.returncode}"
    except (TimeoutError, OSError) as error:
        ended = None if asked else f"Ray did not start: {error}"
    if ended is not None:
        _append_ray_logs(log)
        beside = args.out / f"ray-{node}.partial"
        beside.write_text(json.dumps({"node": node, "what": ended, "time": time.time()}))
        beside.rename(args.out / f"ray-{node}.json")
    guard.release()
    shutil.rmtree(temporary_directory(), ignore_errors=True)  # what a dying process still writes goes with the next
    return 0 if asked else 1


def _append_ray_logs(log: Path) -> None:
    """What Ray's own processes said last: their logs vanish with the node."""
    with log.open("a") as output:
        for path in sorted(temporary_directory().glob("session_latest/logs/*")):
            if path.name.startswith(("raylet", "gcs_server")) and path.stat().st_size:
                with path.open(errors="replace") as file:
                    grave = [line for line in file if _GRAVE.match(line)]
                output.write(f"--- {path}\n" + "".join(grave[-_LOG_LINES:]))


if __name__ == "__main__":
    sys.exit(main())
