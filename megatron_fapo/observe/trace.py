"""What every process of a run did in each step: recorded in the driver, written as Chrome traces.

The driver times what it asks of engines and counts what is in flight at engines and servers; policy ranks time
themselves, and their spans come along with their answers (`Told`). At the end of a step `take` hands out what ran in
its time, `summary` says where the time went, and `write_step` writes both: RUN_DIR/trace/step-000012.json.gz.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from megatron_fapo.observe.spans import IDLE, Change, Span, busiest, by_phase, in_flight, lanes, segments, within
from megatron_fapo.processes import Process

log = logging.getLogger(__name__)

DIRECTORY = "trace"
DRIVER = "driver"
OWN = "own"
"""The track of a process that tells the driver."""
LIMIT = 200_000
"""Spans and changes that are kept of one step, about 35 MB; later ones are dropped, and their number is told."""
GAPS = 10
"""Idle gaps of a step that its summary lists, the longest ones."""
BETWEEN = "between phases"
KINDS = {
    **dict.fromkeys(("enter", "sleep", "wake"), "switch"),
    **dict.fromkeys(("begin_refit", "pull", "finish_refit", "reset_refit", "commit_refit", "abort_refit"), "refit"),
    **dict.fromkeys(("weights", "source_index", "take_share", "target_indexes", "take_shares", "join"), "refit"),
    **dict.fromkeys(("expose", "exchange", "sums", "conceal", "open"), "refit"),
    **dict.fromkeys(("save", "load", "verify"), "checkpoint"),
}
"""Names of spans -> the work that they are part of; others are works of their own."""
_EPOCH = time.time() - time.monotonic()


def wall(monotonic_s: float) -> float:
    """Wall-clock time of a monotonic one: spans of a process keep their lengths when its clock is set anew."""
    return _EPOCH + monotonic_s


@dataclass(frozen=True)
class Track:
    """A process whose work is traced."""

    role: str
    node: str
    cards: tuple[str, ...] = ()
    """Ray's ids of the GPUs that it holds; others may hold them too."""


@dataclass(frozen=True)
class Taken:
    """What ran between two moments, by track; spans are cut at both."""

    begin: float
    end: float
    spans: Mapping[str, list[Span]]
    changes: Mapping[str, list[Change]]
    before: Mapping[str, int]
    """In flight at the beginning."""
    dropped: int

    def worked(self, tracks: Mapping[str, Track]) -> dict[str, list[Span]]:
        """All spans of each track, those while anything was in flight among them."""
        return {
            name: in_flight(self.changes.get(name, ()), self.before.get(name, 0), work, self.begin, self.end)
            + self.spans.get(name, [])
            for name, track in tracks.items()
            for work in ["generate" if track.role == "rollout" else "judge"]
        }


class Told(NamedTuple):
    """What a process answers, and what it did for it."""

    answer: Any
    spans: list[Span]


