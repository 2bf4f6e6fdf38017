"""One model, one mini-batch, many layouts: losses, gradients, updates and log-probabilities must agree.

The reference is a single rank that passes every sample alone. A layout sums in another order, in float32, so equality
is to rounding: 2e-4 of a metric's value. Each data rank has other samples, and context ranks other parts of them, so
that a forgotten reduction changes every metric by the share of a rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fapo.config.algorithm import AlgorithmConfig
from megatron_fapo.config.policy import PolicyConfig
from megatron_fapo.policy.batch import TrainSample, set_logprobs
from megatron_fapo.policy.hf_weights import HFCheckpoint, model_rules
from megatron_fapo.policy.parallel import Rank
from tests.policy.models import make_samples, reference_gradients, reference_logprobs, write_model
from tests.policy.ranks import Ranks, make_worker, packs_of, policy_config

ALONE, PACKED = 1, 48
"""Tokens per micro-batch: every sample alone, or a few in a pack."""

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "TP2": {"tensor": 2},
    "TP2+SP": {"tensor": 2, "sequence_parallel": True},
    "PP2": {"pipeline": 2},
    "PP2+VPP2": {"pipeline": 2, "virtual_pipeline": 2},
    "PP2 of 1+3 layers": {"pipeline": 2, "first_stage_layers": 1},
    "TP2xPP2": {"tensor": 2, "pipeline": 2},
    "DP2": {"data": 2},
    "DP2, overlapped": {"data": 2, "overlap_grad_reduce": True},
    "CP2": {"context": 2},
    "TP2+SPxCP2": {"tensor": 2, "sequence_parallel": True, "context": 2},
    "TP2xDP2": {"tensor": 2, "data": 2},
    "CP2xDP2": {"context": 2, "data": 2},
}
EXPERT_LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "EP2": {"data": 2, "expert": 2},
    "EP2 over TP2+SP": {"tensor": 2, "sequence_parallel": True, "expert": 2},
    "ETP2": {"tensor": 2, "sequence_parallel": True, "expert_tensor": 2},
    "EP2xPP2+VPP2": {"data": 2, "expert": 2, "pipeline": 2, "virtual_pipeline": 2},
}


def _hf_gradients(worker: Any) -> dict[str, torch.Tensor]:
    """This rank's gradients under HF names: shards are merged by the rules that merge weights."""
    data = worker.state.get_data_parallel_group(with_context_parallel=True)
    for bucket in (bucket for ddp in worker.ddp for buffer in ddp.buffers for bucket in buffer.buckets):
        # mcore sums over data and context ranks only that part of a buffer which this rank's optimizer updates.
        parts = list(bucket.grad_data.chunk(data.size()))
        torch.distributed.all_gather(parts, parts[data.rank()].clone(), group=data)
    group = worker.state.get_tensor_model_parallel_group()
    result = {}
    for chunk in worker.chunks:
        for parameter, rule in model_rules(chunk, worker.shape):
            shards = [torch.empty_like(parameter.main_grad) for _ in range(group.size())]
            torch.distributed.all_gather(shards, parameter.main_grad.contiguous(), group=group)
            result |= dict(zip(rule.hf_names, rule.merge(shards if rule.sharded else shards[:1]), strict=True))
    return {name: gradient.numpy().copy() for name, gradient in result.items()}


def gradients_job(rank: Rank, cfg: PolicyConfig, samples: list[TrainSample]) -> dict[str, torch.Tensor]:
    worker = make_worker(rank, cfg)
    worker.gradients(packs_of(worker, samples)[1])
    gradients = _hf_gradients(worker)
    worker.close()
    return gradients


def training_job(rank: Rank, cfg: PolicyConfig, samples: list[TrainSample], algorithm: AlgorithmConfig) -> Any:
    worker = make_worker(rank, cfg, algorithm)
    _, packs = packs_of(worker, samples)
    steps = [worker.train(packs) for _ in range(3)]
    weights = {name: tensor.numpy().copy() for name, tensor in worker.export()}
    reports = worker.reports
    worker.close()
    return {"steps": steps, "weights": weights, "reports": reports}


