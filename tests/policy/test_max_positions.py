"""policy.max_position_embeddings: more positions than config.json has, in policy, engines and exports."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_fapo.config import Config
from megatron_fapo.config.policy import PolicyConfig
from megatron_fapo.policy.batch import TrainSample
from megatron_fapo.policy.group import PolicyGroup
from megatron_fapo.policy.worker import Rank
from megatron_fapo.training import cluster
from tests.policy.models import VOCAB, reference_logprobs, write_model
from tests.policy.ranks import Ranks, make_worker, policy_config


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """A model of 64 positions."""
    model = tmp_path / "short"
    write_model(model, "qwen2")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    return model


def logprobs_job(rank: Rank, cfg: PolicyConfig, sample: TrainSample) -> tuple[int, list[float]]:
    worker = make_worker(rank, cfg)
    result = worker.logprobs([[sample]])
    positions = worker.shape.max_positions
    worker.close()
    assert result is not None
    return positions, result[0][0]


def test_positions_beyond_the_checkpoints_are_computed_with_its_own_rope(ranks: Ranks, short: Path) -> None:
    tokens = torch.randint(0, VOCAB, (160,), generator=torch.Generator().manual_seed(5)).tolist()
    sample = TrainSample(prompt_ids=tuple(tokens[:40]), response_ids=tuple(tokens[40:]))
    cfg = policy_config(str(short), max_position_embeddings=256)
    ((positions, logprobs),) = ranks.run(1, logprobs_job, cfg, sample)
    assert positions == 256
    # transformers' default RoPE knows no limit: positions 64 to 159 as if the model had always had them.
    torch.testing.assert_close(torch.tensor(logprobs), reference_logprobs(str(short), sample), atol=1e-4, rtol=0)


def test_what_is_written_carries_the_positions_it_was_trained_with(short: Path, tmp_path: Path) -> None:
    for name, positions in (("same", None), ("more", 256)):
        cfg = policy_config(str(short), max_position_embeddings=positions)
        group = PolicyGroup([], Config(policy=cfg), [])
        asyncio.run(group.save(tmp_path / name))
        asyncio.run(group.export(tmp_path / name / "export"))
    before, same, saved, exported = (
        json.loads((directory / "config.json").read_text())
        for directory in (short, tmp_path / "same/hf", tmp_path / "more/hf", tmp_path / "more/export")
    )
    assert same == before
    assert saved == exported == before | {"max_position_embeddings": 256}


@pytest.mark.parametrize(("positions", "overrides"), [(None, None), (256, {"max_position_embeddings": 256})])
def test_engines_are_told(
    short: Path, monkeypatch: pytest.MonkeyPatch, positions: int | None, overrides: dict[str, int] | None
) -> None:
    monkeypatch.setattr(cluster, "_actor", lambda kind, *_, **__: SimpleNamespace(remote=kind))
    config = Config(policy=policy_config(str(short), max_position_embeddings=positions))
    (engine,) = cluster.make_rollout(config, "cpu")._engines
    assert engine._engine_args().get("hf_overrides") == overrides
