"""A process of a run: where it is, where it writes, and what is said when it is gone."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path

LOG_LINES = 30
HEALTH_CHECKS_S = 30.0
"""Ray gives a node five, one every 3 s."""
_SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of an interface."""


@dataclass(frozen=True)
class Node:
    """A node that Ray knows."""

    id: str
    """Ray's."""
    address: str
    index: int
    """In the allocation."""
    gpus: float = 0.0
    roles: frozenset[str] = frozenset()
    """Of `train`, `rollout`, `genrm`; none: it takes all."""
    name: str = ""


HERE = Node("", "127.0.0.1", 0, name=socket.gethostname())
"""This machine, where no Ray node is known."""


@dataclass(frozen=True)
class Process:
    """A rank, engine or server of a run."""

    role: str
    """`policy`, `rollout` or `genrm`, as in the name of its log."""
    rank: int
    node: Node = HERE
    log_path: Path | None = None
    pid: int | None = None

    @property
    def name(self) -> str:
        return f"{self.role}-{self.rank}"

    def __str__(self) -> str:
        pid = "" if self.pid is None else f", pid {self.pid}"
        return f"{self.name} on node {self.node.name or self.node.index} ({self.node.address}{pid})"


class ProcessDiedError(RuntimeError):
    """A process of the run failed or is gone: says which, on which node, what happened, and the end of its log."""

    def __init__(self, process: Process, what: str, *, lost: bool, detail: str = "") -> None:
        """
        Args:
            what: a few words, said of the process.
            lost: the process or its node is gone, so that the run may go on elsewhere; False: its code failed.
            detail: more words, such as the traceback of its code.
        """
        self.process, self.what, self.lost = process, what, lost
        super().__init__("\n".join(part for part in (f"{process}: {what}", detail, log_end(process.log_path)) if part))


def log_end(path: Path | None) -> str:
    """The last lines of a log, with its name; nothing without one."""
    if path is None or not path.exists():
        return ""
    tail = path.read_text(errors="replace").splitlines()[-LOG_LINES:]
    return f"the end of {path}:\n" + ("\n".join(tail) or "(empty)")


def is_lost(error: BaseException) -> bool:
    """Whether what Ray raised says that a process or node is gone, not that its code failed."""
    from ray import exceptions

    if isinstance(error, exceptions.ActorDiedError) and error.actor_init_failed:
        return False  # its constructor raised, and would again elsewhere
    return isinstance(error, exceptions.RayActorError | exceptions.NodeDiedError | exceptions.ActorUnschedulableError)


async def how_lost(node: Node, error: BaseException) -> str:
    """What is gone, in words: the node, or the process alone.

    Ray calls an actor unavailable as soon as its connection breaks, and the node dead after missed health checks.
    """
    import ray
    from ray.exceptions import ActorUnavailableError

    deadline = time.monotonic() + (HEALTH_CHECKS_S if isinstance(error, ActorUnavailableError) else 0)
    while not node.id or node.id in {each["NodeID"] for each in ray.nodes() if each["Alive"]}:
        if time.monotonic() >= deadline:
            return "its process is gone"
        await asyncio.sleep(0.5)
    return "its node is gone"


def use_interface_of(address: str) -> None:
    """Make gloo and NCCL talk through the interface that has this node's Ray address, unless the user has chosen.

    Left alone, they take the first one that the host name resolves to, or that is up: on nodes with several, often one
    that the other nodes cannot reach.
    """
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            try:
                found = fcntl.ioctl(s.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no IPv4 address
                continue
        if socket.inet_ntoa(found[20:24]) == address:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
            return
    logging.getLogger(__name__).warning(
        "no interface has this node's address %s: if ranks or engines cannot connect, set GLOO_SOCKET_IFNAME and "
        "NCCL_SOCKET_IFNAME",
        address,
    )
