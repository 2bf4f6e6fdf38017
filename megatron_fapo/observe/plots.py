"""The figures of a report: inline SVG with the text colour of the page, and the same bytes for the same data."""

from __future__ import annotations

import fnmatch
import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_fapo.observe.comparison import half_width

PALETTE = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#ec4899", "#14b8a6", "#84cc16", "#f97316", "#64748b")
_STYLES = ("-", "--", ":", "-.")
_INK = "#010203"
"""Stands for the page's text colour, which is put in its place afterwards: SVG colours cannot follow a dark page."""
_RC = {
    "svg.fonttype": "none",
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.formatter.useoffset": False,
    "legend.frameon": False,
    "legend.fontsize": 10,
}

Metrics = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Plot:
    title: str
    note: str
    """What the reader should know to judge the curve."""
    series: tuple[str, ...]
    """Metric names; `*` matches any part."""
    percent: bool = False
    log: bool = False
    smooth: bool = True
    colours: tuple[str, ...] = PALETTE


PLOTS = (
    Plot("Reward", "Mean over scored samples, overlong term included.", ("reward/mean",)),
    Plot(
        "Accuracy", "Share of right answers: rollouts, and evaluation sets.", ("score/accuracy", "eval/*/avg@*"), True
    ),
    Plot(
        "Flawed-positive ratio",
        "Share of judged right answers in which the GenRM found an error.",
        ("score/flawed_positive_ratio", "eval/*/score/flawed_positive_ratio"),
        True,
    ),
    Plot(
        "Outcomes",
        "Shares of checked samples; they add to 100 %.",
        ("score/sound_share", "score/flawed_share", "score/wrong_share"),
        True,
        colours=("#10b981", "#f59e0b", "#ef4444"),
    ),
    Plot(
        "Learning progress", "Sound / wrong. Above 1, flawed positives are pushed down.", ("score/learning_progress",)
    ),
    Plot("Response length", "Tokens.", ("response/tokens_mean", "response/tokens_p95", "response/tokens_max")),
    Plot(
        "Critic: flaws found",
        "Of calling a solution flawed; evaluation sets: F1.",
        ("critic/precision", "critic/recall", "critic/f1", "eval/*/f1"),
        True,
    ),
    Plot(
        "Critic: place of the flaw",
        "Distance from the true paragraph, in parts of the solution; flaws found only.",
        ("critic/localisation_error", "eval/*/localisation_error"),
        True,
    ),
    Plot("ProcessBench F1", "Mean over subsets.", ("critic/processbench_f1", "eval/*/processbench_f1"), True),
    Plot("GenRM latency", "Seconds for one verdict, retries included.", ("genrm/latency_*_s",)),
    Plot("Unscored samples", "By reason. They leave statistics and loss.", ("score/unscored/*",), smooth=False),
    Plot(
        "Log-probability mismatch",
        "Policy against rollout engine, same weights.",
        ("mismatch/abs_mean", "mismatch/abs_max", "mismatch/kl_k3"),
        log=True,
    ),
    Plot("Loss", "Of the policy, or of a supervised warm-up.", ("policy/loss", "policy/supervised_loss")),
    Plot("Policy entropy", "Mean over response tokens, nats.", ("policy/entropy",)),
    Plot("Gradient norm", "Before clipping.", ("policy/grad_norm",)),
    Plot("Idle", "Share of the step, mean over GPUs or processes.", ("trace/idle_share/*",), percent=True),
)


HEADLINES = (
    *("avg@*", "maj@*[0-9]", "pass@*", "score/flawed_positive_ratio"),
    *("precision", "recall", "f1", "processbench_f1", "exact_accuracy", "localisation_error"),
)
"""What the bars of an evaluation set show, after `eval/<set>/`; a set has the first four or the others."""


def draw(plot: Plot, runs: Mapping[str, Metrics]) -> str | None:
    """The figure as an SVG element, or None when no run has any of its series.

    One run: a colour for each series. Several: a colour for each run, a line style for each series.
    """
    curves = [
        (run, label, name, position)
        for position, pattern in enumerate(plot.series)
        for name, label in _matches(pattern, runs)
        for run in runs
        if any(name in record for record in runs[run])
    ]
    if not curves:
        return None
    labels = list(dict.fromkeys(label for _, label, _, _ in curves))
    with matplotlib.rc_context({**_RC, "svg.hashsalt": plot.title}):
        figure, axes = _axes()
        for run, label, name, _ in curves:
            steps, values = _finite(runs[run], name)
            order = labels.index(label)
            several = len(runs) > 1
            colours, place = (PALETTE, list(runs).index(run)) if several else (plot.colours, order)
            colour = colours[place % len(colours)]
            style = _STYLES[order % len(_STYLES)] if several else "-"
            text = f"{run} {label}" if several and len(labels) > 1 else run if several else label
            _line(axes, steps, values, colour, style, text, plot.smooth)
        if plot.log:
            axes.set_yscale("log", nonpositive="mask")
        if plot.percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
        if len(curves) > 1:
            axes.legend(loc="best")
        return _svg(figure, plot.title)


