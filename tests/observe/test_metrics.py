"""metrics.jsonl: whole lines on disk, each step once, also over crashes and resumes."""

from __future__ import annotations

import json
import math

import pytest

from megatron_fapo.errors import UserError
from megatron_fapo.observe.metrics import MetricsWriter, read_metrics


def write_steps(run_dir, steps, resume_step=None, value=0.1):
    with MetricsWriter(run_dir, resume_step) as writer:
        for step in steps:
            writer.write(step, {"reward/mean": value * step})


def test_a_line_is_readable_as_soon_as_it_is_written_and_floats_are_exact(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"a": 0.1 + 0.2, "b": 1e-300, "c": 3})
        assert read_metrics(tmp_path) == [{"step": 1, "a": 0.1 + 0.2, "b": 1e-300, "c": 3}]


def test_not_a_number_is_spelt_in_the_file_and_comes_back(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity"}
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["a"])
    assert (record["b"], record["c"]) == (math.inf, -math.inf)


def test_a_resumed_file_has_each_step_once(tmp_path):
    write_steps(tmp_path, range(1, 7))
    write_steps(tmp_path, range(4, 9), resume_step=3, value=0.7)
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert records[2]["reward/mean"] == 0.1 * 3
    assert records[3]["reward/mean"] == 0.7 * 4
    assert list(tmp_path.glob("*.partial")) == []


def test_a_line_torn_by_a_crash_is_dropped(tmp_path):
    write_steps(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rewa')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    write_steps(tmp_path, [3], resume_step=2)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_broken_line_elsewhere_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\noops\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        read_metrics(tmp_path)


def test_a_new_run_does_not_write_over_an_old_one(tmp_path):
    write_steps(tmp_path, [1, 2])
    with pytest.raises(UserError, match="--resume"):
        MetricsWriter(tmp_path)
    assert len(read_metrics(tmp_path)) == 2
    write_steps(tmp_path, [0, 1], resume_step=-1)
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1]


def test_a_step_is_written_once_and_only_numbers_are_taken(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(2, {})
        with pytest.raises(ValueError, match="step 2"):
            writer.write(2, {})
        with pytest.raises(TypeError, match="note"):
            writer.write(3, {"note": "text"})
    assert len(read_metrics(tmp_path)) == 1


def test_a_directory_without_metrics_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        read_metrics(tmp_path)


def test_the_last_line_can_be_added_to_as_a_whole(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.amend(0, {"eval/a": 0.1})
        writer.write(1, {"loss": 2.0})
        writer.amend(1, {"eval/a": 0.3})
        writer.write(2, {"loss": 1.0})
    assert read_metrics(tmp_path) == [
        {"step": 0, "eval/a": 0.1}, {"step": 1, "loss": 2.0, "eval/a": 0.3}, {"step": 2, "loss": 1.0}
    ]  # fmt: skip
