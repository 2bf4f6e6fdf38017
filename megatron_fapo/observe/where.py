"""`fapo trace`: tables of where the time of a run's steps went, out of the summaries of its traces."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megatron_fapo.errors import UserError
from megatron_fapo.observe.spans import IDLE
from megatron_fapo.observe.trace import DIRECTORY, GAPS, Summary, read_summary

Table = tuple[str, list[list[str]]]
"""Title and rows, headings first."""


def trace_command(run_dir: Path, steps: str | None) -> int:
    """`fapo trace`: returns the exit code."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Grid

    summaries = read_summaries(run_dir, steps)
    # A pipe has no width: rich would cut rows at 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    for title, (head, *rows) in (phase_table(summaries), unit_table(summaries), gap_table(summaries)):
        grid = Grid(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
        for name in head:
            grid.add_column(name)
        for row in rows:
            grid.add_row(*row)
        console.print(grid)
    console.print(f"Open {run_dir / DIRECTORY}/step-*.json.gz at https://ui.perfetto.dev", soft_wrap=True)
    return 0


def read_summaries(run_dir: Path, steps: str | None) -> list[Summary]:
    """Of the traced steps, in order; `steps` is `7` or `5-20`.

    Raises:
        UserError: none was traced, or `steps` is neither.
    """
    files = {int(path.name[5:11]): path for path in sorted((run_dir / DIRECTORY).glob("step-*.json.gz"))}
    if not files:
        raise UserError(
            f"{run_dir}: no {DIRECTORY}/step-*.json.gz: not the directory of a run that has finished a step with "
            "observe.trace_every_steps > 0"
        )
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", steps or f"{min(files)}-{max(files)}")
    if match is None:
        raise UserError(f"--steps {steps}: write one step, or two with a dash between: 5-20")
    first, last = int(match[1]), int(match[2] or match[1])
    chosen = [read_summary(path) for step, path in files.items() if first <= step <= last]
    if not chosen:
        raise UserError(f"--steps {steps}: {run_dir} has traces of steps {min(files)} to {max(files)}")
    return chosen


def phase_table(summaries: Sequence[Summary]) -> Table:
    """Seconds of each phase, and the unit that works longest in it."""
    total = sum(summary.seconds for summary in summaries)
    phases = _sums(summary.phases for summary in summaries)
    rows = [["phase", "s per step", "share", "works longest in it", "busy", "mostly"]]
    for phase, seconds in phases.items():
        units = {unit for summary in summaries for unit in summary.work.get(phase, {})}
        work = {
            unit: _sums(s.work[phase].get(unit, {}) for s in summaries if phase in s.work) for unit in sorted(units)
        }
        busy = {unit: 1 - does.pop(IDLE, 0.0) / seconds for unit, does in work.items()}
        unit = max(busy, key=lambda each: busy[each], default="")
        who = [unit, f"{busy[unit]:.0%}", max(work[unit], key=lambda each: work[unit][each])] if work.get(unit) else []
        share = [f"{seconds / len(summaries):.3f}", f"{seconds / total:.1%}"]
        rows.append([phase, *share, *(who or ["the driver alone", "", ""])])
    rows.append(["step", f"{total / len(summaries):.3f}", "100.0%", "", "", ""])
    return _title("Where the time goes", summaries), rows


def unit_table(summaries: Sequence[Summary]) -> Table:
    """What each GPU, and each process that holds none, did in parts of the time."""
    total = sum(summary.seconds for summary in summaries)
    processes = {unit: names for summary in summaries for unit, names in summary.processes.items()}
    tokens = _sums(summary.tokens for summary in summaries)
    work = {
        unit: _sums(of_phase.get(unit, {}) for summary in summaries for of_phase in summary.work.values())
        for unit in processes
    }
    works = [each for each in _sums(work.values()) if each != IDLE]
    rows = [["GPU or process", "idle", *works, "tokens/s"]]
    for unit, names in processes.items():
        shares = [work[unit].get(each, 0.0) / total for each in (IDLE, *works)]
        label = unit if names == [unit] else f"{unit} ({', '.join(names)})"
        rate = sum(tokens.get(name, 0.0) for name in names) / max(work[unit].get("generate", 0.0), 1e-9)
        cells = [f"{share:.1%}" if share else "" for share in shares]
        rows.append([label, *cells, f"{rate:.0f}" if rate else ""])
    return _title("What each did", summaries) + "; tokens of responses, per second of generate", rows


def gap_table(summaries: Sequence[Summary]) -> Table:
    """The longest idle gaps and what the run was at meanwhile."""
    gaps = sorted(((gap, s.step) for s in summaries for gap in s.gaps), key=lambda each: -each[0]["seconds"])[:GAPS]
    rows = [["step", "GPU or process", "from s", "s", "phase", "meanwhile"]]
    for gap, step in gaps:
        other = f"{gap['busiest']}: {gap['does']} ({gap['share']:.0%} busy)" if gap["busiest"] else "the driver alone"
        rows.append([f"{step}", gap["unit"], f"{gap['at']:.3f}", f"{gap['seconds']:.3f}", gap["phase"], other])
    return "The longest idle gaps", rows


def _title(what: str, summaries: Sequence[Summary]) -> str:
    steps = [summary.step for summary in summaries]
    dropped = sum(summary.dropped for summary in summaries)
    lost = f"; {dropped} events were too many and are missing" if dropped else ""
    return (
        f"{what}: step {steps[0]}{lost}"
        if len(steps) == 1
        else f"{what}: {len(steps)} steps, {steps[0]} to {steps[-1]}{lost}"
    )


def _sums(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """By name, the largest first."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return dict(sorted(total.items(), key=lambda each: -each[1]))
