"""`fapo report`: one self-contained HTML file of one or several runs, readable without a network or a server."""

from __future__ import annotations

import difflib
import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from megatron_fapo.errors import UserError
from megatron_fapo.observe.comparison import Table, as_html, comparison
from megatron_fapo.observe.files import write_atomically
from megatron_fapo.observe.metrics import FILE, read_metrics
from megatron_fapo.observe.plots import PALETTE, PLOTS, draw, draw_evaluation, draw_phases
from megatron_fapo.observe.samples import evaluation_samples, sample_steps

EVALUATION = "evaluation.json"
"""What `fapo evaluate` leaves in its run directory."""

SAMPLE_BYTES = 8 << 20
"""Most bytes of samples in one report, over all its runs; browsers stay quick up to here."""
SAMPLE_STEPS = 24
"""Most steps of one run whose samples are in a report: the first, the last and evenly spaced ones between."""

TILES = (
    ("Accuracy", "score/accuracy", "{:.1%}"),
    ("Flawed-positive ratio", "score/flawed_positive_ratio", "{:.1%}"),
    ("Reward", "reward/mean", "{:+.3f}"),
    ("Response tokens", "response/tokens_mean", "{:.0f}"),
    ("Step time", "phase_s/total", "{:.1f} s"),
    ("Log-prob. mismatch", "mismatch/abs_mean", "{:.1e}"),
)
"""Headline, metric and form of the tiles on top."""


@dataclass(frozen=True)
class _Run:
    name: str
    path: Path
    metrics: list[dict[str, float]]
    config: str
    """Text of config.yaml, or what the evaluation ran with; empty when the directory has neither."""
    evaluation: dict[str, float]
    """`eval/...` of `fapo evaluate`, or of the last evaluated step of a run; empty without one."""
    evaluated: str
    """What was evaluated, in words."""


