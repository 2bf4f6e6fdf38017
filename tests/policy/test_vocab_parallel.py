"""Log-probabilities and entropy against log_softmax and autograd of the plain formula."""

from __future__ import annotations

import pytest
import torch

from megatron_fapo.policy import vocab_parallel
from megatron_fapo.policy.vocab_parallel import logprob_entropy


def _plain(logits: torch.Tensor, target: torch.Tensor, temperature: float, vocab: int) -> tuple[torch.Tensor, ...]:
    logp = (logits[:, :vocab].double() / temperature).log_softmax(-1)
    return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.2])
def test_values_and_gradients(temperature: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`rows` at a time: the chunks must not show."""
    torch.manual_seed(0)
    logits = (torch.randn(9, 40) * 4).requires_grad_()
    target, vocab = torch.randint(0, 37, (6,)), 37
    weight, entropy_weight = torch.randn(6), torch.randn(6)
    index = torch.tensor([8, 2, 5, 0, 7, 1])
    monkeypatch.setattr(vocab_parallel, "_CHUNK_ELEMENTS", 40 * rows)
    logprob, entropy = logprob_entropy(logits, index, target, temperature=temperature, vocab=vocab, rank=0)
    expected, expected_entropy = _plain(logits[index], target, temperature, vocab)
    torch.testing.assert_close(logprob.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=1e-5)
    (got,) = torch.autograd.grad((logprob * weight + entropy * entropy_weight).sum(), logits, retain_graph=True)
    (want,) = torch.autograd.grad((expected * weight + expected_entropy * entropy_weight).sum(), logits)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not got[:, vocab:].any()  # padded rows take no probability and get no gradient


def test_certain_tokens_and_no_tokens() -> None:
    logits = torch.tensor([[0.0, -1e4, -1e4], [-1e4, 1e4, 0.0]]).requires_grad_()
    logprob, entropy = logprob_entropy(
        logits, torch.tensor([0, 1]), torch.tensor([0, 1]), temperature=1.0, vocab=3, rank=0
    )
    (logprob.sum() + entropy.sum()).backward()
    assert torch.equal(logprob, torch.zeros(2))
    assert torch.equal(entropy, torch.zeros(2))
    assert torch.isfinite(logits.grad).all()
    none = torch.zeros(0, dtype=torch.long)
    nothing, _ = logprob_entropy(torch.zeros(4, 3), none, none, temperature=1.0, vocab=3, rank=0)
    assert nothing.shape == (0,)