def draw_phases(title: str, metrics: Metrics) -> str | None:
    """Seconds of each phase, stacked over the steps; None when the run has no phase times."""
    names = sorted({name for record in metrics for name in record if name.startswith("phase_s/")} - {"phase_s/total"})
    # Step 0 is the evaluation before training: it has no phases of a step.
    rows = [record for record in metrics if record["step"] > 0 and any(name in record for name in names)]
    if not rows:
        return None
    names.sort(key=lambda name: -sum(row.get(name, 0.0) for row in rows))
    with matplotlib.rc_context({**_RC, "svg.hashsalt": title}):
        figure, axes = _axes()
        bottom = [0.0] * len(rows)
        for order, name in enumerate(names):
            heights = [row.get(name, 0.0) for row in rows]
            steps = [row["step"] for row in rows]
            label, colour = name.removeprefix("phase_s/").replace("_", " "), PALETTE[order % len(PALETTE)]
            axes.bar(steps, heights, 1.0, bottom, color=colour, label=label, linewidth=0)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True)
        return _svg(figure, title)


def draw_evaluation(evaluations: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str]]:
    """(evaluation set, SVG) for each set: its headline metrics as bars with 95 % intervals, a colour for each run."""
    names = {name for found in evaluations.values() for name in found}
    figures = []
    for chosen in sorted({name.split("/")[1] for name in names}):
        prefix = f"eval/{chosen}/"
        shown = [n for p in HEADLINES for n in sorted(names) if fnmatch.fnmatchcase(n, prefix + p) and "_std" not in n]
        with matplotlib.rc_context({**_RC, "svg.hashsalt": chosen}):
            figure, axes = _axes("")
            for order, (run, found) in enumerate(evaluations.items()):
                bars = [(place, name) for place, name in enumerate(shown) if name in found]
                places = [place + (order - (len(evaluations) - 1) / 2) * 0.8 / len(evaluations) for place, _ in bars]
                widths = [math.nan if (w := half_width(found, name)) is None else w for _, name in bars]
                colour, size = PALETTE[order % len(PALETTE)], 0.8 / len(evaluations)
                heights = [found[name] for _, name in bars]
                axes.bar(places, heights, size, yerr=widths, color=colour, label=run, ecolor=_INK, capsize=2)
            labels = [name.removeprefix(prefix).removeprefix("score/").replace("_", " ") for name in shown]
            axes.set_xticks(range(len(shown)), labels, rotation=20, ha="right")
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
            if len(evaluations) > 1:
                axes.legend(loc="best")
            figures.append((chosen, _svg(figure, f"Evaluation {chosen}")))
    return figures


def _matches(pattern: str, runs: Mapping[str, Metrics]) -> list[tuple[str, str]]:
    """(metric name, label) of the metrics that the pattern names, each once, in order of name. The label is what one
    `*` stands for, or the last part of a name without one."""
    names = {name for metrics in runs.values() for record in metrics for name in record}
    found = sorted(name for name in fnmatch.filter(names, pattern) if not name.endswith("_stderr"))
    before, *after = pattern.split("*")
    if not after:
        return [(name, name.rpartition("/")[2].replace("_", " ")) for name in found]
    return [(name, name.removeprefix(before).removesuffix(after[-1])) for name in found]


def _finite(metrics: Metrics, name: str) -> tuple[list[float], list[float]]:
    points = [(record["step"], record[name]) for record in metrics if math.isfinite(record.get(name, math.nan))]
    return [step for step, _ in points], [value for _, value in points]


def _line(
    axes: Axes, steps: list[float], values: list[float], colour: str, style: str, label: str, smooth: bool
) -> None:
    if len(values) <= 40 or not smooth:
        marker = "o" if len(values) <= 40 else None
        axes.plot(steps, values, style, color=colour, label=label, linewidth=1.6, marker=marker, markersize=2.6)
        return
    # Means of single rollouts are noisy: the raw curve stays visible under a centred mean, which does not lag.
    axes.plot(steps, values, style, color=colour, alpha=0.3, linewidth=0.8)
    reach = max(2, len(values) // 40)
    means = [fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]
    axes.plot(steps, means, style, color=colour, label=label, linewidth=1.8)


def _axes(label: str = "step") -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 2.7), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(True, color=_INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text).replace(_INK, "currentColor")
    # All figures share one page, and matplotlib numbers the parts of each from 1.
    prefix = re.sub(r"\W+", "-", title.lower())
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    # The page decides the size; viewBox keeps the proportions.
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)