def write_report(run_dirs: Sequence[Path], out: Path) -> None:
    """Write the report of the runs in `run_dirs` to `out`; several runs are overlaid in each plot.

    A directory is that of a run, of `fapo evaluate`, or of both. Raises UserError when one has no metrics. Whatever
    else is missing leaves its part of the report out.
    """
    runs = _read_all(run_dirs)
    title = " and ".join(run.name for run in runs)
    samples, stated = _samples(runs)
    parts = {
        "TITLE": html.escape(title),
        "RUNS": "".join(_chip(order, run) for order, run in enumerate(runs)),
        "EVALUATION": _evaluation(runs),
        "CURVES": _curves(runs),
        "CONFIG": _config(runs),
        "STATED": html.escape(stated),
        # `<` never appears raw, so no text of a model can end the script element or open a comment in it.
        "SAMPLES": json.dumps(samples, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    # One pass over the template only: a text that happens to contain {{TITLE}} stays as it is.
    write_atomically(out, re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template))


def evaluation_table(run_dirs: Sequence[Path]) -> Table:
    """The evaluations of the directories side by side; empty when none has one. Raises as write_report does."""
    return comparison(_evaluations(_read_all(run_dirs)))


def _read_all(run_dirs: Sequence[Path]) -> list[_Run]:
    return [_read(path, name) for path, name in zip(run_dirs, _names(run_dirs), strict=True)]


def _read(path: Path, name: str) -> _Run:
    if not path.is_dir():
        raise UserError(f"{path}: no such run directory")
    file, text = path / EVALUATION, path / "config.yaml"
    config = text.read_text(encoding="utf-8") if text.is_file() else ""
    metrics = read_metrics(path) if not file.is_file() or (path / FILE).is_file() else []
    if file.is_file():
        result = json.loads(file.read_text(encoding="utf-8"))
        found, evaluated = result["metrics"], f"evaluation of {result['model']}"
        config = config or yaml.safe_dump(result["config"], sort_keys=False)
    else:
        found = next((record for record in reversed(metrics) if any(key.startswith("eval/") for key in record)), {})
        evaluated = f"evaluation at step {found['step']:.0f}" if found else ""
    evaluation = {key: value for key, value in found.items() if key.startswith("eval/")}
    return _Run(name, path, metrics, config, evaluation, evaluated)


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise UserError(f"the same run is named twice: {', '.join(map(str, paths))}")
    depth = 1
    while len({p[-depth:] for p in parts}) < len(parts):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def _chip(order: int, run: _Run) -> str:
    steps = run.metrics[-1]["step"] if run.metrics else 0
    seconds = sum(record.get("phase_s/total", 0.0) for record in run.metrics)
    facts = [f"{steps:.0f} steps"] * bool(run.metrics)
    facts += [f"{seconds / 3600:.2f} h" if seconds > 3600 else f"{seconds:.0f} s"] * (seconds > 0)
    facts += [html.escape(run.evaluated)] * bool(run.evaluated)
    colour = f'<i style="background:{PALETTE[order % len(PALETTE)]}"></i>'
    return f'<span class="chip">{colour}<b>{html.escape(run.name)}</b> {", ".join(facts)}</span>'


def _tile(title: str, metric: str, form: str, runs: Sequence[_Run]) -> str:
    rows = []
    for order, run in enumerate(runs):
        values = [record[metric] for record in run.metrics if metric in record and record["step"] > 0]
        if not values:
            continue
        width = max(1, len(values) // 10)
        first, last = form.format(fmean(values[:width])), form.format(fmean(values[-width:]))
        dot = f'<i style="background:{PALETTE[order % len(PALETTE)]}"></i>' if len(runs) > 1 else ""
        rows.append(f'<div class="value">{dot}<span class="first">{first} →</span> <span>{last}</span></div>')
    return f'<div class="tile"><h3>{title}</h3>{"".join(rows)}</div>' if rows else ""


def _evaluation(runs: Sequence[_Run]) -> str:
    table = as_html(comparison(_evaluations(runs)))
    if not table:
        return ""
    figures = _figures((name, "With 95 % intervals.", svg) for name, svg in draw_evaluation(_evaluations(runs)))
    note = "± is half of a 95 % interval over prompts; * marks differences larger than it."
    return f'<h2>Evaluation</h2><section class="plots">{figures}</section><p class="dim">{note}</p>{table}'


def _evaluations(runs: Sequence[_Run]) -> dict[str, dict[str, float]]:
    return {run.name: run.evaluation for run in runs}


def _curves(runs: Sequence[_Run]) -> str:
    if not any(run.metrics for run in runs):
        return ""
    tiles = "".join(filter(None, (_tile(*tile, runs) for tile in TILES)))
    note = "Tiles: mean of the first tenth of the steps → mean of the last tenth."
    parts = f'<section class="tiles">{tiles}</section><p class="dim">{note}</p>'
    return f'{parts}<h2>Curves</h2><section class="plots">{_plots(runs)}</section>'


def _plots(runs: Sequence[_Run]) -> str:
    series = {run.name: run.metrics for run in runs}
    figures = [(plot.title, plot.note, draw(plot, series)) for plot in PLOTS]
    for run in runs:
        title = "Phase times" if len(runs) == 1 else f"Phase times: {run.name}"
        figures.append((title, "Seconds of each step.", draw_phases(title, run.metrics)))
    return _figures(figures)


def _figures(figures: Iterable[tuple[str, str, str | None]]) -> str:
    return "".join(
        f"<figure><figcaption><b>{html.escape(title)}</b> {html.escape(note)}</figcaption>{svg}</figure>"
        for title, note, svg in figures
        if svg is not None
    )


def _config(runs: Sequence[_Run]) -> str:
    blocks = []
    if len(runs) > 1:
        first = runs[0]
        for run in runs[1:]:
            names = (first.name, run.name)
            lines = difflib.unified_diff(first.config.splitlines(), run.config.splitlines(), *names, lineterm="", n=1)
            text = "\n".join(lines) or "no difference"
            summary = f"{html.escape(first.name)} against {html.escape(run.name)}"
            blocks.append(f"<details open><summary>{summary}</summary><pre>{html.escape(text)}</pre></details>")
    blocks += [
        f"<details><summary>{html.escape(run.name)}</summary><pre>{html.escape(run.config)}</pre></details>"
        for run in runs
        if run.config
    ]
    return "".join(blocks) or "<p>No config.yaml in the run directory.</p>"


def _samples(runs: Sequence[_Run]) -> tuple[list[dict[str, Any]], str]:
    """The samples that go into the report, and a sentence that says how many of how many they are."""
    chosen: list[dict[str, Any]] = []
    shown = there = 0
    for run in runs:
        steps, sets = sample_steps(run.path), evaluation_samples(run.path)
        picked = {*_evenly(list(steps), SAMPLE_STEPS), *sets}
        budget = SAMPLE_BYTES // len(runs) // max(1, len(picked))
        kept: list[dict[str, Any]] = []
        for step, path in [*steps.items(), *sets.items()]:
            records, count = _within(path, budget if step in picked else 0)
            there += count
            if step in picked:
                kept.append({"step": step, "samples": records})
                shown += len(records)
        config = yaml.safe_load(run.config or "{}") or {}
        tagged = config.get("genrm", {}).get("prompt_form") == "tagged"
        critic = config.get("reward", {}).get("task") == "critic"
        chosen.append({"run": run.name, "paragraphs": tagged, "critic": critic, "steps": kept})
    limit = f"at most {SAMPLE_STEPS} steps of a run and {SAMPLE_BYTES >> 20} MiB"
    rest = "" if shown == there else f" ({limit}; the rest is in samples/ of the run directory)"
    return chosen, f"{shown:,} of {there:,} recorded samples are in this file{rest}."


def _evenly(steps: list[int], count: int) -> set[int]:
    if len(steps) <= count:
        return set(steps)
    return {steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)}


def _within(path: Path, budget: int) -> tuple[list[dict[str, Any]], int]:
    """The first records of a file that fit into `budget` bytes, and how many records it has. The rest is not parsed:
    the samples of a long run are gigabytes."""
    kept: list[dict[str, Any]] = []
    count = used = 0
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            count += 1
            if used < budget:
                record = json.loads(line)
                del record["messages"]
                used += len(json.dumps(record, ensure_ascii=False).encode())
                if used <= budget:
                    kept.append(record)
    return kept, count
