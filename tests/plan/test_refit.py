"""`fapo plan refit` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_fapo.cli import main
from megatron_fapo.plan.refit import on_nodes
from megatron_fapo.plan.targets import planned_target
from megatron_fapo.policy.source_index import planned_indexes
from megatron_fapo.weight_sync.plan import make_plan
from megatron_fapo.weight_sync.predict import LinkRates, predict
from tests.plan.conftest import make_planner

LARGE = ["plan", "refit", "--model", "qwen2.5-32b"]


def test_a_refit_is_planned_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "refit.json"
    layout = ["--train", "tp=4,pp=4,dp=2", "--rollout", "tp=4,replicas=8"]
    assert main([*LARGE, *layout, "--json", str(file)]) == 0
    plan = json.loads(file.read_text())
    assert f"predicted {plan['predicted_s']:.3f} s" in capsys.readouterr().out
    assert plan["ranks"] == {"policy": 32, "engines": 32}
    assert plan["bytes"] == plan["minimum_bytes"]
    assert plan["bytes_over_minimum"] == 1.0
    assert plan["limits"] == "network"
    assert 0.18 < plan["predicted_s"] < 0.2
    assert plan["plan_seconds"] > 0
    assert plan["predicted_s"] < plan["instead_s"]["every_replica_pulls"] < plan["instead_s"]["one_rank_sends"]
    assert main([*LARGE, *layout, "--colocated", "--kind", "h200", "--json", str(file)]) == 0
    colocated = json.loads(file.read_text())
    assert colocated["bytes"]["local"] > 0
    assert colocated["predicted_s"] < plan["predicted_s"]
    assert main([*LARGE, "--train", "tp=4", "--rollout", "tp=4", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["limits"] == "node"  # engines on the four GPUs that the policy leaves


@pytest.mark.parametrize(
    ("tensor", "pipeline", "data", "workers", "replicas", "first"),
    [
        (4, 1, 2, 2, 4, 8),  # engines on a node of their own
        (2, 4, 1, 2, 12, 8),  # on three: sources cannot feed them all
        (4, 2, 2, 4, 4, 0),  # colocated, each node a stage
        (2, 2, 2, 4, 2, 0),  # colocated on one node
        (4, 1, 1, 4, 1, 4),  # four cards to the other four
    ],
)
def test_the_refit_of_a_step_is_that_of_the_plan(
    tensor: int, pipeline: int, data: int, workers: int, replicas: int, first: int
) -> None:
    """`fapo plan` weighs dozens of layouts, and has a formula in place of their plans."""
    planner = make_planner(
        "fapo_7b.yaml", "4x8xH100", f"policy.parallel.tensor={tensor}", f"policy.parallel.pipeline={pipeline}",
        f"policy.parallel.data={data}", f"rollout.tensor_parallel={workers}",
    )  # fmt: skip
    shape, rates = planner.shape, planner.hardware.rates
    sources = on_nodes(planned_indexes(shape, planner.config.policy.parallel, "bfloat16"), 1, 8, 0)
    indexes = [planned_target(shape, workers, rank, "bfloat16") for rank in range(workers)] * replicas
    targets = on_nodes(indexes, workers, 8, first)
    links = LinkRates(rates.memory_gbs, rates.link_gbs, rates.network_gbs)
    plan = make_plan(sources, targets)
    planned = predict(plan, sources, targets, links, node_messages=True, bucket_bytes=512 * 2**20)
    nodes = [end.node for end in sources], [end.node for end in targets[::workers]]
    short = planner.work.refit_s(*nodes, shared=first == 0) - rates.refit_s
    # A stage with the embedding has more to send than the mean, which is what the formula knows.
    assert 0.7 * planned.total_s < short < 1.05 * planned.total_s


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train", "tp=3,pp=5,dp=0,xp=2"], ["attention heads", "64 layers", "'dp=0'", "'xp=2'"]),
        (["--rollout", "tp=16", "--kind", "B200"], ["16 workers", "an engine's workers share a node", "--kind B200"]),
        (["--train", "tp=4", "--rollout", "tp=4,replicas=2", "--colocated"], ["2 engines of 4 GPUs", "room for 1"]),
        (["--gpus-per-node", "0"], ["--gpus-per-node 0"]),
    ],
)
def test_everything_that_is_wrong_is_said_at_once(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*LARGE, *arguments]) == 2
    error = capsys.readouterr().err
    assert [word for word in words if word not in error] == []
