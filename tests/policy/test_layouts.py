"""One model, one mini-batch, many layouts: losses, gradients, updates and log-probabilities must agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_fapo.config.algorithm import AlgorithmConfig
from megatron_fapo.config.policy import PolicyConfig
from megatron_fapo.policy.batch import TrainSample, split_over_data_ranks
from megatron_fapo.policy.hf_weights import HFCheckpoint, model_rules
from megatron_fapo.policy.worker import Rank
from tests.policy.models import make_samples, reference_gradients, reference_logprobs, write_model
from tests.policy.ranks import Ranks, make_worker, policy_config

LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tp": 2},
    "TP2+SP": {"tp": 2, "sp": True},
    "PP2": {"pp": 2},
    "DP2": {"dp": 2},
    "TP2xPP2": {"tp": 2, "pp": 2},
}


def _mine(worker: Any, samples: list[TrainSample]) -> tuple[list[int], list[TrainSample]]:
    indexes = split_over_data_ranks([s.tokens for s in samples], worker.cfg.parallel.data)[worker.data_rank]
    return indexes, [samples[i] for i in indexes]


def _hf_gradients(worker: Any) -> dict[str, torch.Tensor]:
    """This rank's gradients under HF names: shards are merged by the rules that merge weights."""
    group = worker.state.get_tensor_model_parallel_group()
    result = {}
    for parameter, rule in model_rules(worker.chunks[0], worker.shape):
        shards = [torch.empty_like(parameter.main_grad) for _ in range(group.size())]
        torch.distributed.all_gather(shards, parameter.main_grad.contiguous(), group=group)
        result |= dict(zip(rule.hf_names, rule.merge(shards if rule.sharded else shards[:1]), strict=True))
    return {name: gradient.numpy().copy() for name, gradient in result.items()}


def gradients_job(rank: Rank, cfg: PolicyConfig, samples: list[TrainSample]) -> dict[str, torch.Tensor]:
    worker = make_worker(rank, cfg)
    worker.gradients(_mine(worker, samples)[1])
    gradients = _hf_gradients(worker)
    worker.close()
    return gradients


def training_job(rank: Rank, cfg: PolicyConfig, samples: list[TrainSample], algorithm: AlgorithmConfig) -> Any:
    worker = make_worker(rank, cfg, algorithm)
    _, mine = _mine(worker, samples)
    steps = [worker.train(mine) for _ in range(3)]
    weights = {name: tensor.numpy().copy() for name, tensor in worker.export()}
    reports, data_rank = worker.reports, worker.data_rank
    worker.close()
    return {"steps": steps, "weights": weights, "reports": reports, "data_rank": data_rank}


def logprobs_job(rank: Rank, cfg: PolicyConfig, samples: list[TrainSample], temperature: float) -> Any:
    worker = make_worker(rank, cfg, temperature=temperature)
    indexes, mine = _mine(worker, samples)
    logprobs = worker.logprobs(mine)
    reports = worker.reports
    worker.close()
    return dict(zip(indexes, logprobs, strict=True)) if reports else {}


def _train(ranks: Ranks, cfg: PolicyConfig, algorithm: AlgorithmConfig) -> tuple[list[dict[str, float]], Any, Any]:
    results = ranks.run(cfg.parallel.world_size, training_job, cfg, make_samples(), algorithm)
    steps = []
    for step in range(3):
        sums: dict[str, float] = {}
        for result in results:
            if result["reports"]:
                for name, value in result["steps"][step].token_sums.items():
                    sums[name] = sums.get(name, 0.0) + value
        steps.append(sums | {"grad_norm": results[0]["steps"][step].grad_norm})
    weights = {name: tensor for result in results for name, tensor in result["weights"].items()}
    return steps, weights, results


@pytest.mark.parametrize("layout", [*LAYOUTS])
def test_losses_and_updates_equal_one_rank(ranks: Ranks, qwen3: str, layout: str) -> None:
    algorithm = AlgorithmConfig(tis_cap=2.0, entropy_coef=0.01)
    plain, weights, _ = _train(ranks, policy_config(qwen3), algorithm)
    # A small budget: several micro-batches on one side, so that the token mean must be over the global mini-batch.
    cfg = policy_config(qwen3, **LAYOUTS[layout], micro_batch_tokens=48)
    steps, other_weights, _ = _train(ranks, cfg, algorithm)
    for step, (expected, got) in enumerate(zip(plain, steps, strict=True)):
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert got[name] == pytest.approx(value, rel=2e-4, abs=2e-4), (step, name)
    assert plain[0]["policy/tokens"] == sum(len(s.response_ids) for s in make_samples())
    assert other_weights.keys() == weights.keys()
    initial = HFCheckpoint(qwen3)
    for name, tensor in weights.items():
        # Adam magnifies rounding where a gradient is nearly zero, so the update is compared as a whole.
        moved = torch.tensor(tensor) - initial[name]
        difference = torch.tensor(other_weights[name]) - torch.tensor(tensor)
        assert difference.norm() < 0.01 * moved.norm(), name


@pytest.mark.parametrize("layout", ["TP1", "TP2", "TP2+SP", "PP2"])
def test_gradients_equal_autograd_of_the_plain_formula(ranks: Ranks, qwen3: str, layout: str) -> None:
    cfg = policy_config(qwen3, **LAYOUTS.get(layout, {}), micro_batch_tokens=48)
    samples = make_samples()
    results = ranks.run(cfg.parallel.world_size, gradients_job, cfg, samples)
    reference = reference_gradients(qwen3, samples)
    largest = max(float(g.abs().max()) for g in reference.values())
    found = set()
    for result in results:
        for name, gradient in result.items():
            torch.testing.assert_close(
                torch.tensor(gradient),
                reference[name],
                rtol=1e-3,
                atol=1e-5 * largest,
                msg=lambda m, n=name: f"{n}: {m}",
            )
            found.add(name)
    assert found == reference.keys()


@pytest.mark.parametrize(
    ("architecture", "tied", "layout"),
    [
        ("qwen3", True, {}),
        ("qwen2", True, {"tp": 2}),
        ("qwen2", False, {"pp": 2}),
        ("llama", False, {"tp": 2, "sp": True}),
    ],
)
def test_logprobs_equal_transformers(
    ranks: Ranks, tmp_path: Any, architecture: str, tied: bool, layout: dict[str, Any]
) -> None:
    path, samples = write_model(tmp_path, architecture, tied), make_samples(5)
    cfg = policy_config(path, **layout, logprob_micro_batch_tokens=64)
    merged = {}
    for result in ranks.run(cfg.parallel.world_size, logprobs_job, cfg, samples, 0.7):
        merged |= result
    assert sorted(merged) == [0, 1, 2, 3, 4]
    for index, sample in enumerate(samples):
        expected = reference_logprobs(path, sample, temperature=0.7)
        torch.testing.assert_close(torch.tensor(merged[index]), expected, rtol=1e-4, atol=2e-5)


def test_more_ranks_than_samples(ranks: Ranks, qwen3: str) -> None:
    """The rank without samples joins the collectives with a filler that changes nothing."""
    samples = make_samples(1)

    def norm(cfg: PolicyConfig) -> float:
        return ranks.run(cfg.parallel.world_size, training_job, cfg, samples, AlgorithmConfig())[0]["steps"][
            0
        ].grad_norm

    assert norm(policy_config(qwen3, dp=2)) == pytest.approx(norm(policy_config(qwen3)), rel=1e-4)