class Tracer:
    """Records once it has begun. Belongs to one thread."""

    def __init__(self) -> None:
        self.recording = False
        self.tracks: dict[str, Track] = {}
        self._names: dict[str, str] = {}
        self._spans: list[tuple[str, Span]] = []
        self._open: dict[object, tuple[str, str, float]] = {}
        self._changes: list[tuple[str, Change]] = []
        self._in_flight: Counter[str] = Counter()
        self._before: Counter[str] = Counter()
        self._began, self._dropped = 0.0, 0

    def register(self, process: Process, cards: Sequence[str], url: str = "") -> None:
        """A process, with Ray's ids of its GPUs, and the URL that changes at it are counted by."""
        node = process.node.name or f"{process.node.index}"
        self.tracks[process.name] = Track(process.role, node, tuple(cards))
        self._names[url] = process.name

    @contextlib.contextmanager
    def on(self, track: str, name: str) -> Iterator[None]:
        """A span for the time that this takes."""
        key, began = object(), wall(time.monotonic())
        self._open[key] = track, name, began
        try:
            yield
        finally:
            del self._open[key]
            self.add(track, [Span(name, began, wall(time.monotonic()))])

    def add(self, track: str, spans: Iterable[Span]) -> None:
        """Spans that have ended."""
        for span in spans if self.recording else ():
            if self._has_room():
                self._spans.append((track, span))

    def count(self, whom: str, change: int, tokens: int = 0) -> None:
        """More or fewer are in flight at a process, given by its name or URL."""
        name = self._names.get(whom, whom)
        self._in_flight[name] += change
        if self.recording and self._has_room():
            self._changes.append((name, Change(wall(time.monotonic()), change, tokens)))

    def _has_room(self) -> bool:
        room = len(self._spans) + len(self._changes) < LIMIT
        self._dropped += not room
        return room

    def begin(self) -> None:
        """Record from now on; what was recorded is forgotten."""
        self.recording = True
        self.take()

    def end(self) -> None:
        """Record nothing from now on: nobody takes it."""
        self.take()
        self.recording = False

    def take_spans(self) -> list[Span]:
        """The spans that have ended, of all tracks; they are forgotten."""
        spans, self._spans = [span for _, span in self._spans], []
        return spans

    def take(self) -> Taken:
        """What has run since the last time; what still runs is cut here, and goes on in the next."""
        begin, end = self._began, wall(time.monotonic())
        for name in self._in_flight.keys() - self.tracks.keys():
            self.tracks[name] = Track("genrm", "elsewhere")  # a server that others have started
        spans, changes = defaultdict[str, list[Span]](list), defaultdict[str, list[Change]](list)
        for track, span in [*self._spans, *((t, Span(n, began, end)) for t, n, began in self._open.values())]:
            # One that ended before is of a step that has been written.
            if (cut := span._replace(begin=max(span.begin, begin), end=min(span.end, end))).end > cut.begin:
                spans[track].append(cut)
        for track, change in self._changes:
            changes[track].append(change)
        taken = Taken(begin, end, spans, changes, self._before, self._dropped)
        self._began, self._dropped, self._spans, self._changes = end, 0, [], []
        self._before = self._in_flight.copy()
        return taken


TRACER = Tracer()
"""This process's: one, like its log."""


@dataclass(frozen=True)
class Summary:
    """Where the time of a step went. Units are GPUs, and processes that hold none."""

    step: int
    began: float
    seconds: float
    phases: dict[str, float]
    work: dict[str, dict[str, dict[str, float]]]
    """Phase -> unit -> work, or IDLE -> seconds."""
    processes: dict[str, list[str]]
    """Of each unit."""
    idle_share: dict[str, float]
    """Role -> mean over its processes; `gpu` -> mean over all GPUs."""
    tokens: dict[str, int]
    """Of the samples that came from each engine."""
    gaps: list[dict[str, Any]] = field(default_factory=list)
    """The longest: unit, at (seconds into the step), seconds, phase, busiest (unit), does, share."""
    dropped: int = 0


def units_of(taken: Taken, tracks: Mapping[str, Track]) -> tuple[dict[str, list[Span]], dict[str, list[str]]]:
    """Segments of the step and processes, of every GPU and of every process that holds none."""
    spans: dict[str, list[Span]] = {}
    processes: dict[str, list[str]] = {}
    for name, worked in taken.worked(tracks).items():
        track = tracks[name]
        kinds = [span._replace(name=KINDS.get(span.name, span.name)) for span in worked]
        for unit in [f"GPU {card} of {track.node}" for card in track.cards] or [name]:
            spans.setdefault(unit, []).extend(kinds)
            processes.setdefault(unit, []).append(name)
    return {unit: segments(spans[unit], taken.begin, taken.end) for unit in spans}, processes


