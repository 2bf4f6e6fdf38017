"""Plans and their ranking: legal by the checks of a run, whole, and in order."""

from __future__ import annotations

import pytest

from megatron_fapo.config.load import load_config
from megatron_fapo.errors import UserError
from megatron_fapo.plan.command import overrides
from megatron_fapo.plan.layouts import PHASES, _splits, alternatives
from megatron_fapo.plan.work import PolicyWork, head_flops, layer_flops, train_flops
from megatron_fapo.policy.hf_config import layout_problems
from tests.plan.conftest import ROOT, make_planner

SMALL = ("training.prompts_per_step=64", "training.prompts_per_mini_batch=16")
"""A step of 512 samples, so that the ranking takes a second."""


def test_splits_use_everything() -> None:
    assert list(_splits(4, 2)) == [(1, 3), (2, 2), (3, 1)]
    assert len(list(_splits(8, 3))) == 21
    assert list(_splits(2, 3)) == []


def test_flops_by_hand() -> None:
    shape = make_planner("fapo_7b.yaml", "4x8xH100").shape
    weights = 3584 * (2 * 3584 + 2 * 512) + 3 * 3584 * 18944
    assert layer_flops(shape, 10, 100) == 10 * 28 * (2 * weights + 2 * 100 * 3584)
    assert head_flops(shape, 10) == 2 * 10 * 3584 * 152064
    per_token = train_flops(shape, [1]) / 6
    assert per_token == pytest.approx(shape.parameters - 152064 * 3584, rel=1e-3)  # 6 N without the embedding's look-up


@pytest.mark.parametrize(("file", "cluster"), [("fapo_32b.yaml", "8x8xH100"), ("fapo_7b.yaml", "1x8xH100")])
def test_alternatives_are_legal_and_in_order(file: str, cluster: str) -> None:
    planner = make_planner(file, cluster, *SMALL)
    ranking = alternatives(planner)
    assert ranking
    times = [step.total_s for _, step in ranking]
    assert times == sorted(times)
    for other, step in ranking:
        assert other.problems() == []
        assert not layout_problems(other.shape, other.config.policy.parallel)
        assert sum(other.gpus.values()) <= planner.hardware.gpus
        assert set(step.phases) == set(PHASES)
        assert all(0 < share <= 1 for share in other.busy(step).values())
        assert other.config.training == planner.config.training


def test_the_fastest_as_overrides_is_the_same_plan() -> None:
    planner = make_planner("fapo_7b.yaml", "4x8xH100", *SMALL)
    best, step = alternatives(planner)[0]
    again = make_planner("fapo_7b.yaml", "4x8xH100", *SMALL, *overrides(best))
    assert again.config == best.config
    assert again.step(again.drawn()).phases == step.phases


def test_a_plan_places_processes_as_a_run_does() -> None:
    planner = make_planner("fapo_7b.yaml", "4x8xH100")
    assert planner.engine_nodes == 1  # the engines' one node is not the policy's
    assert make_planner("fapo_7b.yaml", "4x8xH100", "cluster.rollout_nodes=2").problems() != []
    one = make_planner(
        "fapo_7b.yaml", "1x8xH100", "cluster.train_nodes=0", "cluster.rollout_nodes=0", "cluster.genrm_nodes=0",
        "policy.parallel.data=1", "rollout.replicas=2", "genrm.servers=2",
    )  # fmt: skip
    assert one.problems() == []
    assert one.engine_nodes == 0
    short = make_planner("fapo_7b.yaml", "2x8xH100")
    assert isinstance(short.placement, UserError)


def test_what_does_not_fit_is_said() -> None:
    problems = make_planner("fapo_32b.yaml", "8x8xH100", "policy.parallel.tensor=4").problems()
    assert any("does not fit in" in problem for problem in problems)
    problems = make_planner("fapo_32b.yaml", "8x8xH100", "rollout.tensor_parallel=1").problems()
    assert any("KV cache" in problem for problem in problems)
    problems = make_planner("fapo_32b.yaml", "8x8xH100", "policy.parallel.pipeline=3").problems()
    assert any("do not divide by policy.parallel.pipeline=3" in problem for problem in problems)


def test_padding_and_uneven_ranks_cost_time() -> None:
    planner = make_planner("fapo_7b.yaml", "4x8xH100", *SMALL)
    work = PolicyWork(planner.config, planner.shape, planner.hardware, 2)
    even, uneven = work.times([1024] * 512), work.times([64] * 256 + [1984] * 256)
    assert uneven.train_s > even.train_s
    assert 0 < even.mfu < planner.hardware.rates.train_mfu


def test_examples_load_without_their_models() -> None:
    for name in ("fapo_7b", "fapo_32b", "genrm_4b", "baseline_7b", "baseline_32b"):
        assert load_config([ROOT / "examples" / f"{name}.yaml"], []).config.policy.model_path


def test_the_slowest_data_rank_sets_the_time() -> None:
    planner = make_planner("fapo_7b.yaml", "4x8xH100", *SMALL, "policy.micro_batch_tokens=1000")
    work = PolicyWork(planner.config, planner.shape, planner.hardware, 2)
    two, five = work.times([1000] * 2), work.times([1000] * 5)  # two data ranks: one sample each, then three and two
    assert five.train_s - work.update_s() == pytest.approx(3 * (two.train_s - work.update_s()))
