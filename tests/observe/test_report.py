"""The report: the numbers of the run are in it, it is sound HTML, and no text of a model becomes part of the page."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from statistics import fmean

import pytest

from megatron_fapo.errors import UserError
from megatron_fapo.observe import report
from megatron_fapo.observe.metrics import MetricsWriter, read_metrics
from megatron_fapo.observe.plots import PLOTS, draw
from megatron_fapo.observe.report import write_report
from megatron_fapo.observe.samples import write_samples
from tests.observe.synthetic import make_run, make_sample

VOID = {"meta", "input", "br", "hr", "img", "link"}


class Page(html.parser.HTMLParser):
    """Fails on tags that do not nest and on ids that occur twice."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.scripts = 0
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]
        self.scripts += tag == "script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, _tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.text.append(data)


def embedded(text: str) -> list[dict]:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "fapo")


@pytest.fixture(scope="module")
def baseline(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "baseline", seed=1, penalised=False)


def test_the_report_of_a_run_has_its_numbers_plots_samples_and_configuration(run, tmp_path):
    write_report([run], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    words = " ".join(" ".join(page.text).split())
    accuracy = [record["score/accuracy"] for record in read_metrics(run) if "score/accuracy" in record]
    assert f"Accuracy {fmean(accuracy[:3]):.1%} → {fmean(accuracy[-3:]):.1%}" in words
    assert "30 steps" in words
    absent = {"Loss", "Gradient norm", "Critic: flaws found", "Critic: place of the flaw", "ProcessBench F1"}
    for plot in PLOTS:
        drawn = f'aria-label="{plot.title}"' in text
        assert drawn == (plot.title not in absent), plot.title
    assert "Phase times" in words
    assert "flawed_penalty: 1.0" in words
    assert "72 of 72 recorded samples are in this file." in words
    (data,) = embedded(text)
    assert [step["step"] for step in data["steps"]] == [10, 20, 30]
    flawed = data["steps"][0]["samples"][2]
    assert (flawed["reward"], flawed["verdict"]["index"], flawed["flawed"]) == (0.0, 1, True)
    assert data["steps"][0]["samples"][3]["unscored_reason"] == "genrm_deadline"
    assert data["paragraphs"] is True
    assert "http" not in re.sub(r"http://a/v1|http://www\.w3\.org/\S+", "", text)  # nothing is fetched from elsewhere


def test_the_same_run_gives_the_same_bytes(run, tmp_path):
    for name in ("a.html", "b.html"):
        write_report([run], tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_two_runs_are_overlaid_and_their_configurations_compared(run, baseline, tmp_path):
    write_report([run, baseline], tmp_path / "compare.html")
    text = (tmp_path / "compare.html").read_text()
    words = " ".join(Page(text).text)
    assert "fapo and baseline" in words
    assert "-  flawed_penalty: 1.0" in words
    assert "+  flawed_penalty: 0.0" in words
    reward = draw(PLOTS[0], {"fapo": [{"step": 1, "reward/mean": 0.5}], "baseline": [{"step": 1, "reward/mean": 0.1}]})
    assert ">fapo<" in reward
    assert ">baseline<" in reward
    assert [entry["run"] for entry in embedded(text)] == ["fapo", "baseline"]


EVIL = "</script><script>alert(1)</script><!-- <script> {{TITLE}} \u2028 & \\boxed{7}"


def test_model_text_stays_text(tmp_path):
    run = tmp_path / "<b>evil"
    with MetricsWriter(run) as writer:
        writer.write(1, {"reward/mean": 0.0, "eval/<script>/avg@1": 0.5, "score/unscored/<img>": 1.0})
    write_samples(run, 1, [make_sample(0, "flawed", EVIL)])
    (run / "config.yaml").write_text(f"run_dir: '{EVIL}'\n")
    write_report([run], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.scripts == 2
    assert embedded(text)[0]["steps"][0]["samples"][0]["text"] == EVIL
    assert "alert(1)" in "".join(page.text)  # as text, in the configuration
    assert "innerHTML" not in text


def test_samples_are_capped_and_the_cap_is_stated(run, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "SAMPLE_BYTES", 3 * 6000)
    monkeypatch.setattr(report, "SAMPLE_STEPS", 2)
    write_report([run], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    (data,) = embedded(text)
    assert [step["step"] for step in data["steps"]] == [10, 30]
    kept = sum(len(step["samples"]) for step in data["steps"])
    assert 0 < kept < 48
    assert f"{kept} of 72 recorded samples" in text
    assert len(json.dumps(data)) < 3 * 6000 * 1.2


def test_missing_parts_are_left_out(tmp_path):
    with MetricsWriter(tmp_path / "bare") as writer:
        writer.write(1, {"policy/loss": 1.0, "score/accuracy": float("nan")})
    write_report([tmp_path / "bare"], tmp_path / "report.html")
    Page((tmp_path / "report.html").read_text())


def test_runs_that_are_not_there_are_refused(run, tmp_path):
    with pytest.raises(UserError, match="absent"):
        write_report([tmp_path / "absent"], tmp_path / "report.html")
    with pytest.raises(UserError, match="twice"):
        write_report([run, run], tmp_path / "report.html")