def logprobs_job(rank: Rank, cfg: PolicyConfig, samples: list[TrainSample], temperature: float) -> Any:
    worker = make_worker(rank, cfg, temperature=temperature)
    indexes, packs = packs_of(worker, samples)
    logprobs = worker.logprobs(packs)
    worker.close()
    if logprobs is None:
        return {}
    pairs = [pair for part in zip(indexes, logprobs, strict=True) for pair in zip(*part, strict=True)]
    return dict(pairs)


def _train(ranks: Ranks, cfg: PolicyConfig, samples: list[TrainSample]) -> tuple[list[dict[str, float]], Any]:
    algorithm = AlgorithmConfig(tis_cap=2.0, entropy_coef=0.01)
    results = ranks.run(cfg.parallel.world_size, training_job, cfg, samples, algorithm)
    steps = []
    for step in range(3):
        sums: dict[str, float] = {}
        for result in results:
            if result["reports"]:
                for name, value in result["steps"][step].token_sums.items():
                    sums[name] = sums.get(name, 0.0) + value
        steps.append(sums | {"grad_norm": results[0]["steps"][step].grad_norm})
    return steps, {name: tensor for result in results for name, tensor in result["weights"].items()}


def _assert_same_training(path: str, expected: Any, got: Any, tokens: int) -> None:
    for step, (one, other) in enumerate(zip(expected[0], got[0], strict=True)):
        assert other.keys() == one.keys()
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=2e-4, abs=2e-4), (step, name)
    assert got[0][0]["policy/tokens"] == tokens
    assert got[1].keys() == expected[1].keys()
    initial = HFCheckpoint(path)
    for name, tensor in expected[1].items():
        # Adam magnifies rounding where a gradient is nearly zero, so the update is compared as a whole.
        moved = torch.tensor(tensor) - initial[name]
        difference = torch.tensor(got[1][name]) - torch.tensor(tensor)
        assert difference.norm() < 0.01 * moved.norm(), name


@pytest.fixture(scope="module")
def dense(ranks: Ranks, qwen3: str) -> tuple[str, Any, list[TrainSample]]:
    samples = make_samples()
    return qwen3, _train(ranks, policy_config(qwen3, micro_batch_tokens=ALONE), samples), samples


@pytest.fixture(scope="module")
def sparse(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, list[TrainSample]]:
    path, samples = write_model(Path(tmp_path_factory.mktemp("moe")), "qwen3_moe", tied=False), make_samples()
    return path, _train(ranks, policy_config(path, micro_batch_tokens=ALONE), samples), samples


@pytest.mark.parametrize("tokens", [ALONE, PACKED], ids=["alone", "packed"])
@pytest.mark.parametrize("layout", [*LAYOUTS])
def test_training_equals_one_rank(ranks: Ranks, dense: Any, layout: str, tokens: int) -> None:
    path, expected, samples = dense
    got = _train(ranks, policy_config(path, LAYOUTS[layout], micro_batch_tokens=tokens), samples)
    _assert_same_training(path, expected, got, sum(len(s.response_ids) for s in samples))


@pytest.mark.parametrize("layout", [*EXPERT_LAYOUTS])
def test_training_of_experts_equals_one_rank(ranks: Ranks, sparse: Any, layout: str) -> None:
    path, expected, samples = sparse
    got = _train(ranks, policy_config(path, EXPERT_LAYOUTS[layout], micro_batch_tokens=PACKED), samples)
    _assert_same_training(path, expected, got, sum(len(s.response_ids) for s in samples))


@pytest.mark.parametrize("layout", ["one rank", "TP2", "TP2+SP", "PP2+VPP2", "CP2"])
def test_gradients_equal_autograd_of_the_plain_formula(ranks: Ranks, qwen3: str, layout: str) -> None:
    cfg = policy_config(qwen3, LAYOUTS[layout], micro_batch_tokens=PACKED)
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


