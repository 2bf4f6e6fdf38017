"""Metric records for TensorBoard, W&B, MLflow and Prometheus: those of metrics.jsonl. No logger stops or slows a run.

Each logger has a thread and a bounded queue. When the queue is full, the newest record is dropped; when a logger
fails, the record is lost to it. Both are counted, said once when it begins and summed up at the end; metrics.jsonl has
every record. Only where a *new* run begins does a logger that cannot start end it, before any process is started.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from megatron_fapo.config.observe import ObserveConfig
from megatron_fapo.config.root import Config
from megatron_fapo.errors import UserError
from megatron_fapo.observe.files import write_atomically
from megatron_fapo.observe.prometheus import Prometheus

log = logging.getLogger(__name__)

IDS = "loggers.json"
"""In the run directory: which W&B and MLflow run a resumed run continues."""
QUEUE_RECORDS = 1000
CLOSE_S = 30.0
"""What the end of a run waits for loggers that have not written everything yet."""
START_S = 60.0
REACH_S = 5.0
_MLFLOW_PARAMETERS, _MLFLOW_METRICS, _MLFLOW_CHARACTERS = 100, 1000, 6000
"""Most of each that MLflow takes: in a call, in a call, in the value of a parameter."""


class Sink(Protocol):
    """A logger. All methods are called on one thread of its own."""

    name: str
    switch: str
    """The setting that turns it off."""

    def start(self) -> None:
        """Open or continue the run; called again before the next record when it failed."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take one record; more metrics of a step may come later."""

    def close(self, failed: bool) -> None: ...


class Loggers:
    """Context manager that hands every record to every logger of `config.observe`.

    `resume_step` as of MetricsWriter: None is a new run, others continue the runs that IDS names.
    Raises UserError when a logger cannot start, unless it goes on from an earlier attempt.
    """

    def __init__(self, config: Config, resume_step: int | None = None, sinks: list[Sink] | None = None) -> None:
        self.failed = False
        """Set before the end by a run that has failed without an exception."""
        known = resume_step is not None and (Path(config.run_dir) / IDS).exists()
        self._feeds = [_Feed(sink) for sink in (open_sinks(config, resume_step) if sinks is None else sinks)]
        if known:
            return  # The settings have worked: what fails now is the network, and must not cost the job.
        failed = [(feed.sink, error) for feed in self._feeds if (error := feed.started.result()) is not None]
        if failed:
            self.close(failed=True)
            raise UserError(
                "\n".join(f"{sink.name} cannot start: {error}; mend it, or set {sink.switch}" for sink, error in failed)
            )

    def put(self, step: int, metrics: Mapping[str, float]) -> None:
        """Returns at once."""
        for feed in self._feeds:
            feed.put(step, metrics)

    def close(self, failed: bool = False) -> None:
        """Wait, at most CLOSE_S, until all is written; say what is not."""
        until = time.monotonic() + CLOSE_S
        for feed in self._feeds:
            feed.end(failed)
        for feed in self._feeds:
            feed.join(max(until - time.monotonic(), 0.0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close(failed=self.failed or error is not None)


class _Feed:
    """The queue and the thread of one logger."""

    def __init__(self, sink: Sink) -> None:
        self.sink, self.lost = sink, 0
        self.started: Future[Exception | None] = Future()
        """The error of the first start, or None."""
        self._queue: queue.Queue[tuple[int, Mapping[str, float]]] = queue.Queue(QUEUE_RECORDS)
        self._ending = threading.Event()
        self._failed = False
        # A daemon: a logger that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=f"logger {sink.name}", daemon=True)
        self._thread.start()

    def put(self, step: int, metrics: Mapping[str, float]) -> None:
        try:
            self._queue.put_nowait((step, metrics))
        except queue.Full:
            self._lose(f"{QUEUE_RECORDS} records wait for it")

    def end(self, failed: bool) -> None:
        self._failed = failed
        self._ending.set()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)
        waiting = self._queue.qsize() if self._thread.is_alive() else 0
        if self._thread.is_alive() or self.lost:
            text = "%s lacks %d records that failed and %d that it has not taken; metrics.jsonl has them all"
            log.warning(text, self.sink.name, self.lost, waiting)

    def _run(self) -> None:
        error = _attempt(self.sink.start)
        up = error is None
        self.started.set_result(error)
        while True:
            try:
                step, metrics = self._queue.get(timeout=0.1)
            except queue.Empty:
                if self._ending.is_set():
                    break
                continue
            if not up:
                error = _attempt(self.sink.start)
                up = error is None
            if up:
                error = _attempt(partial(self.sink.write, step, metrics))
            if error is not None:
                self._lose(repr(error))
        if up and (error := _attempt(partial(self.sink.close, self._failed))) is not None:
            log.warning("%s could not be closed: %r", self.sink.name, error)

    def _lose(self, why: str) -> None:
        self.lost += 1
        if self.lost == 1:
            text = "%s does not take a record: %s. The run goes on, metrics.jsonl has it; the end says how many"
            log.warning(text, self.sink.name, why)


def _attempt(work: Callable[[], None]) -> Exception | None:
    try:
        work()
    except Exception as error:  # whatever a logging library raises, the run is worth more
        return error
    return None


def open_sinks(config: Config, resume_step: int | None) -> list[Sink]:
    """The loggers of `config.observe`, not yet started."""
    cfg, run_dir = config.observe, Path(config.run_dir).resolve()
    ids = _Ids(run_dir / IDS, resume_step is not None)
    sinks: list[Sink] = []
    if cfg.tensorboard:
        sinks.append(TensorBoard(run_dir, resume_step))
    if _wandb(cfg):
        sinks.append(Wandb(config, run_dir, ids))
    if cfg.mlflow.enabled:
        sinks.append(MLflow(config, run_dir, ids))
    if cfg.prometheus_port is not None:
        sinks.append(Prometheus(cfg.prometheus_host, cfg.prometheus_port))
    return sinks


class TensorBoard:
    """Scalars in RUN_DIR/tensorboard. A resumed run's events say from which step on the earlier ones do not count."""

    name, switch = "TensorBoard", "observe.tensorboard=false"

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        self._dir, self._purge = run_dir / "tensorboard", None if resume_step is None else resume_step + 1

    def start(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._dir), purge_step=self._purge)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        del failed
        self._writer.close()


