"""Plans and their ranking: legal by the checks of a run, whole, and in order."""

from __future__ import annotations

import dataclasses
import random

import pytest

from megatron_fapo.config.load import load_config
from megatron_fapo.errors import UserError
from megatron_fapo.plan.command import overrides
from megatron_fapo.plan.layouts import PHASES, _splits, alternatives, changed
from megatron_fapo.plan.simulate import SimSample
from megatron_fapo.plan.work import PolicyWork
from megatron_fapo.policy.flops import head_flops, layer_flops, train_flops
from megatron_fapo.policy.hf_config import Experts, layout_problems
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
    per_token = train_flops(shape, [1], 1) / 6
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
    again = make_planner("fapo_7b.yaml", "4x8xH100", *SMALL, *overrides(best, planner.config))
    assert again.config == best.config
    assert again.step(again.drawn()).phases == step.phases


def test_a_plan_places_processes_as_a_run_does() -> None:
    planner = make_planner("fapo_7b.yaml", "4x8xH100")
    # One copy to the engines' one node, which is not the policy's, through eight NICs; on a node over NVLink.
    assert planner.refit_s == pytest.approx(0.5 + 15.23 / 8 / 45, rel=1e-3)
    assert make_planner("fapo_7b.yaml", "4x8xH100", "cluster.rollout_nodes=2").problems() != []
    one = make_planner(
        "fapo_7b.yaml", "1x8xH100", "cluster.train_nodes=0", "cluster.rollout_nodes=0", "cluster.genrm_nodes=0",
        "policy.parallel.data=1", "rollout.replicas=2", "genrm.servers=2",
    )  # fmt: skip
    assert one.problems() == []
    assert one.refit_s == pytest.approx(0.5 + 15.23 / 340, rel=1e-3)
    short = make_planner("fapo_7b.yaml", "2x8xH100")
    assert isinstance(short.placement, UserError)


def test_what_does_not_fit_is_said() -> None:
    problems = make_planner("fapo_32b.yaml", "8x8xH100", "policy.parallel.tensor=4").problems()
    assert any("does not fit in" in problem for problem in problems)
    problems = make_planner("fapo_32b.yaml", "8x8xH100", "rollout.tensor_parallel=1").problems()
    assert any("KV cache" in problem for problem in problems)
    problems = make_planner("fapo_32b.yaml", "8x8xH100", "policy.parallel.pipeline=3").problems()
    assert any("do not divide by policy.parallel.pipeline=3" in problem for problem in problems)


def work_of(*overrides: str) -> PolicyWork:
    planner = make_planner("fapo_7b.yaml", "4x8xH100", *SMALL, *overrides)
    assert not layout_problems(planner.shape, planner.config.policy.parallel)
    return planner.work


def samples(*lengths: int) -> list[SimSample]:
    return [SimSample(64, length - 64) for length in lengths]


def test_prompts_and_equal_lengths_cost_less() -> None:
    work = work_of()
    even, uneven = work.times(samples(*[1088] * 512)), work.times(samples(*[128] * 256, *[2048] * 256))
    assert uneven.train_s > even.train_s  # attention
    assert 0 < even.mfu < work.rates.train_mfu
    prompts = work.times([SimSample(1088 - 64, 64)] * 512)
    # No output layer: as if so many FLOPs less, and no softmax.
    tokens, rates = 512 * (1024 - 64) / 2 / 4, work.rates  # of a rank: two data, four tensor
    seconds = 4 * head_flops(work.shape, 1) / (rates.peak_tflops * 1e12 * rates.train_mfu)
    seconds += work.shape.vocab * rates.logit_train_s
    assert even.train_s - prompts.train_s == pytest.approx(tokens * seconds, rel=0.01)


