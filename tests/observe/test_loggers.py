"""Real W&B (offline) and real MLflow (file store) hold what metrics.jsonl has, over resumes and failures."""

from __future__ import annotations

import http.server
import json
import logging
import math
import struct
import threading
import time

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_fapo.config.load import load_config
from megatron_fapo.config.preflight import preflight
from megatron_fapo.errors import UserError
from megatron_fapo.observe import loggers
from megatron_fapo.observe.loggers import Loggers, flat, logger_problems, mlflow_name
from megatron_fapo.observe.metrics import MetricsWriter, read_metrics

RECORD = {"reward/mean": 0.1 + 0.2, "eval/a/avg@4": 1e-300, "score/samples": 3, "policy/loss": math.nan}


@pytest.fixture
def settings(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # whose .netrc has no key
    return [f"run_dir={tmp_path / 'run'}", "observe.tensorboard=false"]


def write(config, steps, resume_step=None, amended=None, scale=1.0, sinks=None):
    """Records of these steps through writer and loggers, as the loop does it."""
    (run_dir := loggers.Path(config.run_dir)).mkdir(exist_ok=True)
    with MetricsWriter(run_dir, resume_step) as writer, Loggers(config, resume_step, sinks) as followers:
        writer.followers.append(followers.put)
        if amended is not None:
            writer.amend(*amended)
        for step in steps:
            writer.write(step, RECORD | {"reward/mean": scale * 0.1 * step})
    return run_dir


def wandb_rows(run_dir):
    """The history rows in all parts of an offline run, oldest first: the store is a log of LevelDB's format."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows, ids = [], set()
    for path in sorted(run_dir.glob("wandb/*run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        data, at, record = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
            record += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or the last part
                parsed = Record.FromString(record)
                record = b""
                if parsed.HasField("history"):
                    items = parsed.history.item
                    rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
                if parsed.HasField("run"):
                    ids.add(parsed.run.run_id)
    assert len(ids) == 1
    return rows


def held(rows):
    """Step -> metrics, where the last row of a step holds, metric by metric."""
    found = {}
    for row in rows:
        found.setdefault(row["step"], {}).update({k: v for k, v in row.items() if not k.startswith("_")})
    return [found[step] for step in sorted(found)]


def same(a, b):
    return repr(a) == repr(b)  # exact, and NaN equals NaN


def mlflow_history(config):
    from mlflow.tracking import MlflowClient

    client = MlflowClient((loggers.Path(config.run_dir) / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("megatron_fapo")
    (run,) = client.search_runs([experiment.experiment_id])
    found = {}
    for name in run.data.metrics:
        for point in sorted(client.get_metric_history(run.info.run_id, name), key=lambda p: p.timestamp):
            found.setdefault(point.step, {})[name] = point.value
    return run, found


def test_wandb_holds_what_metrics_jsonl_has_over_a_resume_and_an_amendment(settings):
    config = load_config([], [*settings, "observe.wandb.enabled=true", "observe.wandb.mode=offline"]).config
    write(config, range(1, 5))
    run_dir = write(config, range(3, 6), resume_step=2, amended=(2, {"eval/a/avg@4": 0.75}), scale=7.0)
    rows, records = wandb_rows(run_dir), read_metrics(run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 2, 3, 4, 5]
    numbers = [row["_step"] for row in rows]
    assert numbers == sorted(set(numbers)), "W&B drops rows whose number does not rise"
    assert len(records) == 5
    for row, record in zip(held(rows), records, strict=True):
        assert same({k: float(v) for k, v in sorted(row.items())}, {k: float(v) for k, v in sorted(record.items())})


def test_mlflow_holds_what_metrics_jsonl_has_over_a_resume_and_an_amendment(settings):
    config = load_config([], [*settings, "observe.mlflow.enabled=true"]).config
    write(config, range(1, 5))
    time.sleep(0.002)  # points of one millisecond have no order
    run_dir = write(config, range(3, 6), resume_step=2, amended=(2, {"eval/a/avg@4": 0.75}), scale=7.0)
    run, history = mlflow_history(config)
    assert history[2]["eval/a/avg_at_4"] == 0.75
    for record in read_metrics(run_dir):
        found = history[record.pop("step")]
        assert same(sorted(found.items()), sorted((mlflow_name(k), float(v)) for k, v in record.items()))
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["reward.flawed_penalty"] == "1.0"
    assert run.data.params.keys() == {mlflow_name(key) for key in flat(config.model_dump(mode="json"))}


def test_tensorboard_shows_the_resumed_steps_only_once(settings):
    config = load_config([], [settings[0]]).config
    write(config, range(1, 5))
    run_dir = write(config, range(3, 5), resume_step=2, scale=7.0)
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == [1, 2, 3, 4]
    assert events.Scalars("reward/mean")[-1].value == pytest.approx(2.8)


class Sink:
    name, switch = "shaky", "observe.shaky=false"

    def __init__(self, fails=lambda step: False, start=None):
        self.fails, self.begin, self.written, self.closed = fails, start, [], None
        self.gate = threading.Event()
        self.gate.set()

    def start(self):
        if self.begin is not None:
            self.begin()

    def write(self, step, _):
        self.gate.wait(20)
        if self.fails(step):
            raise ConnectionError("network is down")
        self.written.append(step)

    def close(self, failed):
        self.closed = failed


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name == loggers.__name__]


@pytest.fixture(autouse=True)
def _logged(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("megatron_fapo"), "propagate", True)
    caplog.set_level("WARNING")


def test_a_failing_logger_is_said_once_counted_and_costs_only_its_own_records(settings, caplog):
    config, bad, good = load_config([], settings).config, Sink(lambda step: step in (2, 3)), Sink()
    run_dir = write(config, range(1, 6), sinks=[bad, good])
    assert (bad.written, good.written) == ([1, 4, 5], [1, 2, 3, 4, 5])
    assert len(read_metrics(run_dir)) == 5
    first, last = messages(caplog)
    assert "shaky does not take a record: ConnectionError('network is down')" in first
    assert "lacks 2 records that failed and 0 that it has not taken" in last
    assert (bad.closed, good.closed) == (False, False)


def test_a_logger_that_hangs_never_blocks_and_loses_the_newest(settings, caplog, monkeypatch):
    monkeypatch.setattr(loggers, "QUEUE_RECORDS", 3)
    monkeypatch.setattr(loggers, "CLOSE_S", 0.5)
    sink = Sink()
    sink.gate.clear()
    config = load_config([], settings).config
    began = time.monotonic()
    run_dir = write(config, range(1, 11), sinks=[sink])
    assert time.monotonic() - began < 5
    assert len(read_metrics(run_dir)) == 10
    first, last = messages(caplog)
    assert "3 records wait for it" in first
    lost, waiting = (int(word) for word in last.split() if word.isdigit())
    assert (lost in (6, 7), waiting) == (True, 3)
    sink.gate.set()


def test_a_new_run_is_refused_and_a_resumed_one_goes_on_when_a_logger_cannot_start(settings, caplog):
    outcomes = iter([OSError("first"), OSError("second"), None])

    def start():
        if (error := next(outcomes)) is not None:
            raise error

    config, sink = load_config([], settings).config, Sink(start=start)
    with pytest.raises(UserError, match=r"shaky cannot start: first; mend it, or set observe\.shaky=false"):
        write(config, [1], sinks=[sink])
    late = Sink(start=start)
    (loggers.Path(config.run_dir) / "loggers.json").write_text("{}")
    write(config, [1, 2], resume_step=0, sinks=[late])  # its first start fails, the one before step 1 succeeds
    assert late.written == [1, 2]
    assert messages(caplog) == []


def test_a_run_that_fails_is_marked_so(settings):
    sink = Sink()
    with pytest.raises(ZeroDivisionError), Loggers(load_config([], settings).config, None, [sink]):
        raise ZeroDivisionError
    assert sink.closed is True
    sink = Sink()
    with Loggers(load_config([], settings).config, None, [sink]) as ended:
        ended.failed = True  # a failure that is an exit code
    assert sink.closed is True


def test_preflight_names_what_keeps_a_logger_from_starting(settings, monkeypatch):
    wanted = [*settings, "observe.wandb.enabled=true", "observe.mlflow.enabled=true"]
    online = load_config([], [*wanted, "observe.mlflow.tracking_uri=http://127.0.0.1:9"]).config
    key, server = logger_problems(online)
    assert "no API key: run `wandb login`" in key
    assert "http://127.0.0.1:9 does not answer" in server
    assert {key, server} <= set(preflight(online))
    assert logger_problems(load_config([], [*wanted, "observe.wandb.mode=offline"]).config) == []
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    assert [problem.split(";")[1] for problem in logger_problems(online)] == [
        " pip install 'megatron-fapo[wandb]', or set observe.wandb.enabled=false",
        " pip install 'megatron-fapo[mlflow]', or set observe.mlflow.enabled=false",
    ]


def test_a_key_that_nobody_accepts_is_refused_for_a_new_run_only(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    wandb.teardown()  # it has read the environment
    config = load_config([], [*settings, "observe.wandb.enabled=true"]).config
    (problem,) = logger_problems(config)
    assert "127.0.0.1:9" in problem
    assert "observe.wandb.mode=offline" in problem
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "loggers.json").write_text('{"wandb": {"id": "abc", "began": 0.0}}')
    assert logger_problems(config) == []
    wandb.teardown()


def test_a_server_that_answers_anything_is_there_and_a_resumed_run_does_not_ask(settings, tmp_path):
    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(401)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"observe.mlflow.tracking_uri=http://127.0.0.1:{server.server_port}"
    config = load_config([], [*settings, "observe.mlflow.enabled=true", uri]).config
    assert logger_problems(config) == []
    server.shutdown()
    server.server_close()
    assert len(logger_problems(config)) == 1
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "loggers.json").write_text('{"mlflow": {"id": "abc"}}')
    assert logger_problems(config) == []
