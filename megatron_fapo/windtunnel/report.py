"""The wind tunnel's summary as text for a terminal and as one self-contained HTML file with figures."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_fapo.observe.comparison import as_html, as_text
from megatron_fapo.observe.files import write_atomically
from megatron_fapo.observe.plots import Plot, draw
from megatron_fapo.windtunnel.summary import Reading, shown_gap

POLICY = ("accuracy", "flawed_ratio", "response_tokens", "rho")
JUDGE = ("judge_missed", "missed_of_right", "judge_invented", "judge_located", "unscored_share")
CRITIC = ("f1", "precision", "recall", "localisation_error", "localisation_exact", "response/tokens_mean")
PLOTS = (
    Plot("Accuracy", "Share of right answers among training samples.", ("accuracy",), percent=True),
    Plot("Flawed-positive ratio", "Of right answers, by the oracle.", ("flawed_ratio",), percent=True),
    Plot("Learning progress", "Sound / wrong; left out where nothing is wrong.", ("rho",), log=True),
    Plot("Response length", "Tokens.", ("response_tokens",)),
    Plot("A frozen judge over time", "Flawed positives that the GenRM calls sound.", ("judge_missed",), percent=True),
    Plot("Sound samples called flawed", "By the frozen GenRM.", ("judge_invented",), percent=True),
    Plot("GenRM: F1", "Of `flawed`, while it trains.", ("f1",), percent=True),
    Plot("GenRM: localisation error", "Distance / number of steps, of flaws found.", ("localisation_error",)),
)  # fmt: skip
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 32px auto; padding: 0 24px;
  color: light-dark(#1a2230, #e5eaf2); background: light-dark(#fff, #0e131b); }
:root { color-scheme: light dark; } table { border-collapse: collapse; margin: 12px 0 28px; }
td, th { padding: 4px 14px 4px 0; text-align: left; border-bottom: 1px solid #8884; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(380px, 1fr)); gap: 18px; }
figure { margin: 0; } figcaption { font-size: 13px; } figure svg { width: 100%; height: auto; }
"""


def write_report(summary: Mapping[str, Any], readings: Sequence[Reading], out: Path) -> str:
    """Write the HTML file; returns the same tables as text."""
    tables = _tables(summary)
    seeds = summary["seeds"]
    over = "over seeds (Student's t)" if len(seeds) > 1 else "over prompts, which leaves the noise of training out"
    note = f"Seeds {', '.join(map(str, seeds))}. Values of the last quarter of the steps, 95 % intervals {over}."
    body = [f"<h1>Wind tunnel</h1><p>{note}</p>"]
    body += [f"<h2>{html.escape(title)}</h2>{as_html(rows)}" for title, rows in tables]
    figures = [(plot, draw(plot, _curves(readings, plot))) for plot in PLOTS]
    body.append('<div class="plots">')
    body += [
        f"<figure><figcaption><b>{html.escape(plot.title)}</b> {html.escape(plot.note)}</figcaption>{svg}</figure>"
        for plot, svg in figures
        if svg is not None
    ]
    page = (
        f'<!doctype html><meta charset="utf-8"><title>Wind tunnel</title><style>{_STYLE}</style>{"".join(body)}</div>'
    )
    write_atomically(out, page)
    return "\n\n".join(f"{title}\n{as_text(rows)}" for title, rows in tables)


def _curves(readings: Sequence[Reading], plot: Plot) -> dict[str, list[dict[str, float]]]:
    """Arm -> its mean over seeds, step by step, of the plot's metric; a step that a seed lacks it in is left out."""
    (metric,) = plot.series
    curves = {}
    for name in dict.fromkeys(reading.arm.name for reading in readings):
        runs = [reading.steps for reading in readings if reading.arm.name == name]
        records = [list(at_step) for at_step in zip(*runs, strict=True)]
        curves[name] = [
            {"step": step[0]["step"], metric: fmean(r[metric] for r in step)}
            for step in records
            if all(metric in r for r in step)
        ]
    return {name: curve for name, curve in curves.items() if curve}


def _tables(summary: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    arms = summary["arms"]
    claims = [["claim", "holds", "evidence"]]
    claims += [[c["claim"], c["holds"], c["evidence"]] for c in summary["claims"]]
    tables = [("Claims", claims)] if len(claims) > 1 else []
    for title, metrics, chosen in (
        ("Policies", POLICY, {n: a for n, a in arms.items() if a["kind"] == "policy"}),
        ("GenRM training", CRITIC, {n: a for n, a in arms.items() if a["kind"] == "critic"}),
    ):
        if chosen:
            rows = [["arm", "", *metrics]]
            rows += [[name, arm["about"], *(_cell(arm, metric) for metric in metrics)] for name, arm in chosen.items()]
            tables.append((title, rows))
            rows = [["arm", "against", *metrics]]
            for name, arm in chosen.items():
                if "against" in arm:
                    rows.append(
                        [name, arm["against"]["arm"], *(shown_gap(arm["against"].get(metric)) for metric in metrics)]
                    )
            if len(rows) > 1:
                tables.append((f"{title}: paired differences", rows))
    judges = {name: arm for name, arm in arms.items() if "judge_missed" in arm and arm["judge_missed"] > 0}
    if judges:
        drifts = ("judge_missed", "missed_of_right")
        rows = [["arm", *JUDGE, *(f"{metric}, last - first quarter" for metric in drifts)]]
        rows += [
            [name, *(_cell(arm, m) for m in JUDGE), *(shown_gap(arm["drift"].get(m)) for m in drifts)]
            for name, arm in judges.items()
        ]
        tables.append(("The frozen judge against the oracle", rows))
    theory = [["arm", "2/lambda - 1", "groups that agree", "largest rho, advantage > 0", "smallest rho, advantage < 0",
               "steps with rho below"]]  # fmt: skip
    for name, arm in arms.items():
        if found := arm.get("theory"):
            bounds = found["largest_rho_with_positive_advantage"], found["smallest_rho_with_negative_advantage"]
            theory.append([
                name, f"{found['rho_shift']:.3g}", f"{found['groups_that_agree']} of {found['groups']}",
                *("-" if bound is None else f"{bound:.3g}" for bound in bounds),
                ", ".join(map(str, found["steps_before_the_shift"])),
            ])  # fmt: skip
    return [*tables, ("Theory: when flawed positives begin to lose", theory)] if len(theory) > 1 else tables


def _cell(arm: Mapping[str, Any], metric: str) -> str:
    if arm.get(metric) is None:
        return "-"
    interval = arm[f"{metric}_interval"]
    return _number(arm[metric]) + (f" [{_number(interval[0])}, {_number(interval[1])}]" if interval else "")


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
