"""Log-probabilities and entropy of chosen tokens from logits that are split over tensor ranks.

Shapes: N tokens, V this rank's vocabulary rows. Everything is float32 whatever the logits' type.
"""

from __future__ import annotations

from typing import Any

import torch


class _LogprobEntropy(torch.autograd.Function):
    """One pass, one saved [N, V] tensor (the softmax), both results.

    d logprob / d x = onehot - p;  d H / d x = -p (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any, x_NV: torch.Tensor, target_N: torch.Tensor, first_row: int, group: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        distributed = group is not None and group.size() > 1

        def reduce(value: torch.Tensor, op: Any = torch.distributed.ReduceOp.SUM) -> torch.Tensor:
            if distributed:
                torch.distributed.all_reduce(value, op=op, group=group)
            return value

        rows = x_NV.shape[1]
        max_N = x_NV.max(dim=1).values if rows else x_NV.new_full((x_NV.shape[0],), -torch.inf)
        max_N = reduce(max_N, torch.distributed.ReduceOp.MAX)
        x_NV = x_NV - max_N[:, None]
        local_N = target_N - first_row
        here_N = (local_N >= 0) & (local_N < rows)
        index_N1 = local_N.clamp(0, max(rows - 1, 0))[:, None]
        target_x_N = reduce(torch.where(here_N, x_NV.gather(1, index_N1)[:, 0], 0.0))
        p_NV = x_NV.exp()
        z_N = reduce(p_NV.sum(dim=1))
        mean_x_N = reduce((p_NV * x_NV).sum(dim=1)) / z_N
        log_z_N = z_N.log()
        entropy_N = log_z_N - mean_x_N
        p_NV /= z_N[:, None]
        ctx.save_for_backward(p_NV, here_N, index_N1, entropy_N)
        return target_x_N - log_z_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        grad_logprob_N, grad_entropy_N = grads
        p_NV, here_N, index_N1, entropy_N = ctx.saved_tensors
        grad_NV = -p_NV * grad_logprob_N[:, None]
        grad_NV.scatter_add_(1, index_N1, torch.where(here_N, grad_logprob_N, 0.0)[:, None])
        if bool((grad_entropy_N != 0).any()):
            # p log p is 0 at p = 0, where log p is not a number that may be multiplied.
            p_log_p_NV = torch.where(p_NV > 0, p_NV * p_NV.clamp_min(1e-45).log(), 0.0)
            grad_NV -= (p_log_p_NV + p_NV * entropy_N[:, None]) * grad_entropy_N[:, None]
        return grad_NV, None, None, None


def logprob_entropy(
    logits_NV: torch.Tensor, target_N: torch.Tensor, *, temperature: float, vocab: int, rank: int, group: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of `target_N` and entropy, of softmax(logits / temperature) over the first `vocab` rows.

    Args:
        logits_NV: this tensor rank's slice of the logits, padded rows included.
        target_N: token ids in [0, vocab).
        temperature: the sampling temperature, so that both sides speak of the distribution that was sampled.
        vocab: rows that stand for tokens; padded rows beyond leave the softmax, else they would take probability.
        rank: this rank's index in `group`.
        group: tensor-parallel process group; None for one rank.

    Returns:
        (logprob_N, entropy_N), float32, differentiable.
    """
    first_row = rank * logits_NV.shape[1]
    valid = max(0, min(logits_NV.shape[1], vocab - first_row))
    x_NV = logits_NV[:, :valid].float() / temperature
    return _LogprobEntropy.apply(x_NV, target_N, first_row, group)
