"""A real Slurm cluster of several nodes on this one machine: Debian's packages, no systemd, everything under one
directory, and nothing left after `stop`.

Every node is a slurmd in network, host name and mount namespaces of its own, so that it has its own address, ports and
directory of Ray, as machines have. GPUs are pretended (device files that are /dev/null): Slurm counts and hands them
out. Accounting (slurmdbd on MariaDB) runs too: NeMo-Run learns a job's state from sacct.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

PACKAGES = "slurm-wlm munge slurmdbd mariadb-server-core iproute2"
_DAEMONS = ("munged", "slurmctld", "slurmd", "slurmdbd", "mariadbd", "ip")


def missing() -> str | None:
    """Why no cluster can be made here; None when it can."""
    if os.geteuid():
        return "daemons that start jobs must be root"
    absent = [name for name in _DAEMONS if not shutil.which(name)]
    return f"{', '.join(absent)} not found: tools/slurm_packages installs {PACKAGES}" if absent else None


class SlurmCluster:
    """Nodes node1 to nodeN in partition `batch`; `env` is what Slurm's commands need to find it."""

    def __init__(self, root: Path, nodes: int = 4, cpus: int = 8, gpus: int = 8, memory_mb: int = 24000) -> None:
        """`root` must be short: munge's socket is in it, and socket paths end at 107 characters."""
        self.root, self.nodes, self.cpus, self.gpus, self.memory_mb = root, nodes, cpus, gpus, memory_mb
        self.names = [f"node{i}" for i in range(1, nodes + 1)]
        self.env = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}
        # Not to be inherited by jobs: this very test may run inside a job or a run of ours.
        for name in [n for n in self.env if n.startswith(("SLURM_JOB", "RAY_", "FAPO_", "PYTEST_"))]:
            del self.env[name]
        self._tag = f"f{os.getpid() % 100000}"
        self._net = _free_subnet()
        self._database: subprocess.Popen[bytes] | None = None

    def run(self, *command: str, check: bool = True, **more: str) -> str:
        """A command's output."""
        done = subprocess.run(
            command, env={**self.env, **more}, text=True, check=False, timeout=120,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}")
        return done.stdout.strip()

    def start(self) -> None:
        """Returns when every node is idle."""
        self.root.chmod(0o755)  # munge wants everybody to reach its socket
        for name in ("state", "run", "log", "dev", "db"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self._configure()
        self._bridge()
        (self.root / "munge").mkdir(mode=0o755)
        self.run("dd", "if=/dev/urandom", f"of={self.root}/munge/key", "bs=1", "count=1024", "status=none")
        os.chmod(self.root / "munge/key", 0o400)
        munge = {
            "key-file": "key",
            "socket": "socket",
            "pid-file": "munged.pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        self.run("munged", *(f"--{option}={self.root}/munge/{name}" for option, name in munge.items()))
        self._start_accounting()
        self.run("slurmctld", "-c")
        for i, name in enumerate(self.names, start=1):
            self._start_node(i, name)
        self.wait(lambda: self.states() == dict.fromkeys(self.names, "idle"), 30, "nodes are not idle")

    def states(self) -> dict[str, str]:
        """Node -> state, as sinfo has it."""
        lines = self.run("sinfo", "-h", "-N", "-o", "%N %T", check=False).splitlines()
        return {words[0]: words[1] for line in lines if len(words := line.split()) == 2}

    def wait_settled(self) -> None:
        """Until every node is idle or at work: one that was down, or still ends a job, is passed over by the next."""
        for name in self.names:
            self.run("scontrol", "update", f"nodename={name}", "state=resume", check=False)
        busy = {"idle", "allocated", "mixed"}
        self.wait(lambda: set(self.states()) == {*self.names} and set(self.states().values()) <= busy, 90, "nodes")

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", job_id, check=False)))

    def wait(self, condition: object, seconds: float, what: str) -> None:
        """Until `condition()` is true.

        Raises:
            TimeoutError: with `what`.
        """
        end = time.monotonic() + seconds
        while not condition():  # type: ignore[operator]
            if time.monotonic() > end:
                raise TimeoutError(f"{what} after {seconds:g} s")
            time.sleep(0.4)  # a look at all processes takes 15 ms, one through scontrol as much

    def stop(self) -> None:
        """Cancel all jobs, end all daemons, remove namespaces and the directory."""
        self.run("scancel", "--full", "-u", "root", check=False)
        with contextlib.suppress(TimeoutError):
            self.wait(lambda: not self.run("squeue", "-h", check=False), 20, "jobs")
        pids = [int(path.read_text()) for path in self._pid_files() if path.exists() and path.read_text().strip()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 15)
        with contextlib.suppress(TimeoutError):
            # The database is our child: unless asked, it stays as a zombie.
            self.wait(lambda: not self._database_runs() and not any(map(_alive, pids)), 15, "daemons")
        for pid in filter(_alive, pids):
            os.kill(pid, 9)
        for name in self.names:
            self.run("ip", "netns", "del", f"{self._tag}{name}", check=False)
        self.run("ip", "link", "del", f"{self._tag}br", check=False)
        shutil.rmtree(self.root, ignore_errors=True)

    def _database_runs(self) -> bool:
        return self._database is not None and self._database.poll() is None

    def _pid_files(self) -> Iterable[Path]:
        run = self.root / "run"
        yield from (run / f"slurmd.{name}.pid" for name in self.names)
        yield from (run / f"{name}.pid" for name in ("slurmctld", "slurmdbd", "mariadbd"))
        yield self.root / "munge/munged.pid"

    def _configure(self) -> None:
        root, host = self.root, socket.gethostname().split(".")[0]
        ports = _free_ports(3)
        self._sql_port, self._dbd_port = ports[1:]
        for i in range(self.gpus):
            os.mknod(root / f"dev/nvidia{i}", 0o20666, os.makedev(1, 3))  # Slurm refuses GPUs that have no device file
        gres = "".join(f"NodeName={n} Name=gpu File={root}/dev/nvidia[0-{self.gpus - 1}]\n" for n in self.names)
        (root / "gres.conf").write_text(gres if self.gpus else "")
        (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        (root / "hosts").write_text(
            f"127.0.0.1 localhost\n{self._net}.254 {host}\n"
            + "".join(f"{self._net}.{i} {name}\n" for i, name in enumerate(self.names, start=1))
        )
        # Without DNS inside the namespaces, each look-up would wait ten seconds for a resolver.
        switch = Path("/etc/nsswitch.conf")
        text = switch.read_text() if switch.exists() else "hosts: files\n"
        (root / "nsswitch.conf").write_text(re.sub(r"(?m)^hosts:.*$", "hosts: files", text))
        common = f"AuthType=auth/munge\nAuthInfo=socket={root}/munge/socket"
        nodes = "".join(
            f"NodeName={name} NodeHostname={name} NodeAddr={self._net}.{i} Port=6818 CPUs={self.cpus} Sockets=1 "
            f"CoresPerSocket={self.cpus} ThreadsPerCore=1 RealMemory={self.memory_mb}"
            + (f" Gres=gpu:{self.gpus}" if self.gpus else "")
            + "\n"
            for i, name in enumerate(self.names, start=1)
        )
        # cred_expire is also how long a requeued job waits before it may start again (5 is the least it takes).
        (root / "slurm.conf").write_text(
            f"""ClusterName=test
SlurmctldHost={host}({self._net}.254)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
{common},cred_expire=5
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=1
JobRequeue=1
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
TmpFS=/tmp
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={self._dbd_port}
AccountingStoragePass={root}/munge/socket
JobAcctGatherType=jobacct_gather/none
KillWait=20
MinJobAge=3600
SlurmdTimeout=30
InactiveLimit=0
{nodes}PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""
        )
        (root / "slurmdbd.conf").write_text(
            f"""{common}
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={self._dbd_port}
SlurmUser=root
LogFile={root}/log/slurmdbd.log
PidFile={root}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={self._sql_port}
StorageUser=root
StoragePass=x
StorageLoc=slurm_acct
"""
        )
        os.chmod(root / "slurmdbd.conf", 0o600)

    def _start_accounting(self) -> None:
        data, log = self.root / "db/data", self.root / "log/mariadb.log"
        data.mkdir()
        options = ["--no-defaults", "--user=root", f"--datadir={data}", "--innodb-log-file-size=8M"]
        # mariadb-install-db is in a package of its own that wants a service manager: this is what it does.
        tables = "create database mysql;\nuse mysql;\n" + Path("/usr/share/mysql/mysql_system_tables.sql").read_text()
        with log.open("ab") as out:
            subprocess.run(
                ["mariadbd", *options, "--bootstrap"], input=tables.encode(), stdout=out, stderr=out, check=True
            )
            listen = [f"--socket={self.root}/db/sock", f"--port={self._sql_port}", "--bind-address=127.0.0.1"]
            more = ["--skip-grant-tables", "--skip-name-resolve", "--innodb-buffer-pool-size=32M"]
            pid_file = f"--pid-file={self.root}/run/mariadbd.pid"
            self._database = subprocess.Popen(
                ["mariadbd", *options, *listen, *more, pid_file, "--innodb-flush-log-at-trx-commit=0"],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        self.wait(lambda: _listens(self._sql_port), 30, "MariaDB does not listen")
        self.run("slurmdbd")
        self.wait(lambda: _listens(self._dbd_port), 30, "slurmdbd does not listen")
        self.run("sacctmgr", "-i", "add", "cluster", "test")

    def _bridge(self) -> None:
        self.run("ip", "link", "add", f"{self._tag}br", "type", "bridge")
        self.run("ip", "addr", "add", f"{self._net}.254/24", "dev", f"{self._tag}br")
        self.run("ip", "link", "set", f"{self._tag}br", "up")

    def _start_node(self, index: int, name: str) -> None:
        space, link = f"{self._tag}{name}", f"{self._tag}v{index}"
        for command in (
            f"ip netns add {space}",
            f"ip link add {link} type veth peer name eth0 netns {space}",
            f"ip link set {link} master {self._tag}br up",
            f"ip -n {space} addr add {self._net}.{index}/24 dev eth0",
            f"ip -n {space} link set eth0 up",
            f"ip -n {space} link set lo up",
            f"ip -n {space} route add default via {self._net}.254",
        ):
            self.run(*command.split())
        Path("/tmp/fapo-0").mkdir(exist_ok=True)
        own = f"""
            hostname {name}
            mount --bind {self.root}/hosts /etc/hosts
            mount --bind {self.root}/nsswitch.conf /etc/nsswitch.conf
            mount -t tmpfs tmpfs /tmp/fapo-0
            exec slurmd -N {name}"""
        self.run("ip", "netns", "exec", space, "unshare", "-u", "-m", "bash", "-ec", own)


def _free_subnet() -> str:
    used = subprocess.run(["ip", "-4", "addr"], stdout=subprocess.PIPE, text=True, check=True).stdout
    return next(net for net in (f"10.77.{i}" for i in range(1, 255)) if f" {net}." not in used)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
