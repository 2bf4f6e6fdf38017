"""Who did what when, by hand-made cases and by a second way: looking at many moments one after another."""

from __future__ import annotations

import random

import pytest

from megatron_fapo.observe.spans import IDLE, Change, Span, busiest, by_phase, in_flight, lanes, segments, within


def drawn(seed: int) -> list[Span]:
    """Spans on a grid of halves, in and around 0 to 20, nested, overlapping and empty ones."""
    rng = random.Random(seed)
    ends = [
        (begin := rng.randrange(-4, 44) / 2, begin + rng.choice([0, 0.5, 1, 3, 8])) for _ in range(rng.randrange(12))
    ]
    return [Span(f"s{i}", *each) for i, each in enumerate(ends)]


def at(spans: list[Span], moment: float) -> str:
    """Who has the moment: of those that cover it the last to begin, of these the first to end, of these the last."""
    covering = [(s.begin, -s.end, i) for i, s in enumerate(spans) if s.begin <= moment < s.end]
    return spans[max(covering)[2]].name if covering else IDLE


def test_the_inner_span_has_the_time_and_gaps_are_idle() -> None:
    train = [Span("train", 1, 6), Span("gradients", 1, 4), Span("optimizer", 4, 5), Span("refit", 8, 12)]
    assert segments(train, 0, 10) == [
        Span(IDLE, 0, 1),
        Span("gradients", 1, 4),
        Span("optimizer", 4, 5),
        Span("train", 5, 6),
        Span(IDLE, 6, 8),
        Span("refit", 8, 10),
    ]
    assert segments([], 0, 10) == [Span(IDLE, 0, 10)]


@pytest.mark.parametrize("seed", range(40))
def test_segments_fill_the_window_as_moment_by_moment(seed: int) -> None:
    spans = drawn(seed)
    # Clipped to the window first: what began before it began with it.
    clipped = [Span(name, max(0.0, begin), min(20.0, end)) for name, begin, end in spans]
    found = segments(spans, 0, 20)
    assert [part.begin for part in found] == [0, *(part.end for part in found[:-1])]
    assert found[-1].end == 20
    for k in range(40):
        moment = k / 2 + 0.25
        assert next(part.name for part in found if part.begin <= moment < part.end) == at(clipped, moment)
    seconds = within(found, 3.25, 17.75)
    for name in {part.name for part in found}:
        assert seconds.get(name, 0) == sum(0.25 for k in range(13, 71) if at(clipped, k / 4 + 0.125) == name)


@pytest.mark.parametrize("seed", range(10))
def test_a_phase_adds_up_for_every_unit_and_the_phases_to_the_window(seed: int) -> None:
    phases = segments([Span("rollout", 0, 6), Span("train", 7, 15), Span("rollout", 15, 16)], 0, 20)
    units = {"a": segments(drawn(seed), 0, 20), "b": segments(drawn(seed + 100), 0, 20)}
    table = by_phase(phases, units)
    for phase, seconds in within(phases, 0, 20).items():
        for unit in units:
            assert sum(table[phase][unit].values()) == pytest.approx(seconds)
    for unit, parts in units.items():
        for work, seconds in within(parts, 0, 20).items():
            assert sum(of_phase[unit].get(work, 0) for of_phase in table.values()) == pytest.approx(seconds)


def test_what_is_in_flight_is_work_across_the_borders_of_the_window() -> None:
    changes = [Change(2, -1, 9), Change(3, 2, 0), Change(4, -1, 5), Change(6, -1, 5), Change(6, 3, 0)]
    assert in_flight(changes, 1, "generate", 0, 10) == [
        Span("generate", 0, 2),
        Span("generate", 3, 6),
        Span("generate", 6, 10),
    ]
    assert in_flight([], 2, "judge", 0, 10) == [Span("judge", 0, 10)]
    assert in_flight([], 0, "judge", 0, 10) == []


def test_who_works_meanwhile() -> None:
    units = {
        "a": segments([Span("train", 0, 4)], 0, 10),
        "b": segments([Span("train", 0, 1), Span("generate", 1, 9)], 0, 10),
        "c": segments([], 0, 10),
    }
    assert busiest(units, 0, 10) == ("b", "generate", pytest.approx(0.9))
    assert busiest(units, 0, 10, but="b") == ("a", "train", pytest.approx(0.4))
    assert busiest(units, 9.5, 10) == ("", "", 0)


@pytest.mark.parametrize("seed", range(20))
def test_spans_of_a_lane_are_apart_or_nested(seed: int) -> None:
    spans = [span for span in drawn(seed) if span.end > span.begin]
    placed = lanes(spans)
    for i, a in enumerate(spans):
        for b, lane in zip(spans[:i], placed, strict=False):
            if lane == placed[i]:
                apart = a.end <= b.begin or b.end <= a.begin
                nested = (a.begin >= b.begin and a.end <= b.end) or (b.begin >= a.begin and b.end <= a.end)
                assert apart or nested
    assert lanes([Span("a", 0, 5), Span("b", 1, 2), Span("c", 4, 6), Span("d", 6, 7)]) == [0, 0, 1, 0]
