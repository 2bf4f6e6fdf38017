"""When log-probabilities are worked out, by whom, and what is said of it. The ranks' part is in tests/policy."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_fapo.config.algorithm import AlgorithmConfig
from megatron_fapo.config.load import ConfigError, load_config
from megatron_fapo.config.root import Config
from megatron_fapo.policy.batch import TrainSample
from megatron_fapo.policy.group import Update
from megatron_fapo.training.checkpoint import RunState
from megatron_fapo.training.loop import Run
from megatron_fapo.training.update import GATED, engine_stands, update

GAP = 0.25
"""Of the engine's log-probabilities from the policy's."""


class Policy:
    """The policy's log-probability of token t is -t after no update, and 100 less after each."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.updates = 0

    def _own(self, samples: list[TrainSample]) -> list[np.ndarray]:
        return [-s.response_ids - 100.0 * self.updates for s in samples]

    async def logprobs(self, samples: list[TrainSample], *, reference: bool = False) -> list[np.ndarray]:
        self.calls.append(("reference" if reference else "logprobs", len(samples)))
        return self._own(samples)

    async def train(self, samples: list[TrainSample]) -> Update:
        own = self._own(samples) if samples[0].old_logprobs is None else []
        self.calls.append(("train", [None if s.old_logprobs is None else s.old_logprobs.tolist() for s in samples]))
        self.updates += 1
        return Update({"policy/lr": float(self.updates)}, own)


def _batches(count: int) -> list[list[TrainSample]]:
    ids = [[np.array([4 * i + j + 1, 4 * i + j + 2]) for j in range(2)] for i in range(count)]
    return [[TrainSample((1,), t, 1.0, behaviour_logprobs=-t - GAP) for t in batch] for batch in ids]


def _update(count: int, newest: float | None = None, **algorithm: Any) -> tuple[dict[str, float], list[Any], list[str]]:
    policy, entered = Policy(), []

    async def enter(phase: str) -> None:
        entered.append(phase)

    @contextlib.contextmanager
    def phase(_: str) -> Iterator[None]:
        yield

    state = SimpleNamespace(step=6, weight_version=0)
    run: Any = SimpleNamespace(phase=phase, state=state, mismatch=newest, between_steps=True)
    cluster: Any = SimpleNamespace(policy=policy, enter=enter)
    config = Config(algorithm=AlgorithmConfig(**algorithm))
    metrics = asyncio.run(update(config, cluster, run, _batches(count), lambda: policy.calls.append("check")))
    assert not run.between_steps
    return metrics, policy.calls, entered


def test_one_mini_batch_takes_no_pass() -> None:
    metrics, calls, entered = _update(1)
    assert calls == ["check", ("train", [None, None])]
    assert entered == ["train"]
    assert metrics["mismatch/abs_mean"] == pytest.approx(GAP)
    assert "mismatch/gated_samples" not in metrics


def test_other_mini_batches_take_one_before_the_first_update() -> None:
    metrics, calls, entered = _update(3)
    assert calls == [
        ("logprobs", 4),
        "check",
        ("train", [None, None]),
        ("train", [[-5, -6], [-6, -7]]),
        ("train", [[-9, -10], [-10, -11]]),
    ]
    assert entered == ["logprobs", "train"]
    assert metrics["mismatch/abs_max"] == pytest.approx(GAP)  # of all samples by weights of one version
    assert metrics["policy/lr"] == 2.0


def test_the_reference_is_asked_for_all_samples() -> None:
    assert _update(2, kl_coef=0.1)[1][:3] == [("logprobs", 2), ("reference", 4), "check"]
    assert _update(1, kl_coef=0.1)[2] == _update(2, kl_coef=0.1)[2] == ["logprobs", "train"]
    assert _update(2, 1.0, kl_coef=0.1, old_logprobs="engine")[2] == ["logprobs", "train"]


@pytest.mark.parametrize("newest", [None, 1.02, float("nan")])
def test_a_broken_gate_takes_the_pass_and_says_so(newest: float | None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "megatron_fapo"):
        logging.getLogger("megatron_fapo").propagate = True
        metrics, calls, _ = _update(3, newest, old_logprobs="engine")
    assert calls == _update(3)[1]
    assert metrics["mismatch/gated_samples"] == 4
    assert "step 7" in caplog.text
    assert "mismatch_gate=1.01" in caplog.text


def test_within_the_gate_the_engines_stand_and_the_first_mini_batch_measures() -> None:
    metrics, calls, entered = _update(3, 1.01, old_logprobs="engine")
    assert calls[0] == "check"
    assert calls[1] == ("train", [None, None])
    assert calls[2] == ("train", [[-5 - GAP, -6 - GAP], [-6 - GAP, -7 - GAP]])
    assert entered == ["train"]
    assert metrics["mismatch/gated_samples"] == 0
    # What stood for the policy's own says nothing of it: the mean would be a third of the gap.
    assert metrics["mismatch/abs_mean"] == pytest.approx(GAP)
    assert not engine_stands(AlgorithmConfig(old_logprobs="engine"), metrics[GATED])  # and so the next step's is broken


def test_a_resumed_run_knows_what_was_measured_last(tmp_path: Path) -> None:
    lines = [{"step": 1, GATED: 1.5}, {"step": 2, GATED: 1.25}, {"step": 3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    nobody: Any = None
    assert Run(Config(run_dir=str(tmp_path)), nobody, RunState(3, 3, {}), nobody, nobody).mismatch == 1.25


def test_nothing_to_train_on() -> None:
    metrics, calls, _ = _update(0)
    assert calls == ["check"]
    assert metrics == {}


@pytest.mark.parametrize(
    "other", [["algorithm.tis_cap=2.0"], ["algorithm.tis_cap=2.0", "training.asynchrony.max_staleness=1"]]
)
def test_the_engines_are_refused_where_they_would_correct_nothing(other: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([], ["algorithm.old_logprobs=engine", *other])
    assert [other[-1].partition("=")[0] in problem for problem in caught.value.problems].count(True) >= 1
    assert load_config([], ["algorithm.old_logprobs=engine"]).config.algorithm.mismatch_gate == 1.01
