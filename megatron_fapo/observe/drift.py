"""Whether a metric of the judging has moved away from what it was: pure, from one step's metrics to the next.

Each watched metric is compared with the median of its last `window` values, in units of their spread (1.4826 times the
median absolute deviation, or the least that matters, whichever is larger). The deviations, each counted as at most
MOST_SIGMAS, go into two cumulative sums, one up and one down, that forget SLACK_SIGMAS a step (Page's CUSUM). An alarm
begins when a sum passes `threshold`, and ends when it is back at 0. So one odd step is no alarm, a jump is one within
two or three steps, and a small shift that stays is one later; what moves slowly, as the share of flawed solutions does
in a run that learns, takes the median along.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

LEAST_VALUES = 20
"""Before anything is compared."""
SLACK_SIGMAS = 1.0
MOST_SIGMAS = 4.0


@dataclass(frozen=True)
class Watched:
    metric: str
    meaning: str
    least: float = 0.0
    """Smallest spread that matters, in the metric's unit."""
    least_share: float = 0.0
    """The same, as a share of the median."""


WATCHED = (
    Watched("score/flawed_positive_ratio", "share of right answers that the GenRM calls flawed", least=0.01),
    Watched("score/unscored_share", "share of samples without a score", least=0.005),
    Watched("genrm/agreement_mean", "agreement of the votes", least=0.01),
    Watched("genrm/completion_tokens_mean", "tokens of a critique", least_share=0.05),
    Watched("genrm/latency_p50_s", "seconds of a verdict", least_share=0.1),
)


@dataclass
class _Series:
    values: deque[float]
    up: float = 0.0
    down: float = 0.0
    alarm: bool = False


@dataclass
class DriftWatch:
    """Its state is what `add` was called with: a resumed run adds the records that it kept."""

    window: int
    threshold: float
    watched: Sequence[Watched] = WATCHED
    _series: dict[str, _Series] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
        """Takes the metrics of a step; those that it lacks are left as they were. Returns `alarm/<name>`, 1 or 0, of
        those that are compared, and what to say of alarms that begin or end."""
        alarms, said = {}, []
        for watched in self.watched if self.window else ():
            if watched.metric not in metrics:
                continue
            value = metrics[watched.metric]
            series = self._series.setdefault(watched.metric, _Series(deque(maxlen=self.window)))
            if len(series.values) >= LEAST_VALUES:
                usual = median(series.values)
                deviation = 1.4826 * median(abs(each - usual) for each in series.values)
                spread = max(deviation, watched.least, watched.least_share * abs(usual), 1e-12)
                off = max(-MOST_SIGMAS, min(MOST_SIGMAS, (value - usual) / spread))
                # Bounded, so that an alarm ends soon after its cause has.
                series.up = min(2 * self.threshold, max(0.0, series.up + off - SLACK_SIGMAS))
                series.down = min(2 * self.threshold, max(0.0, series.down - off - SLACK_SIGMAS))
                before, most = series.alarm, max(series.up, series.down)
                series.alarm = most > self.threshold or (before and most > 0)
                name = f"alarm/{watched.metric.partition('/')[2]}"
                alarms[name] = float(series.alarm)
                if series.alarm != before:
                    what = "has drifted" if series.alarm else "is steady again"
                    numbers = f"{value:.4g}, usual {usual:.4g} +- {spread:.2g} over {len(series.values)} steps"
                    said.append(f"{watched.meaning} {what}: {numbers} ({watched.metric}, {name})")
            series.values.append(value)
        return alarms, said
