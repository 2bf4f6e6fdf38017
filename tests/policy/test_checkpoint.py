"""Saving and loading: 2 + 2 steps equal 4, bitwise; any layout goes on from what any other saved."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fapo.config.policy import OptimizerConfig, PolicyConfig
from megatron_fapo.policy import checkpoint
from megatron_fapo.policy.batch import split_over_data_ranks
from megatron_fapo.policy.hf_weights import HFCheckpoint
from megatron_fapo.policy.worker import Rank
from tests.policy.models import make_samples, write_model
from tests.policy.ranks import Ranks, make_worker, policy_config

SCHEDULE = OptimizerConfig(lr=1e-3, warmup_steps=2, schedule="cosine", decay_steps=6)


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def job(rank: Rank, cfg: PolicyConfig, load: str | None, save: str | None, steps: int) -> Any:
    worker = make_worker(rank, cfg)
    if load:
        checkpoint.load(worker, load)
    samples = make_samples()
    parts = split_over_data_ranks([s.tokens for s in samples], cfg.parallel.data)
    mine = [samples[i] for i in parts[worker.data_rank]]
    results = [worker.train(mine) for _ in range(steps)]
    if save:
        checkpoint.save(worker, save)
    weights = {name: _digest(tensor) for name, tensor in worker.export()}
    worker.close()
    return [r.grad_norm for r in results], [r.lr for r in results], weights


def _run(ranks: Ranks, cfg: PolicyConfig, *args: Any) -> tuple[list[float], list[float], dict[str, str]]:
    results = ranks.run(cfg.parallel.world_size, job, cfg, *args)
    return results[0][0], results[0][1], {name: h for result in results for name, h in result[2].items()}


def test_two_and_two_steps_are_four_bitwise(ranks: Ranks, qwen3: str, tmp_path: Path) -> None:
    cfg = policy_config(qwen3, tp=2, optimizer=SCHEDULE)
    norms, rates, weights = _run(ranks, cfg, None, None, 4)
    first = _run(ranks, cfg, None, str(tmp_path / "ck"), 2)
    second = _run(ranks, cfg, str(tmp_path / "ck"), None, 2)
    assert first[0] + second[0] == norms
    assert first[1] + second[1] == rates
    assert len(set(rates)) == 4  # the schedule moved, so a forgotten one would show
    assert second[2] == weights


@pytest.mark.parametrize("layout", [{"pp": 2}, {"dp": 2}, {}])
def test_another_layout_goes_on(ranks: Ranks, qwen3: str, tmp_path: Path, layout: dict[str, int]) -> None:
    saved = policy_config(qwen3, tp=2, optimizer=SCHEDULE)
    norms, _, _ = _run(ranks, saved, None, None, 4)
    _run(ranks, saved, None, str(tmp_path / "ck"), 2)
    other = policy_config(qwen3, **layout, optimizer=SCHEDULE)
    resumed, _, _ = _run(ranks, other, str(tmp_path / "ck"), None, 2)
    # A fresh optimizer or schedule would change the third step's update, and with it the fourth gradient.
    assert resumed == pytest.approx(norms[2:], rel=1e-4)


def export_job(rank: Rank, cfg: PolicyConfig) -> dict[str, str]:
    worker = make_worker(rank, cfg, dtype="bfloat16")
    weights = {name: _digest(tensor.view(torch.int16)) for name, tensor in worker.export()}
    worker.close()
    return weights


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_hf_round_trip_is_bitwise(ranks: Ranks, tmp_path: Path, architecture: str, tied: bool) -> None:
    path = write_model(tmp_path, architecture, tied, dtype="bfloat16")
    source = HFCheckpoint(path)
    expected = {name: _digest(source[name].view(torch.int16)) for name in source.names()}
    for layout in ({}, {"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}):
        cfg = policy_config(path, **layout)
        results = ranks.run(cfg.parallel.world_size, export_job, cfg)
        assert {name: h for result in results for name, h in result.items()} == expected, layout
