"""Spans of a step's time: who did what when, and the gaps. Pure.

Invariants, asserted by the tests: segments fill their window without overlap; of `by_phase`, the seconds of a phase add
up to the phase for every unit, and the phases to the window.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

IDLE = "idle"


class Span(NamedTuple):
    """Something that was done. Times are wall-clock seconds."""

    name: str
    begin: float
    end: float


class Change(NamedTuple):
    """Of what is in flight at an engine or server: samples or requests that came, or are done."""

    at: float
    by: int
    tokens: int
    """Of responses, that are done with it."""


def segments(spans: Iterable[Span], begin: float, end: float) -> list[Span]:
    """The window cut where anything begins or ends: each moment belongs to the span that began last of those that
    cover it, the inner one of nested spans, or is IDLE."""
    kept = [Span(name, max(a, begin), min(b, end)) for name, a, b in spans if min(b, end) > max(a, begin)]
    # At one moment ends come before begins; of spans that begin together the longest is the outer one.
    edges = sorted((at, starts, -(span.end - at) * starts, i) for i, span in enumerate(kept) for starts, at in
                   ((1, span.begin), (0, span.end)))  # fmt: skip
    found: list[Span] = []
    active: list[int] = []
    last = begin
    for at, starts, _, i in [*edges, (end, 1, 0.0, -1)]:
        if at > last:
            name = kept[active[-1]].name if active else IDLE
            if found and found[-1].name == name:
                found[-1] = found[-1]._replace(end=at)
            else:
                found.append(Span(name, last, at))
            last = at
        if starts:
            active.append(i)
        else:
            active.remove(i)
    return found


def in_flight(changes: Iterable[Change], before: int, name: str, begin: float, end: float) -> list[Span]:
    """Spans `name` of the window while anything was in flight, with `before` at its beginning."""
    found: list[Span] = []
    count, since = before, begin
    for at, change, _ in changes:
        if count <= 0 < count + change:
            since = at
        elif count + change <= 0 < count:
            found.append(Span(name, since, at))
        count += change
    return found + [Span(name, since, end)] * (count > 0)


def within(parts: Sequence[Span], begin: float, end: float) -> dict[str, float]:
    """Seconds of each name in a part of the window of `segments`."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for i in range(max(0, bisect_right(parts, begin, key=lambda part: part.begin) - 1), len(parts)):
        if parts[i].begin >= end:
            break
        seconds[parts[i].name] += max(0.0, min(parts[i].end, end) - max(parts[i].begin, begin))
    return seconds


def by_phase(phases: Sequence[Span], units: Mapping[str, Sequence[Span]]) -> dict[str, dict[str, dict[str, float]]]:
    """Phase -> unit -> work -> seconds, of segments of one window."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for phase, begin, end in phases:
        of_phase = table.setdefault(phase, {unit: {} for unit in units})
        for unit, parts in units.items():
            for work, seconds in within(parts, begin, end).items():
                of_phase[unit][work] = of_phase[unit].get(work, 0.0) + seconds
    return table


def busiest(units: Mapping[str, Sequence[Span]], begin: float, end: float, but: str = "") -> tuple[str, str, float]:
    """The unit that worked longest in a part of the window, what it did most, and its busy share; empty if none did."""
    best = ("", "", 0.0)
    for unit, parts in units.items():
        seconds = within(parts, begin, end)
        idle_s = seconds.pop(IDLE, 0.0)
        share = 1 - idle_s / (end - begin)
        if seconds and unit != but and share > best[2]:
            best = (unit, max(seconds, key=lambda name: seconds[name]), share)
    return best


def lanes(spans: Sequence[Span]) -> list[int]:
    """A lane for each span, such that any two in one lane are apart or nested: viewers lose others."""
    order = sorted(range(len(spans)), key=lambda i: (spans[i].begin, -spans[i].end))
    open_: list[list[float]] = []
    found = [0] * len(spans)
    for i in order:
        for lane in open_:
            while lane and lane[-1] <= spans[i].begin:
                lane.pop()
        fits = (n for n, lane in enumerate(open_) if not lane or lane[-1] >= spans[i].end)
        found[i] = next(fits, len(open_))
        if found[i] == len(open_):
            open_.append([])
        open_[found[i]].append(spans[i].end)
    return found
