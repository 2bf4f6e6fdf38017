from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_fapo.config.load import load_config
from megatron_fapo.config.root import asks_genrm
from megatron_fapo.plan.hardware import parse_cluster
from megatron_fapo.plan.layouts import Planner
from megatron_fapo.plan.lengths import find_lengths
from megatron_fapo.plan.shapes import find_shape
from tests.policy.ranks import Ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()


def make_planner(file: str, cluster: str, *overrides: str, lengths: str | None = None) -> Planner:
    """The planner of an example configuration."""
    c = load_config([ROOT / "examples" / file], list(overrides)).config
    shape, _ = find_shape(c.policy.model_path, "policy.model_path", c.policy.max_position_embeddings)
    judge = find_shape(c.genrm.model_path or "", "genrm.model_path")[0] if asks_genrm(c) and c.genrm.servers else None
    return Planner(c, shape, judge, parse_cluster(cluster), find_lengths(lengths, c, judge is not None))


def tiny_planner(*overrides: str) -> Planner:
    """Of the demo, with its models."""
    models = ROOT / "examples" / "models"
    paths = (f"policy.model_path={models}/policy", f"genrm.model_path={models}/genrm")
    return make_planner("tiny_cpu.yaml", "1x2xcpu", "training.evaluation.every_steps=0", *paths, *overrides)
