"""Evaluations side by side: values, intervals, differences and their marks, against figures worked by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_fapo.cli import main
from megatron_fapo.observe.comparison import as_html, as_text, comparison
from megatron_fapo.observe.report import evaluation_table, write_report
from megatron_fapo.observe.samples import write_evaluation_samples
from tests.observe.synthetic import make_run, make_sample
from tests.observe.test_report import Page, embedded


def test_values_intervals_and_differences():
    a = {"eval/x/f1": 0.5, "eval/x/f1_stderr": 0.03, "eval/x/score/samples": 40, "genrm/called": 3}
    b = {"eval/x/f1": 0.65, "eval/x/f1_stderr": 0.04, "eval/x/score/samples": 44, "eval/y/maj@4": 0.25}
    assert comparison({"a": a, "b": b}) == [
        ["metric", "a", "b", "b - a"],
        ["x/f1", "0.5000 ± 0.0588", "0.6500 ± 0.0784", "+0.1500 ± 0.0980 *"],  # 1.96 x hypot(0.03, 0.04)
        ["x/score/samples", "40", "44", "+4"],
        ["y/maj@4", "-", "0.2500", "-"],
    ]
    noise = comparison({"b": b, "a": {"eval/x/f1": 0.6, "eval/x/f1_stderr": 0.04}})
    assert noise[1][-1] == "-0.0500 ± 0.1109"
    assert comparison({"a": a})[1] == ["x/f1", "0.5000 ± 0.0588"]
    assert comparison({"a": {"score/accuracy": 1.0}}) == []


def test_tables_as_text_and_html():
    table = [["metric", "<b>a"], ["long/metric", "1"]]
    assert as_text(table) == "metric       <b>a\nlong/metric  1"
    assert as_html(table) == (
        "<table><tr><th>metric</th><th>&lt;b&gt;a</th></tr><tr><td>long/metric</td><td>1</td></tr></table>"
    )
    assert (as_text([]), as_html([])) == ("", "")


def evaluation(path: Path, f1: float) -> Path:
    path.mkdir()
    metrics = {"eval/fpb/f1": f1, "eval/fpb/f1_stderr": 0.01, "eval/fpb/precision": 0.9, "genrm/called": 2.0}
    config = {"reward": {"task": "critic"}, "genrm": {"prompt_form": "tagged"}}
    (path / "evaluation.json").write_text(json.dumps({"model": f"m-{f1}", "metrics": metrics, "config": config}))
    write_evaluation_samples(path, "fpb", [make_sample(i, "wrong") for i in range(3)])
    return path


def test_a_report_of_evaluations_alone(tmp_path, capsys):
    first, second = evaluation(tmp_path / "before", 0.5), evaluation(tmp_path / "after", 0.75)
    assert main(["report", str(first), str(second), "--out", str(tmp_path / "r.html")]) == 0
    assert "fpb/f1         0.5000 ± 0.0196  0.7500 ± 0.0196  +0.2500 ± 0.0277 *" in capsys.readouterr().out
    text = (tmp_path / "r.html").read_text()
    words = " ".join(" ".join(Page(text).text).split())
    assert "+0.2500 ± 0.0277 *" in words
    assert "evaluation of m-0.75" in words
    assert "task: critic" in words
    assert 'aria-label="Evaluation fpb"' in text
    assert "Curves" not in words
    assert "steps" not in words
    data = embedded(text)
    assert [(d["critic"], d["steps"][0]["step"], len(d["steps"][0]["samples"])) for d in data] == [(True, "fpb", 3)] * 2


def test_runs_show_their_last_evaluation_beside_their_curves(tmp_path):
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other", seed=1)
    write_report([run, other], tmp_path / "r.html")
    words = " ".join(" ".join(Page((tmp_path / "r.html").read_text()).text).split())
    assert "evaluation at step 30" in words
    assert "Curves" in words
    (heads, line) = evaluation_table([run, other])
    assert heads == ["metric", "run", "other", "other - run"]
    assert line[0] == "held_out/avg@4"
    assert float(line[2]) - float(line[1]) == pytest.approx(float(line[3]), abs=2e-4)


def test_a_directory_of_a_run_that_was_evaluated_shows_the_evaluation(tmp_path):
    run = make_run(tmp_path / "run")
    evaluation(tmp_path / "apart", 0.5)
    for name in ("evaluation.json", "samples/eval_fpb.jsonl"):
        (run / name).write_bytes((tmp_path / "apart" / name).read_bytes())
    assert [line[0] for line in evaluation_table([run])] == ["metric", "fpb/f1", "fpb/precision"]
    write_report([run], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "flawed_penalty: 1.0" in text  # the run's own configuration
    assert [step["step"] for step in embedded(text)[0]["steps"]] == [10, 20, 30, "fpb"]
