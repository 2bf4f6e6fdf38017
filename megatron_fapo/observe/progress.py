"""What a run is doing now: a live display on a terminal, and one log line for each finished step everywhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_fapo.observe.stall import WAITS

_log = logging.getLogger(__name__)

SHOWN = (
    ("reward", "reward/mean", "{:+.3f}"),
    ("accuracy", "score/accuracy", "{:.1%}"),
    ("flawed positives", "score/flawed_positive_ratio", "{:.1%}"),
    ("tokens", "response/tokens_mean", "{:.0f}"),
    ("step time", "phase_s/total", "{:.1f} s"),
)
"""Label, metric and form of what a step line says; a metric that a step lacks is left out."""

SHOWN_IDLE_S = 30.0
"""So long nothing moves until the display says who is waited for."""


class Progress:
    """Context manager around the loop of `total_steps` steps, of which `done` were finished before (a resumed run)."""

    def __init__(self, total_steps: int, done: int = 0, console: Console | None = None) -> None:
        self._total, self._first, self._done = total_steps, done, done
        self._started = self._phase_started = time.monotonic()
        self._phase, self._line = "starting", ""
        self._counts: tuple[int, int, int, int, int] | None = None
        console = console or Console(stderr=True)
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)
        self._is_terminal = console.is_terminal

    def __enter__(self) -> Self:
        if self._is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._is_terminal:
            self._live.stop()

    def phase(self, name: str) -> None:
        """The run has entered this phase; sample counts start anew."""
        if self._phase == "starting":  # minutes of imports say nothing of how long steps take
            self._started = time.monotonic()
        self._phase, self._phase_started, self._counts = name, time.monotonic(), None

    def samples(self, done: int, scored: int, unscored: int, total: int, tokens: int) -> None:
        """Counts of the phase so far; `tokens` are response tokens generated in it."""
        self._counts = (done, scored, unscored, total, tokens)

    def step(self, metrics: Mapping[str, float]) -> None:
        """One more step is finished, with these metrics."""
        self._done += 1
        parts = [f"{label} {form.format(metrics[name])}" for label, name, form in SHOWN if name in metrics]
        if unscored := metrics.get("score/unscored"):
            parts.append(f"unscored {unscored:.0f}")
        self._line = " · ".join(parts)
        _log.info("step %d/%d  %s  ETA %s", self._done, self._total, self._line, self._eta())

    def _eta(self) -> str:
        if self._done == self._first:
            return "-"
        each = (time.monotonic() - self._started) / (self._done - self._first)
        return str(timedelta(seconds=round(each * (self._total - self._done))))

    def _render(self) -> Group:
        head = Table.grid(padding=(0, 1))
        head.add_row(
            Text(f"step {self._done}/{self._total}", "bold"),
            ProgressBar(total=self._total, completed=self._done, width=40),
            Text(f"ETA {self._eta()}"),
        )
        elapsed = time.monotonic() - self._phase_started
        now = Text.assemble((self._phase, "cyan"), f" {elapsed:.0f} s")
        if self._counts is not None:
            done, scored, unscored, total, tokens = self._counts
            now.append(f"  samples {done}/{total} · scored {scored}")
            now.append(f" · unscored {unscored}", "yellow" if unscored else "")
            now.append(f" · {tokens / max(elapsed, 1e-3):,.0f} tokens/s")
        if (idle_s := WAITS.idle_s()) >= SHOWN_IDLE_S:
            now.append(f"\n  {idle_s:.0f} s without progress, waiting for {WAITS.lines()[0]}", "yellow")
        return Group(head, now, Text(self._line, "dim"))
