"""What the driver waits for, since when and for whom; said when nothing moves any more.

`Waits` and `Alarm` are bookkeeping, with a clock that is given. `StallWatch` looks at them once in a while and acts:
a warning and `stall.json` that name who is waited for, stacks of the driver, and the end of the run where one is set.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import io
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO, TypeVar

from megatron_fapo.config.observe import ObserveConfig
from megatron_fapo.observe.files import write_atomically
from megatron_fapo.observe.trace import TRACER
from megatron_fapo.processes import Process, ProcessDiedError

log = logging.getLogger(__name__)
T = TypeVar("T")

FILE = "stall.json"
STACKS = "logs/driver-stacks.log"
TICK_S = 5.0
LISTED = 20
WRITE_S = 5.0
"""For the files of a stall, when the run ends."""
CANCEL_S = 120.0
"""For work that is given up to end by itself: longer than any shutdown of processes takes."""


class StalledError(ProcessDiedError):
    """Nothing moved for `observe.stall_abort_s`. Names the process that does not answer: one that is stopped or gone if
    there is any, else the one that is waited for longest."""


@dataclass(eq=False)
class Wait:
    """One thing that the driver awaits."""

    what: str
    """Phase and work, such as `policy.train`."""
    whom: Process | str
    since: float
    detail: str = ""
    left: dict[Any, None] = field(default_factory=dict)
    """What is still to come of it, oldest first; `total` at the beginning."""
    total: int = 0


class Waits:
    """The table of what is awaited. Anything that begins or ends is progress; so is whatever says so."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._table = clock, dict[Wait, None]()
        self._moved = clock()
        self.stalls = 0
        self.processes: dict[str, Process] = {}
        """Who stands behind the names that waits are for, such as the URLs of our GenRM servers."""

    @contextlib.contextmanager
    def on(self, what: str, whom: Process | str, detail: str = "", left: Iterable[Any] = ()) -> Iterator[Wait]:
        """For the time that `whom` is awaited. The wait may be given another `whom` and `detail` on the way."""
        wait = Wait(what, whom, self._clock(), detail, dict.fromkeys(left))
        wait.total = len(wait.left)
        self._table[wait] = None
        self.progress()
        try:
            with _traced(wait):
                yield wait
        finally:
            del self._table[wait]
            self.progress()

    def came(self, wait: Wait, what: Any, tokens: int) -> None:
        """A sample, of those that are `left` of a wait on an engine."""
        assert isinstance(wait.whom, Process)
        if what in wait.left:
            del wait.left[what]
            TRACER.count(wait.whom.name, -1, tokens)
        self.progress()

    def progress(self) -> None:
        self._moved = self._clock()

    def idle_s(self) -> float:
        """Seconds since anything moved."""
        return self._clock() - self._moved

    def groups(self) -> list[list[Wait]]:
        """Waits for the same thing of the same process, oldest first within and among them; whoever has been stopped,
        or is gone, before all."""
        found: dict[tuple[str, str], list[Wait]] = {}
        for wait in list(self._table):
            found.setdefault((wait.what, str(self.whom(wait))), []).append(wait)
        groups = [sorted(waits, key=lambda wait: wait.since) for waits in found.values()]
        return sorted(groups, key=lambda waits: (not state_of(self.whom(waits[0])), waits[0].since))

    def whom(self, wait: Wait) -> Process | str:
        return self.processes.get(wait.whom, wait.whom) if isinstance(wait.whom, str) else wait.whom

    def lines(self) -> list[str]:
        """One line per group: work, process, how long, what is outstanding, the process's log."""
        now, lines = self._clock(), []
        for first, *others in self.groups():
            whom = self.whom(first)
            parts = [f"{first.what}: {whom}"]
            if isinstance(first.whom, str) and isinstance(whom, Process):
                parts[0] += f" at {first.whom}"
            parts.append(f"{1 + len(others)} waits, the oldest for" if others else "for")
            parts[-1] += f" {now - first.since:.0f} s"
            if first.total:
                oldest = f", the oldest {next(iter(first.left))}" if first.left else ""
                parts.append(f"{len(first.left)} of {first.total} outstanding{oldest}")
            parts += [part for part in (first.detail, state_of(whom)) if part]
            if isinstance(whom, Process) and whom.log_path is not None:
                parts.append(f"log {whom.log_path}")
            lines.append(", ".join(parts))
        more = [f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
        return lines[:LISTED] + more or ["nobody: the driver's own code has gone on without awaiting anything"]


WAITS = Waits()
"""The driver's. One for the process, like its log: what is awaited is nobody's parameter."""


@contextlib.contextmanager
def _traced(wait: Wait) -> Iterator[None]:
    """What a process is asked for is its work, and what is left of that is in flight there. Policy ranks tell of their
    work themselves."""
    if not isinstance(wait.whom, Process) or wait.whom.role == "policy":
        yield
    elif wait.left:
        name = wait.whom.name
        TRACER.count(name, len(wait.left))
        try:
            yield
        finally:
            TRACER.count(name, -len(wait.left))
    else:
        with TRACER.on(wait.whom.name, wait.what.partition(".")[2]):
            yield


class Alarm:
    """When to speak: at `warning_s` without progress, and whenever that has doubled."""

    def __init__(self, warning_s: float) -> None:
        self._first = self._next = warning_s

    @property
    def ringing(self) -> bool:
        return self._next > self._first

    def due(self, idle_s: float) -> bool:
        if idle_s < self._first:
            self._next = self._first
            return False
        if idle_s < self._next:
            return False
        while self._next <= idle_s:
            self._next *= 2
        return True


class StallWatch:
    """`async with`: watches the event loop's work, and writes the driver's stacks on SIGUSR2.

    A loop that does not turn at all, because the driver's own code blocks, cannot say so: then its stacks are written
    after `stall_warning_s` all the same.
    """

    def __init__(self, config: ObserveConfig, run_dir: Path, waits: Waits = WAITS) -> None:
        self._config, self._dir, self._waits = config, run_dir, waits
        self._alarm = Alarm(config.stall_warning_s)
        self._given_up: asyncio.Future[StalledError] | None = None
        self._ended = self._broken = False
        self._writing, self._pending = asyncio.Lock(), set[asyncio.Task[None]]()

    async def __aenter__(self) -> Self:
        (self._dir / FILE).unlink(missing_ok=True)
        (self._dir / STACKS).parent.mkdir(parents=True, exist_ok=True)
        self._stacks = (self._dir / STACKS).open("a", encoding="utf-8")
        self._waits.progress()
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, write_task_stacks, self._stacks)
        # In C, so that threads are written even when the event loop hangs; then the handler above has its turn.
        faulthandler.register(signal.SIGUSR2, self._stacks, all_threads=True, chain=True)
        self._task = asyncio.create_task(self._watch(), name="stall watch")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self._pending:
            await asyncio.wait(self._pending, timeout=WRITE_S)
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR2)
        asyncio.get_running_loop().remove_signal_handler(signal.SIGUSR2)
        if not self._pending:  # else a thread hangs in it
            self._stacks.close()

    async def race(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`, or cancel it when nothing has moved for `stall_abort_s`.

        Raises:
            StalledError: nothing has.
        """
        self._given_up = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait((task, self._given_up), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise self._given_up.result()
        finally:
            self._given_up = None
            task.cancel()
            await asyncio.wait((task,), timeout=CANCEL_S)

    async def _watch(self) -> None:
        cfg = self._config
        tick_s = min(TICK_S, cfg.stall_warning_s / 10, (cfg.stall_abort_s or cfg.stall_warning_s) / 10)
        while True:
            faulthandler.dump_traceback_later(cfg.stall_warning_s, file=self._stacks)
            await asyncio.sleep(tick_s)
            idle_s, rang = self._waits.idle_s(), self._alarm.ringing
            due = self._alarm.due(idle_s)
            if cfg.stall_abort_s is not None and idle_s >= cfg.stall_abort_s and self._given_up is not None:
                # Before anything is written: a filesystem that hangs may be what everybody waits for.
                if not self._given_up.done():
                    self._given_up.set_result(self._error(idle_s))
                self._ended = True
                self._waits.progress()  # what is done about it has time of its own
            if due:
                self._say(idle_s)
            elif rang and not self._alarm.ringing and not self._ended:
                log.warning("the run goes on")
                self._later(lambda: (self._dir / FILE).unlink(missing_ok=True))

    def _say(self, idle_s: float) -> None:
        self._waits.stalls += 1
        lines = self._waits.lines()
        log.warning("nothing has moved for %.0f s; the driver waits for\n- %s", idle_s, "\n- ".join(lines))
        now = time.time()
        facts = {"time": now, "since": now - idle_s, "idle_s": idle_s, "waits": lines, "pid": os.getpid()}
        stacks = io.StringIO()
        write_task_stacks(stacks)

        def write() -> None:
            write_atomically(self._dir / FILE, json.dumps(facts, indent=2) + "\n")
            faulthandler.dump_traceback(self._stacks, all_threads=True)
            self._stacks.write(stacks.getvalue())
            self._stacks.flush()

        self._later(write)

    def _later(self, work: Callable[[], None]) -> None:
        """Touch files in a thread, one after another: the watch goes on where the filesystem hangs or is full."""

        async def attempt() -> None:
            async with self._writing:
                try:
                    await asyncio.to_thread(work)
                except OSError as error:
                    if not self._broken:
                        log.error("a stall cannot be written to %s: %s", self._dir, error)
                    self._broken = True

        task = asyncio.create_task(attempt(), name="stall file")
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    def _error(self, idle_s: float) -> StalledError:
        groups = self._waits.groups()
        whom = self._waits.whom(groups[0][0]) if groups else "nobody"
        what = f"has not answered, and nothing else has moved for {idle_s:.0f} s ({state_of(whom) or 'it seems alive'})"
        if not isinstance(whom, Process):
            what, log_path = f"waits for {whom}, and nothing has moved for {idle_s:.0f} s", self._dir / STACKS
            whom = Process("driver", 0, log_path=log_path, pid=os.getpid())
        detail = "the driver waits for\n- " + "\n- ".join(self._waits.lines())
        return StalledError(whom, what, lost=True, detail=detail)


def state_of(whom: Process | str) -> str:
    """What the system says against a process of this machine: that it is stopped or gone; else nothing."""
    if isinstance(whom, str) or whom.pid is None or whom.node.name != socket.gethostname():
        return ""
    try:
        # The name, in brackets, may hold anything.
        state = Path(f"/proc/{whom.pid}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return "its process is gone"
    return {"T": "its process is stopped", "t": "its process is stopped", "Z": "its process has ended"}.get(state, "")


def write_task_stacks(file: TextIO) -> None:
    """Where every asyncio task stands, down to what it awaits; Task.print_stack shows the outermost frame only."""
    file.write(f"tasks at {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    for task in asyncio.all_tasks():
        file.write(f"{task.get_name()}:\n")
        at: Any = task.get_coro()
        while at is not None:
            frame = getattr(at, "cr_frame", None) or getattr(at, "ag_frame", None) or getattr(at, "gi_frame", None)
            where = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_qualname}" if frame else repr(at)
            file.write(f"  {where}\n")
            waits_on = (getattr(at, name, None) for name in ("cr_await", "ag_await", "gi_yieldfrom"))
            at = next((each for each in waits_on if each is not None), None)
    file.flush()
