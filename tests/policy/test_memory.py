"""Real megatron ranks whose storages are really freed and refilled, and mcore's optimizers against the plain one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_fapo.config.policy import OptimizerConfig, PolicyConfig
from megatron_fapo.policy.memory import GRADIENTS, OPTIMIZER, PARAMETERS, PARTS, PLAN, SLACK, Ledger, leaks
from megatron_fapo.policy.optimizer import optimizer_problem
from megatron_fapo.policy.parallel import Rank
from megatron_fapo.policy.worker import PolicyWorker
from tests.policy.models import make_samples
from tests.policy.ranks import Ranks, free_port, make_worker, packs_of, policy_config


def _state(worker: PolicyWorker) -> dict[str, torch.Tensor]:
    """All weights, and all that the optimizer keeps."""
    state = {f"{i}.{n}": p.detach() for i, c in enumerate(worker.chunks) for n, p in c.named_parameters()}
    for part in worker.optimizer.chained_optimizers:
        for g, group in enumerate(part.optimizer.param_groups):
            for i, parameter in enumerate(group["params"]):
                state[f"main {g} {i}"] = parameter.detach()
                for name, value in part.optimizer.state[parameter].items():
                    state[f"{name} {g} {i}"] = value
    return state


def _steps(worker: PolicyWorker, updates: int) -> tuple[list[Any], dict[str, Any]]:
    """Steps of the loop with every phase in its order; log-probabilities, results of updates and exported weights."""
    seen: list[Any] = []
    facts: dict[str, Any] = {}
    _, packs = packs_of(worker, make_samples())
    for _ in range(updates):
        for phase in ("rollout", "logprobs", "train", "checkpoint", "refit"):
            facts |= worker.memory.enter(phase)
            if phase == "rollout":
                facts["at rollout"] = worker.memory.ledger()
                tensors = [*_state(worker).values(), *(b.grad_data for ddp in worker.ddp for b in ddp.buffers)]
                facts["storages"] = {tensor.untyped_storage().nbytes() for tensor in tensors}
            if phase == "logprobs":
                seen.append(worker.logprobs(packs))
            if phase == "train":
                seen.append(worker.train(packs))
            if phase == "refit":
                seen.append({name: tensor.clone() for name, tensor in worker.export()})
    return seen, facts


def _make(rank: Rank, port: int, cfg: PolicyConfig, dtype: str, **changes: Any) -> PolicyWorker:
    """Another worker in the same process, on a port of its own: a rank may still find the store of the one before."""
    return make_worker(replace(rank, master_port=port), cfg.model_copy(update=changes), dtype=dtype)


def _offloaded_and_not(rank: Rank, cfg: PolicyConfig, dtype: str, updates: int, ports: Sequence[int]) -> dict[str, Any]:
    workers = {}
    for offload, port in zip((False, True), ports, strict=True):
        worker = _make(rank, port, cfg, dtype, offload=offload)
        owners = [p for chunk in worker.chunks for p in chunk.parameters()]
        seen, facts = _steps(worker, updates)
        loud = []
        worker.memory.enter("rollout")
        host = {part: slab.data_ptr() for part, slab in worker.memory._host.items()}
        for method, arguments in (("logprobs", [[]]), ("gradients", [[]]), ("export", [])) if offload else ():
            with pytest.raises(RuntimeError, match="are in host memory") as error:
                getattr(worker, method)(*arguments)
            loud.append(str(error.value))
        worker.memory.enter("train")
        same = all(a is b for a, b in zip(owners, (p for c in worker.chunks for p in c.parameters()), strict=True))
        worker.memory.enter("rollout")
        reused = host == {part: slab.data_ptr() for part, slab in worker.memory._host.items()}
        worker.memory.enter("train")
        workers[offload] = {"seen": seen, "facts": facts, "loud": loud, "same": same, "reused": reused}
        workers[offload]["state"] = {name: value.clone() for name, value in _state(worker).items()}
        worker.close()
    return workers


@pytest.mark.parametrize(
    ("dtype", "layout", "optimizer"),
    [
        ("float32", {"data": 2}, {}),
        ("bfloat16", {"tensor": 2}, {}),
        ("bfloat16", {"data": 2}, {"offload_fraction": 0.5}),
    ],
    ids=["float32-dp2", "bfloat16-tp2", "bfloat16-dp2-hybrid"],
)
def test_training_that_is_offloaded_between_all_phases_is_bitwise_equal(
    ranks: Ranks, qwen3: str, dtype: str, layout: dict[str, int], optimizer: dict[str, float]
) -> None:
    cfg = policy_config(qwen3, layout, optimizer=OptimizerConfig(lr=1e-3, warmup_steps=0, **optimizer))
    for result in ranks.run(2, _offloaded_and_not, cfg, dtype, 2, [free_port(), free_port()]):
        plain, offloaded = result[False], result[True]
        assert plain["state"].keys() == offloaded["state"].keys()
        for name, value in plain["state"].items():
            assert torch.equal(value, offloaded["state"][name]), name
        for left, right in zip(plain["seen"], offloaded["seen"], strict=True):
            if isinstance(left, dict):
                assert all(torch.equal(left[name], right[name]) for name in left | right)
            else:
                np.testing.assert_equal(*(asdict(each) if is_dataclass(each) else each for each in (left, right)))
        phases = zip(("logprobs", "train", "refit"), offloaded["loud"], strict=True)
        assert all(f"enter('{phase}')" in error for phase, error in phases)
        assert offloaded["same"]
        assert offloaded["reused"]

        ledger: Ledger = offloaded["facts"]["at rollout"]
        assert offloaded["facts"]["storages"] == {0}
        assert (ledger.parameters, ledger.gradients, ledger.optimizer) == (0, 0, 0)
        before: Ledger = plain["facts"]["at rollout"]
        assert before.pinned == 0
        assert min(before.parameters, before.gradients, before.optimizer) > 0
        assert ledger.pinned >= before.parameters + before.optimizer
        assert ledger.pinned < 1.1 * (before.parameters + before.optimizer)


def _against_plain(
    rank: Rank, cfg: PolicyConfig, fractions: list[float], dtype: str, root: Path, ports: Sequence[int]
) -> dict[str, Any]:
    from megatron_fapo.policy import checkpoint

    results: dict[Any, Any] = {}
    for i, fraction in enumerate(fractions):
        optimizer = cfg.optimizer.model_copy(update={"offload_fraction": fraction})
        worker = _make(rank, ports[2 * i], cfg, dtype, optimizer=optimizer)
        _, packs = packs_of(worker, make_samples())
        norms = []
        for update in range(3):
            norms.append(worker.train(packs).grad_norm)
            if update == 1:
                checkpoint.save(worker, root / f"{fraction}")
        inner = worker.optimizer.chained_optimizers[0].optimizer
        halves = [bool(getattr(inner, name, None)) for name in ("cpu_optimizers", "gpu_optimizer")]
        weights = {n: p.detach().float().clone() for n, p in worker.chunks[0].named_parameters()}
        worker.close()
        # Resumed from the second update, it makes the same third.
        worker = _make(rank, ports[2 * i + 1], cfg, dtype, optimizer=optimizer)
        checkpoint.load(worker, root / f"{fraction}")
        resumed_norm = worker.train(packs).grad_norm
        resumed = {n: p.detach().float().clone() for n, p in worker.chunks[0].named_parameters()}
        worker.close()
        results[fraction] = (norms, weights, halves, resumed_norm, resumed)
    return results


def test_an_optimizer_that_steps_on_the_host_makes_the_same_updates(ranks: Ranks, qwen3: str, tmp_path: Path) -> None:
    cfg = policy_config(qwen3, {"data": 2})
    ports = [free_port() for _ in range(6)]
    for result in ranks.run(2, _against_plain, cfg, [0.0, 0.5, 1.0], "bfloat16", tmp_path, ports):
        norms, weights, halves, resumed_norm, resumed = result[0.0]
        assert halves == [False, False]
        for fraction, expected in ((0.5, [True, True]), (1.0, [True, False])):
            got_norms, got, got_halves, got_resumed_norm, got_resumed = result[fraction]
            assert got_halves == expected
            # Fused and plain AdamW round the same formula differently; a bfloat16 weight may then round to its
            # neighbour.
            assert got_norms == pytest.approx(norms, rel=1e-2)
            for name, value in weights.items():
                torch.testing.assert_close(
                    got[name], value, rtol=2**-7, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
                )
            assert got_resumed_norm == got_norms[2]
            assert all(torch.equal(got_resumed[name], got[name]) for name in got)
        assert resumed_norm == norms[2]
        assert all(torch.equal(resumed[name], weights[name]) for name in weights)


def test_the_plan_keeps_what_each_phase_uses_and_nothing_else() -> None:
    assert PLAN["rollout"] == ()
    assert PLAN["refit"] == PLAN["logprobs"] == (PARAMETERS,)
    assert set(PLAN["train"]) == set(PARTS)
    assert set(PLAN["checkpoint"]) == {PARAMETERS, OPTIMIZER}


def test_a_part_that_stays_and_memory_that_grows_are_leaks() -> None:
    clean = Ledger(parameters=0, gradients=0, optimizer=0, pinned=9, host=9, allocated=100, reserved=0, peak=0, card=0)
    assert leaks(clean, (), clean) == []
    assert leaks(Ledger(parameters=5, gradients=0, optimizer=7, pinned=0, host=0), (PARAMETERS,), clean) == [
        "optimizer still hold 7 bytes"
    ]
    grown = Ledger(parameters=0, gradients=0, optimizer=0, pinned=9, host=9, allocated=101 + SLACK)
    (leak,) = leaks(grown, (), clean)
    assert f"{SLACK + 1} bytes more" in leak
    assert leaks(grown, (GRADIENTS,), grown) == []


def test_an_optimizer_is_refused_where_it_cannot_run() -> None:
    assert optimizer_problem(OptimizerConfig(), "float32", "cpu") is None
    narrow = optimizer_problem(OptimizerConfig(moments_dtype="bfloat16"), "bfloat16", "cpu") or ""
    assert "does not run on a CPU" in narrow
    assert "moments_dtype=bfloat16" in narrow
    assert optimizer_problem(OptimizerConfig(offload_fraction=1), "bfloat16", "cpu") is None
    assert "float32" in (optimizer_problem(OptimizerConfig(offload_fraction=1), "float32", "cpu") or "")
