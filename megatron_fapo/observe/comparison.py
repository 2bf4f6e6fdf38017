"""Evaluations side by side, with 95 % intervals: pure tables of text, shown on the terminal and in the report."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

Z95 = 1.96
"""Standard errors on each side of a 95 % interval."""
STDERR = "_stderr"
Table = Sequence[Sequence[str]]


def comparison(evaluations: Mapping[str, Mapping[str, float]]) -> Table:
    """One line per metric `eval/...` that any of the named evaluations has, headings first; nothing without metrics.

    A metric with a standard error reads `value ± half width` of its 95 % interval. From the second evaluation on there
    is the difference to the first, whose interval takes both as independent; that is too wide where both have answered
    the same prompts and find the same ones hard. A difference that is larger than its half width is marked `*`.
    """
    names = {name for found in evaluations.values() for name in found}
    metrics = [name for name in sorted(names) if name.startswith("eval/") and not name.endswith(STDERR)]
    if not metrics:
        return []
    first, *others = evaluations
    lines = [["metric", *evaluations, *(f"{name} - {first}" for name in others)]]
    for metric in metrics:
        values = [shown(found.get(metric), half_width(found, metric)) for found in evaluations.values()]
        changes = [_difference(metric, evaluations[first], evaluations[other]) for other in others]
        lines.append([metric.removeprefix("eval/"), *values, *changes])
    return lines


def half_width(found: Mapping[str, float], metric: str) -> float | None:
    """Of the metric's 95 % interval; None when the evaluation has no standard error of it."""
    stderr = found.get(metric + STDERR)
    return None if stderr is None else Z95 * stderr


def shown(value: float | None, width: float | None = None, sign: str = "") -> str:
    """A value and the half width of its interval, as the tables write them; `-` for none."""
    if value is None:
        return "-"
    digits = 0 if isinstance(value, int) or abs(value) >= 1e6 else 1 if abs(value) >= 10 else 4
    return f"{value:{sign}.{digits}f}" + ("" if width is None else f" ± {width:.{digits}f}")


def as_text(table: Table) -> str:
    """Columns aligned with blanks."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table)
    return "\n".join(line.rstrip() for line in lines)


def as_html(table: Table) -> str:
    """A table element, empty text for an empty table."""
    lines = [
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) + "</tr>"
        for tag, part in (("th", table[:1]), ("td", table[1:]))
        for line in part
    ]
    return f"<table>{''.join(lines)}</table>" if table else ""


def _difference(metric: str, before: Mapping[str, float], after: Mapping[str, float]) -> str:
    if metric not in before or metric not in after:
        return "-"
    change, widths = after[metric] - before[metric], (half_width(before, metric), half_width(after, metric))
    if widths[0] is None or widths[1] is None:
        return shown(change, sign="+")
    width = math.hypot(widths[0], widths[1])
    return shown(change, width, "+") + (" *" if abs(change) > width else "")
