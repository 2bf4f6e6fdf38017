"""No process outlives its owner: a small watcher that kills what a vLLM process tree leaves behind.

vLLM's engine core is a grandchild that notices a polite shutdown only; when its parent is killed, it stays and keeps
its memory (on a GPU: all of it). So each owner of a vLLM tree has a `Guard`: the tree carries a tag in its
environment, the watcher holds a pipe to the owner, and when the pipe closes (the owner released it, exited or was
killed) it kills every process with the tag.

Run as a script by path, so that the watcher imports only the standard library and starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid

TAG = "FAPO_PROCESS_TREE"
_DONE = b"done"


def tagged_pids(tag: str) -> list[int]:
    """Processes whose environment at start carries the tag, this one excepted."""
    marker = f"{TAG}={tag}".encode()
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            with open(f"/proc/{entry}/environ", "rb") as file:
                environment = file.read()
        except OSError:  # it ended while we looked, or belongs to another user
            continue
        if marker in environment.split(b"\0"):
            found.append(int(entry))
    return found


def kill_tagged(tag: str, deadline_s: float = 20.0) -> None:
    """Kill every tagged process, those that appear meanwhile included.

    Raises:
        TimeoutError: some are still there after the deadline.
    """
    end = time.monotonic() + deadline_s
    while pids := [pid for pid in tagged_pids(tag) if not _is_zombie(pid)]:
        if time.monotonic() > end:
            raise TimeoutError(f"processes {pids} survived SIGKILL for {deadline_s} s")
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def _is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


class Guard:
    """Owner side. Start the tree with `environment` in its environment; call `release` when it should be gone."""

    def __init__(self) -> None:
        self.tag = uuid.uuid4().hex
        # A session of its own: a Ctrl-C in the terminal must not kill the watcher before it has done its work.
        self._watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", os.path.abspath(__file__), self.tag],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={},  # not the owner's: the owner may itself be in a tagged tree, and the watcher must outlive it
            start_new_session=True,
        )
        self._watcher.wait(30)  # it has gone on as nobody's child

    @property
    def environment(self) -> dict[str, str]:
        """What the tree must be started with. Ray's agents and vLLM's processes write titles over the memory in which
        /proc shows their environment, the tag in it; SPT_NOENV makes setproctitle keep to the arguments."""
        return {TAG: self.tag, "SPT_NOENV": "1"}

    def release(self, timeout_s: float = 30.0) -> None:
        """Kill what is left of the tree; returns when nothing is."""
        said, _ = self._watcher.communicate(timeout=timeout_s)
        if said != _DONE:
            raise RuntimeError(f"the process guard failed: look for processes with {TAG}={self.tag}")


def _watch(tag: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # only the pipe ends the watch
    while os.read(0, 1):
        pass
    kill_tagged(tag)
    with contextlib.suppress(BrokenPipeError):  # the owner was killed: nobody is left to be told
        os.write(1, _DONE)


if __name__ == "__main__":
    # As nobody's child: a Ray worker that loses its cluster kills its own children before it exits, the watcher among
    # them, and leaves its grandchildren (the engine core of a server) running.
    if os.fork():
        os._exit(0)
    _watch(sys.argv[1])
