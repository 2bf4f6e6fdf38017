"""A solution that is too long for the judge's context, judged in parts: which parts, and what their verdicts say
together. Pure.

Invariants: the windows cover every paragraph, each is new in exactly one window, every window fits, and all but the
first repeat the `overlap` paragraphs before their new ones. A verdict speaks of a window's new paragraphs alone. Of the
repeated ones the window before was the better judge, since it also saw what led to them; were both listened to, every
overlap would be one more chance to be called flawed. So an index in the overlap is no verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple


class Window(NamedTuple):
    """Paragraphs start, ..., stop - 1 of a solution; those from `fresh` on are to be judged."""

    start: int
    fresh: int
    stop: int


def plan_windows(paragraphs: Sequence[str], budget_chars: int, overlap: int) -> list[Window] | None:
    """The fewest windows whose paragraphs, written as they are given, fit `budget_chars` each.

    None when there are none: a paragraph does not fit together with the `overlap` paragraphs before it.
    """
    ends = [0, *accumulate(map(len, paragraphs))]
    windows: list[Window] = []
    start = fresh = stop = 0
    while fresh < len(paragraphs):
        while stop < len(paragraphs) and ends[stop + 1] - ends[start] <= budget_chars:
            stop += 1
        if stop == fresh:
            return None
        windows.append(Window(start, fresh, stop))
        start, fresh = max(0, stop - overlap), stop
    return windows


def combine(windows: Sequence[Window], verdicts: Sequence[int | None]) -> int | None:
    """The verdict of the whole: its earliest error, -1 when every window is sound, None while that is open.

    `verdicts` are the windows', None where there is none (not yet, or unscored). An error decides once all windows
    before it are sound; the windows after it need not be asked. Raises ValueError for no windows: nothing was judged.
    """
    if not windows:
        raise ValueError("a verdict of no windows")
    for window, verdict in zip(windows, verdicts, strict=True):
        if verdict is None:
            return None
        if verdict != -1:
            if not window.fresh <= verdict < window.stop:
                raise ValueError(f"{verdict} is no verdict of paragraphs {window.fresh} to {window.stop - 1}")
            return verdict
    return -1