def own_logprobs_job(rank: Rank, cfg: PolicyConfig, samples: list[TrainSample]) -> Any:
    """Of the first update, with old log-probabilities of a pass of their own and without: gradients, metrics, and the
    log-probabilities themselves."""
    worker = make_worker(rank, cfg, AlgorithmConfig(tis_cap=2.0, entropy_coef=0.01), temperature=0.7)
    packs = packs_of(worker, samples)[1]
    passed = worker.logprobs(packs)
    # Ranks that do not report know none: all ranks of a replica have the same samples.
    gathered: list[Any] = [None] * cfg.parallel.world_size
    torch.distributed.all_gather_object(gathered, (worker.data_rank, passed))
    old = next(values for data, values in gathered if data == worker.data_rank and values is not None)
    filled = [set_logprobs(pack, "old_logprobs", part) for pack, part in zip(packs, old, strict=True)]
    bare = [set_logprobs(pack, "old_logprobs", [None] * len(pack)) for pack in packs]
    results = []
    for each in (filled, bare):
        sums, logprobs = worker.gradients(each)
        results.append((_hf_gradients(worker), sums, logprobs))
    worker.close()
    return passed, results


@pytest.mark.parametrize("layout", ["TP2+SP", "DP2", "CP2", "PP2+VPP2"])
def test_the_first_update_needs_no_pass_for_old_logprobs(ranks: Ranks, qwen3: str, layout: str) -> None:
    """Bit for bit: the forward pass of training gives what the pass would have given for the same packs."""
    cfg = policy_config(qwen3, LAYOUTS[layout], micro_batch_tokens=PACKED)
    reported = 0
    for passed, ((one, sums, none), (other, own_sums, own)) in ranks.run(
        cfg.parallel.world_size, own_logprobs_job, cfg, make_samples(9)
    ):
        assert one.keys() == other.keys()
        assert all((one[name] == other[name]).all() for name in one)
        assert sums == own_sums
        assert none is None
        assert (own is None) == (passed is None)
        for part, own_part in zip(passed or [], own or [], strict=True):
            assert [x.tolist() for x in part] == [x.tolist() for x in own_part]
            reported += len(part)
    assert reported >= 9


@pytest.mark.parametrize(
    ("architecture", "tied", "layout"),
    [
        ("qwen3", True, {}),
        ("qwen2", True, {"tensor": 2}),
        ("qwen2", False, {"pipeline": 2}),
        ("llama", False, {"tensor": 2, "sequence_parallel": True}),
        ("qwen3", False, {"context": 2, "pipeline": 2, "virtual_pipeline": 2}),
    ],
)
def test_logprobs_equal_transformers(
    ranks: Ranks, tmp_path: Any, architecture: str, tied: bool, layout: dict[str, Any]
) -> None:
    path, samples = write_model(tmp_path, architecture, tied), make_samples(5)
    cfg = policy_config(path, layout, micro_batch_tokens=64)
    merged = {}
    for result in ranks.run(cfg.parallel.world_size, logprobs_job, cfg, samples, 0.7):
        merged |= result
    assert sorted(merged) == [0, 1, 2, 3, 4]
    for index, sample in enumerate(samples):
        expected = reference_logprobs(path, sample, temperature=0.7)
        torch.testing.assert_close(torch.tensor(merged[index]), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("layout", [{"data": 2}, {"pipeline": 2, "virtual_pipeline": 2}])
def test_more_places_than_samples(ranks: Ranks, qwen3: str, layout: dict[str, int]) -> None:
    """A micro-batch without samples joins the collectives and changes nothing."""
    samples = make_samples(1)
    one = _train(ranks, policy_config(qwen3), samples)[0]
    other = _train(ranks, policy_config(qwen3, layout), samples)[0]
    for expected, got in zip(one, other, strict=True):
        assert got == pytest.approx(expected, rel=2e-4, abs=2e-4)
