"""The Prometheus endpoint of a run: the numbers of its newest step, and what the reward loop counts at this moment.

Step metrics are gauges `fapo_<name>`. Live ones are `fapo_live_<name>`: counters and histograms since the run began, so
that rates survive the steps, and gauges; they are asked of the event loop that owns them when somebody scrapes, since
another thread may not read what it changes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

if TYPE_CHECKING:
    from megatron_fapo.genrm.counters import Totals

log = logging.getLogger(__name__)

ANSWER_S = 2.0
"""For the event loop to say what it counts; a driver that is stuck leaves its live metrics out."""
_PERCENTILES = ("_p50_s", "_p95_s", "_max_s")


@dataclass(frozen=True)
class Live:
    """What a reward loop counts. `counters` may not be read outside of its event loop."""

    metrics: Mapping[str, float]
    """Of the step that began last."""
    counters: Mapping[str, Totals]
    """Prefix -> since the run began."""
    servers: Mapping[str, Mapping[str, float]]
    """URL -> what it is doing."""


class _Offer:
    """Who may be asked for Live, and in which event loop."""

    def __init__(self) -> None:
        self._asked: tuple[Callable[[], Live], asyncio.AbstractEventLoop] | None = None

    def offer(self, live: Callable[[], Live]) -> None:
        self._asked = live, asyncio.get_running_loop()

    def withdraw(self, live: Callable[[], Live]) -> None:
        if self._asked is not None and self._asked[0] == live:
            self._asked = None

    def families(self) -> list[Metric] | None:
        """From any thread; None: nobody is there, or has no time."""
        if self._asked is None:
            return []
        live, loop = self._asked

        async def look() -> list[Metric]:
            return list(live_families(live()))

        asked = asyncio.run_coroutine_threadsafe(look(), loop)
        try:
            return asked.result(ANSWER_S)
        except (TimeoutError, concurrent.futures.CancelledError):
            asked.cancel()
            return None


LIVE = _Offer()
"""The reward loop of this process."""


class Prometheus(Collector):
    """A logger (observe.loggers.Sink) that is asked."""

    name, switch = "Prometheus", "observe.prometheus_port=null"

    def __init__(self, host: str, port: int) -> None:
        self._host, self.port = host, port
        self._step, self._metrics, self._lock = 0, dict[str, float](), threading.Lock()

    def start(self) -> None:
        registry = CollectorRegistry()
        registry.register(self)
        self._server, _ = start_http_server(self.port, self._host, registry)
        self.port = self._server.server_port
        log.info("metrics for Prometheus: http://%s:%d/metrics", self._host, self.port)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        with self._lock:
            self._metrics = (self._metrics if step == self._step else {}) | dict(metrics)
            self._step = step

    def close(self, failed: bool) -> None:
        del failed
        self._server.shutdown()
        self._server.server_close()

    def describe(self) -> list[Metric]:
        """Nothing in advance: names come with the steps."""
        return []

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            step, metrics = self._step, self._metrics
        yield GaugeMetricFamily("fapo_step", "The newest finished step.", value=step)
        for name, value in metrics.items():
            yield GaugeMetricFamily(prometheus_name(f"fapo_{name}"), f"{name} of the newest step.", value=value)
        live = LIVE.families()
        yield GaugeMetricFamily("fapo_live_up", "Whether the driver says what it counts.", value=live is not None)
        yield from live or ()


def live_families(live: Live) -> Iterator[Metric]:
    """One family per counter, histogram, gauge, and property of servers."""
    counted: set[str] = set()
    for prefix, counters in live.counters.items():
        for name, total in counters.counts.items():
            counted.add(f"{prefix}/{name}")
            yield CounterMetricFamily(_live(f"{prefix}/{name}"), f"{prefix}/{name} since the run began.", value=total)
        for name, histogram in counters.seconds.items():
            buckets = [(str(limit), float(n)) for limit, n in zip(histogram.limits, histogram.at_most, strict=True)]
            yield HistogramMetricFamily(
                _live(f"{prefix}/{name}_seconds"),
                f"{prefix}/{name} since the run began.",
                buckets=[*buckets, ("+Inf", float(histogram.count))],
                sum_value=histogram.sum_s,
            )
    for name, value in live.metrics.items():
        if name not in counted and not name.endswith(_PERCENTILES):
            yield GaugeMetricFamily(_live(name), f"{name} now.", value=value)
    for what in ("requests", "tokens", "alive"):
        family = GaugeMetricFamily(
            f"fapo_live_genrm_server_{what}", f"{what} of a GenRM server now.", labels=["server"]
        )
        for url, values in live.servers.items():
            family.add_metric([url], float(values[what]))
        yield family


def prometheus_name(metric: str) -> str:
    """Letters, digits and `_`: `eval/aime/avg@4` becomes `eval_aime_avg_at_4`."""
    return re.sub(r"\W", "_", metric.replace("@", "_at_"), flags=re.ASCII)


def _live(name: str) -> str:
    return prometheus_name(f"fapo_live_{name}")
