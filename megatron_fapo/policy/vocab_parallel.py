"""Log-probabilities and entropy of chosen tokens from logits that are split over tensor ranks.

Shapes: N tokens, M positions, V this rank's vocabulary rows. Arithmetic is float32 whatever the logits' type, a few
rows at a time: a float32 copy of all logits (150,000 rows of vocabulary) would be the largest tensor of the whole step,
several times over.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

_CHUNK_ELEMENTS = 2**26
"""Logits worked on at once: 256 MiB in float32."""


class _LogprobEntropy(torch.autograd.Function):
    """Both results, and a backward that works the softmax out again instead of keeping it.

    d logprob / d x = onehot - p;  d H / d x = -p (log p + H), with x = logits / temperature.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_MV: torch.Tensor,
        index_N: torch.Tensor,
        target_N: torch.Tensor,
        temperature: float,
        valid: int,
        first_row: int,
        group: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def reduce(value: torch.Tensor, op: Any = torch.distributed.ReduceOp.SUM) -> torch.Tensor:
            if group is not None and group.size() > 1:
                torch.distributed.all_reduce(value, op=op, group=group)
            return value

        count = len(index_N)
        max_N, z_N, logprob_N, entropy_N = (torch.empty(count, device=logits_MV.device) for _ in range(4))
        local_N = target_N - first_row
        here_N = (local_N >= 0) & (local_N < valid)
        for part in _chunks(count, logits_MV.shape[1]):
            x = logits_MV[index_N[part], :valid].float() / temperature
            largest = x.max(dim=1).values if valid else x.new_full((len(x),), -torch.inf)
            largest = reduce(largest, torch.distributed.ReduceOp.MAX)
            x -= largest[:, None]
            at = local_N[part].clamp(0, max(valid - 1, 0))[:, None]
            target_x = x.gather(1, at)[:, 0] if valid else x.new_zeros(len(x))
            target_x = reduce(torch.where(here_N[part], target_x, 0.0))
            p = x.exp()
            z = reduce(p.sum(dim=1))
            mean_x = reduce(p.mul_(x).sum(dim=1)) / z
            max_N[part], z_N[part] = largest, z
            logprob_N[part] = target_x - z.log()
            entropy_N[part] = z.log() - mean_x
        ctx.save_for_backward(logits_MV, index_N, local_N, here_N, max_N, z_N, entropy_N)
        ctx.temperature, ctx.valid = temperature, valid
        return logprob_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        grad_logprob_N, grad_entropy_N = grads
        logits_MV, index_N, local_N, here_N, max_N, z_N, entropy_N = ctx.saved_tensors
        valid, with_entropy = ctx.valid, bool((grad_entropy_N != 0).any())
        grad_MV = torch.zeros_like(logits_MV)
        for part in _chunks(len(index_N), logits_MV.shape[1]):
            x = logits_MV[index_N[part], :valid].float() / ctx.temperature - max_N[part, None]
            p = x.exp() / z_N[part, None]
            grad = -p * grad_logprob_N[part, None]
            if valid:
                at = local_N[part].clamp(0, valid - 1)[:, None]
                grad.scatter_add_(1, at, torch.where(here_N[part], grad_logprob_N[part], 0.0)[:, None])
            if with_entropy:
                # p log p is 0 at p = 0, where log p is not a number that may be multiplied.
                p_log_p = torch.where(p > 0, p * p.clamp_min(1e-45).log(), 0.0)
                grad -= (p_log_p + p * entropy_N[part, None]) * grad_entropy_N[part, None]
            grad_MV[index_N[part], :valid] = (grad / ctx.temperature).to(grad_MV.dtype)
        return grad_MV, None, None, None, None, None, None


def _chunks(count: int, width: int) -> Iterator[slice]:
    """Slices of rows, the same on every tensor rank: `width` is the padded vocabulary slice, equal on all."""
    rows = max(1, _CHUNK_ELEMENTS // width)
    return (slice(start, start + rows) for start in range(0, count, rows))


def logprob_entropy(
    logits_MV: torch.Tensor,
    index_N: torch.Tensor,
    target_N: torch.Tensor,
    *,
    temperature: float,
    vocab: int,
    rank: int,
    group: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of `target_N` and entropy, of softmax(logits / temperature) over the first `vocab` rows.

    Args:
        logits_MV: this tensor rank's slice of the logits of all positions, padded rows included.
        index_N: the position that predicts each token; no position twice.
        target_N: token ids in [0, vocab).
        temperature: the sampling temperature, so that both sides speak of the distribution that was sampled.
        vocab: rows that stand for tokens; padded rows beyond leave the softmax, else they would take probability.
        rank: this rank's index in `group`.
        group: tensor-parallel process group; None for one rank.

    Returns:
        (logprob_N, entropy_N), float32, differentiable.
    """
    first_row = rank * logits_MV.shape[1]
    valid = max(0, min(logits_MV.shape[1], vocab - first_row))
    return _LogprobEntropy.apply(logits_MV, index_N, target_N, temperature, valid, first_row, group)
