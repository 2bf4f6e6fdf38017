"""Log-probabilities and entropy against log_softmax and autograd of the plain formula."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_fapo.policy.vocab_parallel import logprob_entropy
from megatron_fapo.policy.worker import Rank
from tests.policy.ranks import Ranks

VOCAB, ROWS, HIDDEN, TOKENS = 700, 768, 12, 50
"""Rows 700 to 767 are padding. """

VOCABS = (VOCAB, 500)
"""Of three ranks' 256 rows each: with padding on the last one, and with nothing else on it."""

SMALL = 4 * 128 * TOKENS
"""Bytes of a block of the fewest rows, 128."""


def _inputs(dtype: torch.dtype = torch.float32, vocab: int = VOCAB) -> tuple[torch.Tensor, ...]:
    """hidden, weight, index, target, gradients of the two results."""
    torch.manual_seed(0)
    index = torch.randperm(70)[:TOKENS]
    hidden, weight = torch.randn(70, HIDDEN).to(dtype), torch.randn(ROWS, HIDDEN).to(dtype)
    return hidden, weight, index, torch.randint(0, vocab, (TOKENS,)), torch.randn(TOKENS), torch.randn(TOKENS)


def _plain(dtype: torch.dtype, temperature: float, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    hidden, weight, index, target, grad_logprob, grad_entropy = inputs
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    logp = ((hidden[index] @ weight.T)[:, :VOCAB] / temperature).log_softmax(-1)
    logprob, entropy = logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    (logprob * grad_logprob + entropy * grad_entropy).sum().backward()
    return {"logprob": logprob, "entropy": entropy, "hidden": hidden.grad, "weight": weight.grad}


def _ours(inputs: tuple[torch.Tensor, ...], temperature: float = 1.0, **kwargs: Any) -> dict[str, torch.Tensor]:
    hidden, weight, index, target, grad_logprob, grad_entropy = inputs
    hidden.requires_grad_(), weight.requires_grad_()
    kwargs = {"rank": 0, "vocab": VOCAB} | kwargs
    logprob, entropy = logprob_entropy(hidden, weight, index, target, temperature=temperature, **kwargs)
    (logprob * grad_logprob + entropy * grad_entropy).sum().backward()
    return {"logprob": logprob, "entropy": entropy, "hidden": hidden.grad, "weight": weight.grad}


def _assert_close(got: dict[str, Any], want: dict[str, torch.Tensor], rtol: float = 1e-4, atol: float = 1e-5) -> None:
    for name, value in want.items():
        mine = torch.as_tensor(got[name]).detach().double()
        torch.testing.assert_close(
            mine, value.detach().double(), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("chunk_bytes", [1, 3 * SMALL, 2**28])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients(temperature: float, chunk_bytes: int) -> None:
    """However many blocks there are, as float64 has it; padded rows take no probability and get no gradient."""
    got = _ours(_inputs(), temperature, chunk_bytes=chunk_bytes)
    _assert_close(got, _plain(torch.float64, temperature, _inputs()))
    assert got["logprob"].dtype == got["entropy"].dtype == torch.float32
    assert not got["weight"][VOCAB:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_logits_give_the_same_bits_for_a_product_less(dtype: torch.dtype) -> None:
    products = []
    results = []
    for keep in (False, True):
        hidden, weight, index, target, grad_logprob, grad_entropy = _inputs(dtype)
        hidden.requires_grad_(), weight.requires_grad_()
        kwargs: dict[str, Any] = {"temperature": 0.6, "vocab": VOCAB, "rank": 0, "chunk_bytes": SMALL, "keep": keep}
        logprob, entropy = logprob_entropy(hidden, weight, index, target, **kwargs)
        with _Bytes() as made:
            (logprob * grad_logprob + entropy * grad_entropy).sum().backward()
        products.append(made.products)
        results.append((logprob, entropy, hidden.grad, weight.grad))
    blocks = -(-VOCAB // 128)
    assert products == [3 * blocks, 2 * blocks]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@torch.no_grad()
def test_without_a_backward_nothing_is_kept() -> None:
    peaks = []
    for keep in (False, True):
        hidden, weight, index, target, *_ = _inputs()
        weight.requires_grad_()
        with _Bytes(hidden, weight, index, target) as used:
            logprob_entropy(
                hidden, weight, index, target, temperature=1.0, vocab=VOCAB, rank=0, chunk_bytes=SMALL, keep=keep
            )
        peaks.append(used.peak)
    assert peaks[0] == peaks[1]


def ranks_job(rank: Rank, temperature: float) -> list[dict[str, np.ndarray]]:
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"tcp://{rank.master_address}:{rank.master_port}",
        rank=rank.rank,
        world_size=rank.world_size,
    )
    try:
        results = []
        for vocab in VOCABS:
            hidden, weight, *others = _inputs(vocab=vocab)
            mine = (hidden, weight.chunk(rank.world_size)[rank.rank].clone(), *others)
            of_group = {"rank": rank.rank, "group": torch.distributed.group.WORLD}
            got = _ours(mine, temperature, vocab=vocab, chunk_bytes=SMALL, **of_group)
            results.append({name: value.detach().numpy().copy() for name, value in got.items()})
        return results
    finally:
        torch.distributed.destroy_process_group()


def test_three_ranks_are_one(ranks: Ranks) -> None:
    """Rows split over ranks, of which one may hold nothing but padding: the same results on every rank, and gradients
    whose sum, and whose rows, are those of one rank."""
    results = ranks.run(3, ranks_job, 0.6)
    for case, vocab in enumerate(VOCABS):
        parts = [result[case] for result in results]
        alone = _ours(_inputs(vocab=vocab), 0.6, vocab=vocab)
        for part in parts:
            assert np.array_equal(part["logprob"], parts[0]["logprob"])
            assert np.array_equal(part["entropy"], parts[0]["entropy"])
        whole = parts[0] | {"hidden": sum(p["hidden"] for p in parts)}
        _assert_close(whole | {"weight": np.concatenate([p["weight"] for p in parts])}, alone)


def test_bfloat16_is_rounded_only_at_the_ends() -> None:
    """Against float64 of the same bfloat16 numbers: values as exact as float32, since logits are never rounded to
    bfloat16; gradients within 2 % of their largest: one rounding of the logits' gradient (0.4 %), one of the result."""
    got, want = _ours(_inputs(torch.bfloat16), 0.6), _plain(torch.float64, 0.6, _inputs(torch.bfloat16))
    values = ("logprob", "entropy")
    _assert_close({n: got[n] for n in values}, {n: want[n] for n in values})
    for name in ("hidden", "weight"):
        assert got[name].dtype == torch.bfloat16
        assert (got[name] - want[name]).abs().max() < 0.02 * want[name].abs().max()


def test_certain_tokens_and_no_tokens() -> None:
    hidden = torch.tensor([[1e4, 0.0], [0.0, 1e4]]).requires_grad_()
    weight = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [-1.0, 0.0]]).requires_grad_()
    at = torch.tensor([0, 1])
    logprob, entropy = logprob_entropy(hidden, weight, at, at, temperature=1.0, vocab=3, rank=0)
    (logprob.sum() + entropy.sum()).backward()
    assert torch.equal(logprob, torch.zeros(2))
    assert torch.equal(entropy, torch.zeros(2))
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()
    none = torch.zeros(0, dtype=torch.long)
    nothing, _ = logprob_entropy(hidden, weight, none, none, temperature=1.0, vocab=3, rank=0)
    nothing.sum().backward()  # a micro-batch without response tokens still takes part in the backward pass
    assert nothing.shape == (0,)


class _Bytes(TorchDispatchMode):
    """Operations, matrix products among them, and bytes of the tensors that they made beside `given` and that are still
    alive: now, and at most."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.now = self.peak = self.operations = self.products = 0
        self.seen = weakref.WeakSet(tensor.untyped_storage() for tensor in given)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        self.products += func is torch.ops.aten.mm.default or func is torch.ops.aten.mm.out
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
                self.peak = max(self.peak, self.now)
        return result

    def _gone(self, nbytes: int) -> None:
        self.now -= nbytes


@pytest.mark.parametrize("tokens", [64, 1024])
def test_memory_is_blocks_and_gradients(tokens: int) -> None:
    """Forward and backward take five blocks at most, whatever the tokens, beside what is of the size of hidden states
    and weights; all logits of 1,024 tokens would be 125 blocks."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, 16).requires_grad_(), torch.randn(16384, 16).requires_grad_()
    at, chunk = torch.arange(tokens), 2**19
    with _Bytes(hidden, weight, at) as used:
        logprob, entropy = logprob_entropy(
            hidden, weight, at, at, temperature=0.7, vocab=16000, rank=0, chunk_bytes=chunk
        )
        (logprob.sum() + entropy.sum()).backward()
    of_hidden_and_weight = 4 * (3 * hidden.numel() + weight.numel())
    assert used.peak < 5 * chunk + of_hidden_and_weight + 2**17


def test_an_entropy_that_nobody_uses_costs_no_backward() -> None:
    operations, gradients = [], []
    for with_entropy, used in ((False, False), (True, False), (True, True)):
        hidden, weight, index, target, *_ = _inputs()
        kwargs: dict[str, Any] = {"vocab": VOCAB, "rank": 0, "with_entropy": with_entropy, "chunk_bytes": SMALL}
        logprob, entropy = logprob_entropy(hidden.requires_grad_(), weight, index, target, temperature=1.0, **kwargs)
        total = logprob.sum() + entropy.sum() if used else logprob.sum()
        with _Bytes() as made:
            total.backward()
        operations.append(made.operations)
        gradients.append(hidden.grad)
    assert operations[1] == operations[0] + 1  # the kept entropy is looked at, once and not per block
    assert operations[2] > operations[1] + 6
    assert torch.equal(gradients[0], gradients[1])