class Wandb:
    """One row per record, its `step` the axis of all charts. W&B takes no row back: of several with the same `step`,
    metric by metric the last one holds."""

    name, switch = "W&B", "observe.wandb.enabled=false"

    def __init__(self, config: Config, run_dir: Path, ids: _Ids) -> None:
        self._config, self._dir, self._ids, self._row = config, run_dir, ids, -1

    def start(self) -> None:
        import wandb

        cfg = self._config.observe.wandb
        kept = self._ids.kept("wandb") or {"id": uuid.uuid4().hex, "began": time.time()}
        self._began = kept["began"]
        self._run = wandb.init(
            project=cfg.project,
            entity=cfg.entity,
            name=cfg.name or self._dir.name,
            id=kept["id"],
            resume="allow",
            mode=cfg.mode,
            tags=cfg.tags,
            dir=self._dir,
            config=self._config.model_dump(mode="json"),
            # The console is the driver's: W&B would take stderr away from the live display.
            settings=wandb.Settings(silent=True, console="off", init_timeout=START_S, finish_timeout=CLOSE_S),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._ids.keep("wandb", kept)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        # W&B drops rows whose number is not above the last one, also when it puts together the offline parts of a
        # run, which know nothing of each other: milliseconds since the run began rise over all of them.
        self._row = max(self._row + 1, int((time.time() - self._began) * 1000))
        self._run.log({"step": step, **metrics}, step=self._row, commit=True)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """One point per metric. MLflow takes no point back: of several of a step, the one with the latest time holds."""

    name, switch = "MLflow", "observe.mlflow.enabled=false"

    def __init__(self, config: Config, run_dir: Path, ids: _Ids) -> None:
        self._config, self._dir, self._ids = config, run_dir, ids

    def start(self) -> None:
        cfg = self._config.observe.mlflow
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # directories are refused without it
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(_mlflow_uri(self._config))
        if kept := self._ids.kept("mlflow"):
            self._id = kept["id"]
            self._client.update_run(self._id, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(cfg.experiment)
        experiment = self._client.create_experiment(cfg.experiment) if found is None else found.experiment_id
        self._id = self._client.create_run(experiment, run_name=cfg.run_name or self._dir.name).info.run_id
        self._ids.keep("mlflow", {"id": self._id})
        # Parameters cannot be changed later: a resumed run keeps those of its beginning.
        config = flat(self._config.model_dump(mode="json"))
        values = [Param(mlflow_name(key), str(value)[:_MLFLOW_CHARACTERS]) for key, value in config.items()]
        for first in range(0, len(values), _MLFLOW_PARAMETERS):
            self._client.log_batch(self._id, params=values[first : first + _MLFLOW_PARAMETERS])

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(mlflow_name(name), value, now, step) for name, value in metrics.items()]
        for first in range(0, len(points), _MLFLOW_METRICS):
            self._client.log_batch(self._id, metrics=points[first : first + _MLFLOW_METRICS])

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


def mlflow_name(metric: str) -> str:
    """MLflow takes letters, digits and `_-. :/`: `avg@4` becomes `avg_at_4`, anything else `_`."""
    return re.sub(r"[^\w\-. :/]", "_", metric.replace("@", "_at_"), flags=re.ASCII)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`section.key` -> value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {prefix + key: value}
    return found


def logger_problems(config: Config) -> list[str]:
    """What keeps a logger from starting, each with its remedy. A resumed run does not ask their servers."""
    cfg, problems = config.observe, []
    for name, module, wanted in (("wandb", "wandb", _wandb(cfg)), ("mlflow", "mlflow", cfg.mlflow.enabled)):
        if wanted and find_spec(module) is None:
            problems.append(
                f"observe.{name}: no package {module}; pip install 'megatron-fapo[{name}]', or set "
                f"observe.{name}.enabled=false"
            )
    if problems:
        return problems
    ids = _Ids(Path(config.run_dir) / IDS, True)
    if _wandb(cfg) and cfg.wandb.mode == "online":
        import wandb

        remedy = "run `wandb login`, export WANDB_API_KEY, or set observe.wandb.mode=offline"
        try:
            if not wandb.login(prompt=False, verify=ids.kept("wandb") is None):
                problems.append(f"observe.wandb: no API key: {remedy}")
        except wandb.Error as error:
            problems.append(f"observe.wandb: {error}: mend the network, {remedy}")
    if cfg.mlflow.enabled and not ids.kept("mlflow") and (uri := _mlflow_uri(config)).startswith("http"):
        try:
            urllib.request.urlopen(uri, timeout=REACH_S).close()
        except urllib.error.HTTPError:
            pass  # it answers, which is all that is asked here
        except (OSError, ValueError) as error:
            problems.append(
                f"observe.mlflow.tracking_uri: {uri} does not answer ({error}); start it, name another, or set "
                "observe.mlflow.enabled=false"
            )
    return problems


def _wandb(cfg: ObserveConfig) -> bool:
    return cfg.wandb.enabled and cfg.wandb.mode != "disabled"


def _mlflow_uri(config: Config) -> str:
    named = config.observe.mlflow.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    return named or (Path(config.run_dir).resolve() / "mlruns").as_uri()


class _Ids:
    """IDS, shared by the threads of the loggers."""

    def __init__(self, path: Path, resumed: bool) -> None:
        self._path, self._lock = path, threading.Lock()
        self._ids: dict[str, Any] = json.loads(path.read_text()) if resumed and path.exists() else {}

    def kept(self, name: str) -> dict[str, Any] | None:
        return self._ids.get(name)

    def keep(self, name: str, value: dict[str, Any]) -> None:
        with self._lock:
            self._ids[name] = value
            write_atomically(self._path, json.dumps(self._ids) + "\n")