def summarize(step: int, taken: Taken, tracks: Mapping[str, Track]) -> Summary:
    """Pure."""
    begin, end = taken.begin, taken.end
    phases = [
        span._replace(name=BETWEEN if span.name == IDLE else span.name)
        for span in segments(taken.spans.get(DRIVER, ()), begin, end)
    ]
    units, processes = units_of(taken, tracks)
    shares: dict[str, list[float]] = {}
    for name, worked in taken.worked(tracks).items():
        shares.setdefault(tracks[name].role, []).append(_idle_share(segments(worked, begin, end)))
    if cards := [_idle_share(parts) for unit, parts in units.items() if unit not in tracks]:
        shares["gpu"] = cards
    idle = sorted(
        ((part, unit) for unit, parts in units.items() for part in parts if part.name == IDLE),
        key=lambda gap: gap[0].begin - gap[0].end,
    )
    gaps = []
    for (_, since, until), unit in idle[:GAPS]:
        during = within(phases, since, until)
        other, does, share = busiest(units, since, until, but=unit)
        waits = {"phase": max(during, key=lambda phase: during[phase]), "busiest": other, "does": does, "share": share}
        gaps.append({"unit": unit, "at": since - begin, "seconds": until - since} | waits)
    return Summary(
        step,
        begin,
        end - begin,
        within(phases, begin, end),
        by_phase(phases, units),
        processes,
        {role: fmean(each) for role, each in shares.items()},
        {name: sum(change.tokens for change in changes) for name, changes in taken.changes.items()},
        gaps,
        taken.dropped,
    )


def _idle_share(parts: Sequence[Span]) -> float:
    begin, end = parts[0].begin, parts[-1].end
    return within(parts, begin, end).get(IDLE, 0.0) / (end - begin)


def chrome_trace(taken: Taken, tracks: Mapping[str, Track]) -> list[dict[str, Any]]:
    """Events of the Chrome trace format: a process per node, a thread per process and GPU, times in microseconds."""
    nodes = {node: pid for pid, node in enumerate(dict.fromkeys(track.node for track in tracks.values()), 1)}
    units, _ = units_of(taken, tracks)
    threads = [(0, "phases", taken.spans.get(DRIVER, []))]
    for name, worked in taken.worked(tracks).items():
        track = tracks[name]
        gaps = [] if track.cards else [part for part in units[name] if part.name == IDLE]
        cards = f" (GPU {', '.join(track.cards)})" if track.cards else ""
        threads.append((nodes[track.node], name + cards, worked + gaps))
    for unit in units.keys() - tracks.keys():
        threads.append((nodes[unit.partition(" of ")[2]], unit.partition(" of ")[0], units[unit]))
    events = [_named("process", pid, 0, f"node {node}") for node, pid in nodes.items()]
    events.append(_named("process", 0, 0, DRIVER))
    tid = 0
    for pid, name, spans in threads:
        placed = lanes(spans)
        for lane in range(max(placed, default=0) + 1):
            events.append(_named("thread", pid, tid + lane, name if lane == 0 else f"{name}, also"))
        for (what, begin, end), lane in zip(spans, placed, strict=True):
            times = {"ts": round(begin * 1e6), "dur": round(end * 1e6) - round(begin * 1e6)}
            kind = KINDS.get(what, what)
            events.append({"name": what, "cat": kind, "ph": "X", "pid": pid, "tid": tid + lane} | times)
        tid += max(placed, default=0) + 1
    for name, changes in taken.changes.items():
        count = taken.before.get(name, 0)
        for at, change, _ in [Change(taken.begin, 0, 0), *changes]:
            count += change
            where = {"name": f"in flight at {name}", "pid": nodes[tracks[name].node], "ts": round(at * 1e6)}
            events.append({"ph": "C", "args": {"": count}} | where)
    return events


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": f"{what}_name", "pid": pid, "tid": tid, "args": {"name": name}}


def step_file(run_dir: Path, step: int) -> Path:
    return run_dir / DIRECTORY / f"step-{step:06d}.json.gz"


def read_summary(path: Path) -> Summary:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return Summary(**json.load(file)["otherData"])


def write_step(run_dir: Path, taken: Taken, tracks: Mapping[str, Track], summary: Summary) -> None:
    """Write the step's trace. One that cannot be written is told of and missing: the step is worth more."""
    path = step_file(run_dir, summary.step)
    text = json.dumps({"traceEvents": chrome_trace(taken, tracks), "otherData": vars(summary)}, separators=(",", ":"))
    try:
        path.parent.mkdir(exist_ok=True)
        beside = path.with_name(path.name + ".partial")
        beside.write_bytes(gzip.compress(text.encode(), compresslevel=5))
        beside.replace(path)
    except OSError as error:
        log.warning("the trace of step %d could not be written: %s", summary.step, error)
    if summary.dropped:
        log.warning("step %d did more than a trace holds: %d of its events are left out", summary.step, summary.dropped)
