"""Sample files, logs and progress: what a person reads during and after a run."""

from __future__ import annotations

import io
import logging
from dataclasses import replace

import pytest
from rich.console import Console

from megatron_fapo.observe.log import setup_logging
from megatron_fapo.observe.progress import Progress
from megatron_fapo.observe.samples import read_samples, sample_steps, write_samples
from tests.observe.synthetic import make_sample


@pytest.fixture(autouse=True)
def _restore_logger():
    logger = logging.getLogger("megatron_fapo")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    for handler in logger.handlers:
        handler.close()
    logger.handlers[:], logger.level, logger.propagate = before[0], before[1], before[2]


def test_a_sample_file_answers_why_a_sample_got_its_reward(tmp_path):
    text = "one\u2028two\n\nthree \x85 <end>"
    twice = replace(make_sample(7, "unscored").sample, later_versions=((9, 4), (12, 5)))
    write_samples(tmp_path, 123, [make_sample(2, "flawed", text), replace(make_sample(7, "unscored"), sample=twice)])
    flawed, unscored = read_samples(tmp_path, 123)
    assert flawed["text"] == text
    assert (flawed["prompt_id"], flawed["epoch"], flawed["sample_index"]) == ("testbed/0", 0, 2)
    assert (flawed["reward"], flawed["correct"], flawed["prediction"], flawed["flawed"]) == (0.0, True, "7", True)
    assert flawed["verdict"] == {
        "index": 1,
        "critique": "Checked sample 2: flawed.",
        "server": "http://a/v1",
        "latency_s": 0.25,
        "attempts": 1,
        "completion_tokens": 40,
        "agreement": 1.0,
    }
    assert (flawed["weight_version"], flawed["finish_reason"], flawed["response_tokens"]) == (3, "stop", 22)
    assert (flawed["later_versions"], unscored["later_versions"]) == ([], [[9, 4], [12, 5]])
    assert (unscored["reward"], unscored["unscored_reason"], unscored["verdict"]) == (None, "genrm_deadline", None)


def test_sample_files_are_found_by_step_and_rewritten_whole(tmp_path):
    for step in (10, 2):
        write_samples(tmp_path, step, [make_sample(0, "wrong")] * 2)
    write_samples(tmp_path, 2, [make_sample(0, "sound")])
    assert [(step, path.name) for step, path in sample_steps(tmp_path).items()] == [
        (2, "step_000002.jsonl"),
        (10, "step_000010.jsonl"),
    ]
    assert len(read_samples(tmp_path, 2)) == 1


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    write_samples(tmp_path, 1, [make_sample(0, "sound")])

    def interrupted():
        yield make_sample(0, "wrong")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_samples(tmp_path, 1, interrupted())
    assert read_samples(tmp_path, 1)[0]["correct"] is True


def test_each_process_has_its_own_log_file(tmp_path, capsys):
    path = setup_logging(tmp_path, "driver", terminal=True)
    logging.getLogger("megatron_fapo.training").info("first %d", 1)
    other = setup_logging(tmp_path, "policy", 3)
    logging.getLogger("megatron_fapo.policy").warning("second")
    assert path == tmp_path / "logs" / "driver-0.log"
    assert path.read_text().endswith("INFO driver-0 megatron_fapo.training: first 1\n")
    assert other == tmp_path / "logs" / "policy-3.log"
    assert "second" in other.read_text()
    assert "second" not in path.read_text()
    shown = capsys.readouterr().err
    assert "first 1" in shown
    assert "second" not in shown


METRICS = {"reward/mean": -0.25, "score/accuracy": 0.5, "score/flawed_positive_ratio": 0.125, "score/unscored": 2.0}


def test_without_a_terminal_each_step_is_one_log_line(tmp_path):
    log = setup_logging(tmp_path, "driver")
    screen = io.StringIO()
    with Progress(4, done=2, console=Console(file=screen, force_terminal=False)) as progress:
        progress.phase("rollout")
        progress.samples(3, 2, 1, 8, 100)
        progress.step(METRICS)
        progress.step({})
    lines = log.read_text().splitlines()
    assert len(lines) == 2
    assert "step 3/4  reward -0.250 · accuracy 50.0% · flawed positives 12.5% · unscored 2  ETA 0:00:00" in lines[0]
    assert "step 4/4" in lines[1]
    assert screen.getvalue() == ""


def test_a_terminal_shows_phase_counts_and_the_last_step():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, color_system=None)
    with Progress(4, console=console) as progress:
        progress.step(METRICS)
        progress.phase("rollout")
        progress.samples(3, 2, 1, 8, 100)
        progress._live.refresh()
    shown = screen.getvalue()
    for part in (
        "step 1/4",
        "rollout",
        "samples 3/8 · scored 2 · unscored 1",
        "tokens/s",
        "accuracy 50.0%",
        "ETA 0:00",
    ):
        assert part in shown