def test_layouts_cost_what_they_make_wait() -> None:
    lengths = samples(*random.Random(1).choices(range(200, 4000), k=128))
    one, ranks = ("policy.parallel.data=1",), ("policy.parallel.tensor=1", "policy.parallel.sequence_parallel=false")
    stages = work_of(*one, "policy.parallel.pipeline=2").times(lengths).train_s
    chunks = work_of(*one, "policy.parallel.pipeline=2", "policy.parallel.virtual_pipeline=2").times(lengths).train_s
    assert chunks < stages < work_of(*one).times(lengths).train_s
    tensor = work_of(*one).times(lengths).train_s
    context = work_of(*one, *ranks, "policy.parallel.context=4").times(lengths).train_s
    assert context < tensor  # keys and values of four heads are less than all hidden states


def test_ranks_that_share_experts_wait_at_every_micro_batch() -> None:
    planner = make_planner("fapo_7b.yaml", "4x8xH100", *SMALL)
    shape = dataclasses.replace(planner.shape, experts=Experts(8, 2, 9472, True))
    lengths, seconds = samples(20000, *[300] * 127), []
    for expert in (4, 8):  # within the tensor group, and over both data ranks
        parallel = planner.config.policy.parallel.model_copy(update={"expert": expert})
        config = changed(planner.config, policy={"parallel": parallel, "micro_batch_tokens": 4096})
        assert not layout_problems(shape, parallel)
        work = PolicyWork(config, shape, planner.hardware, 2)
        seconds.append(work.times(lengths).train_s - work.update_s())
    assert seconds[1] > 1.1 * seconds[0]


def test_colocated_engines_share_the_policy_s_cards() -> None:
    args = ("fapo_7b.yaml", "4x8xH100", "cluster.rollout_nodes=0", "rollout.colocated=true", "policy.offload=true")
    planner = make_planner(*args)
    assert planner.problems() == []
    assert planner.gpus == {"train": 8, "rollout": 0, "genrm": 16}
    assert planner.refit_s < make_planner("fapo_7b.yaml", "4x8xH100").refit_s
    tight = make_planner(*args, "rollout.gpu_memory_utilization=0.97").problems()
    assert any("with colocated engines rollout takes" in problem for problem in tight)


def test_examples_load_without_their_models() -> None:
    for name in ("fapo_7b", "fapo_32b", "genrm_4b", "baseline_7b", "baseline_32b"):
        assert load_config([ROOT / "examples" / f"{name}.yaml"], []).config.policy.model_path


def test_the_slowest_data_rank_sets_the_time() -> None:
    planner = make_planner("fapo_7b.yaml", "4x8xH100", *SMALL, "policy.micro_batch_tokens=1000")
    work = PolicyWork(planner.config, planner.shape, planner.hardware, 2)
    two, five = (
        work.times(samples(*[1000] * 2)),
        work.times(samples(*[1000] * 5)),
    )  # two data ranks: one sample each, then three and two
    assert five.train_s - work.update_s() == pytest.approx(3 * (two.train_s - work.update_s()))


def test_colocated_servers_have_no_cards_of_their_own_and_judge_after_the_rollout() -> None:
    own = ("fapo_7b.yaml", "4x8xH100", "cluster.genrm_nodes=0", "cluster.rollout_nodes=3", "genrm.servers=8")
    beside = make_planner(*own, "rollout.replicas=16")
    turns = make_planner(*own, "rollout.replicas=16", "genrm.colocated=true", "genrm.gpu_memory_utilization=0.85")
    assert turns.problems() == []
    assert turns.gpus == beside.gpus | {"genrm": 0}
    streamed, after = (each.rollout(each.drawn()) for each in (beside, turns))
    assert min(after.scored[i] for i, s in enumerate(turns.drawn()) if s.critique) > after.generation_s
    assert after.tail_s > streamed.tail_s
    full = make_planner(*own, "rollout.replicas=16", "genrm.colocated=true", "genrm.gpu_memory_utilization=0.99")
    assert any("99% of a card for vLLM leave less than" in problem for problem in full.problems())
