"""Log-probabilities and entropy of chosen tokens straight from hidden states: the logits never exist at once.

With a vocabulary of 150,000 rows the logits of one packed micro-batch would be the largest tensor of the step. Here
only the positions that predict a response token are projected, a block of vocabulary rows at a time, and the backward
works each block out again from what the forward kept, two numbers per token; or it takes the logits themselves, where
there is room to keep them (`keep`), which is a product less and the same bits.

Blocks are of the vocabulary, not of tokens: so each row of the weight's gradient is one product over all tokens, summed
in float32 inside the product and written once in the weight's type. Blocks of tokens would add the gradient of the
whole weight together in float32 once per block.

vLLM (0.26) projects and, in its GPU runner, divides by the temperature in the model's type, so a bfloat16 engine's
log-probabilities are those of logits rounded once or twice; `head_dtype: float32` among its hf_overrides makes its
logits float32 throughout, which is what is computed here.

Shapes: M positions of the micro-batch, H hidden, V this rank's vocabulary rows, N tokens, K parts that are merged,
B vocabulary rows of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 2**28
"""Of one block of logits in float32."""


def logprob_entropy(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    index_N: Tensor,
    target_N: Tensor,
    *,
    temperature: float,
    vocab: int,
    rank: int,
    group: Any = None,
    with_entropy: bool = True,
    chunk_bytes: int = CHUNK_BYTES,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of `target_N` and entropy, of softmax(hidden @ weight.T / temperature) over `vocab` rows.

    Logits, softmax and results are float32 also where hidden states and weights are bfloat16, and the temperature
    divides the float32 logits. The gradient of `hidden_MH` is this rank's part: the caller sums it over `group`.
    Beside its gradients a call takes up to five times `chunk_bytes`, and 8 bytes for each of the N x H hidden states.

    Args:
        hidden_MH: final hidden states of all positions, the same on every rank of `group`.
        weight_VH: this rank's rows of the output layer, padded rows included.
        index_N: the position that predicts each token.
        target_N: token ids in [0, vocab).
        temperature: the sampling temperature, so that both sides speak of the distribution that was sampled.
        vocab: rows of all ranks that stand for tokens; padded rows beyond would take probability.
        rank: this rank's index in `group`.
        group: tensor-parallel process group; None for one rank.
        with_entropy: False leaves the entropy out (None).
        chunk_bytes: of a block of float32 logits; results do not depend on it beyond rounding.
        keep: all blocks from forward to backward: 4 bytes per token and row.

    Returns:
        (logprob_N, entropy_N), float32, in nats; differentiable in `hidden_MH` and `weight_VH`.
    """
    return _LogprobEntropy.apply(
        hidden_MH, weight_VH, index_N, target_N, temperature, vocab, rank, group, with_entropy, chunk_bytes,
        keep and torch.is_grad_enabled(),
    )  # fmt: skip


class _LogprobEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: Tensor,
        weight_VH: Tensor,
        index_N: Tensor,
        target_N: Tensor,
        temperature: float,
        vocab: int,
        rank: int,
        group: Any,
        with_entropy: bool,
        chunk_bytes: int,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        hidden_NH = hidden_MH[index_N]
        local_N = target_N - rank * len(weight_VH)
        rows = max(0, min(len(weight_VH), vocab - rank * len(weight_VH)))
        if not len(index_N):  # a shape of its own to compile for
            rows = 0
        blocks = list(_blocks(rows, len(index_N), hidden_MH.shape[1], chunk_bytes))
        add_block = _fused(_add_block, hidden_MH)
        merged = _nothing(hidden_NH)  # a rank whose rows are all padded has no block
        ctx.kept = []
        for block in blocks:
            logits_NB = _product(hidden_NH, weight_VH[block].T)
            merged = add_block(merged, logits_NB, local_N - block.start, temperature, with_entropy)
            if keep:
                ctx.kept.append(logits_NB)
            del logits_NB  # before the next block is made
        if group is not None and group.size() > 1:
            everyone = merged.new_empty(group.size() * 4, len(index_N))
            torch.distributed.all_gather_into_tensor(everyone, merged, group=group)
            merged = _merge(everyone.view(group.size(), 4, len(index_N)))
        largest_N, z_N, s_N, target_x_N = merged
        logprob_N = target_x_N - largest_N - z_N.log()
        entropy_N = z_N.log() - s_N / z_N if with_entropy else None
        ctx.save_for_backward(hidden_MH, weight_VH, index_N, local_N, largest_N + z_N.log(), entropy_N)
        ctx.temperature, ctx.blocks, ctx.rows = temperature, blocks, rows
        ctx.set_materialize_grads(False)  # an unused entropy then has no gradient, rather than zeros to work with
        return logprob_N, entropy_N

    @staticmethod
    def backward(ctx: Any, grad_logprob_N: Tensor | None, grad_entropy_N: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_MH, weight_VH, index_N, local_N, log_z_N, entropy_N = ctx.saved_tensors
        hidden_NH = hidden_MH[index_N]
        if grad_logprob_N is None:
            grad_logprob_N = torch.zeros_like(log_z_N)
        grad_NH = torch.zeros_like(hidden_NH, dtype=torch.float32)
        grad_weight_VH = torch.empty_like(weight_VH)
        grad_weight_VH[ctx.rows :] = 0
        gradient = _fused(_gradient, hidden_MH)
        for block in ctx.blocks:
            logits_NB = ctx.kept.pop(0) if ctx.kept else _product(hidden_NH, weight_VH[block].T)
            at_N, dtype = local_N - block.start, hidden_NH.dtype
            grad_NB = gradient(
                logits_NB, at_N, log_z_N, entropy_N, grad_logprob_N, grad_entropy_N, ctx.temperature, dtype
            )
            del logits_NB
            torch.mm(grad_NB.T, hidden_NH, out=grad_weight_VH[block])
            _add_product(grad_NH, grad_NB, weight_VH[block])
            del grad_NB
        grad_MH = torch.zeros_like(hidden_MH)
        return grad_MH.index_add_(0, index_N, grad_NH.to(grad_MH.dtype)), grad_weight_VH, *(None,) * 9


def _blocks(rows: int, tokens: int, hidden: int, chunk_bytes: int) -> Iterator[slice]:
    """Vocabulary rows, so many that neither their logits nor their weights exceed `chunk_bytes` in float32; a multiple
    of 128, in which matrix units work."""
    size = max(1, chunk_bytes // (4 * max(tokens, hidden)) // 128) * 128
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, nothing rounded to the type of `a` and `b` on the way."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, as exact; within the product where it can be: every block reads and writes the whole sum."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += _product(a, b)


def _fused(function: Callable[..., Tensor], like: Tensor) -> Callable[..., Tensor]:
    """Compiled on GPUs, where each operation of its own would read and write a whole block of logits."""
    return _compiled(function) if like.is_cuda else function


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=True)


def _nothing(hidden_NH: Tensor) -> Tensor:
    """[4, N] of no columns, as `_add_block` has it. The largest is finite: infinities have no difference."""
    nothing = hidden_NH.new_zeros(4, len(hidden_NH), dtype=torch.float32)
    nothing[0] = torch.finfo(torch.float32).min
    nothing[3] = -torch.inf
    return nothing


def _add_block(before_4N: Tensor, logits_NB: Tensor, at_N: Tensor, temperature: float, with_entropy: bool) -> Tensor:
    """[4, N] of x = logits / temperature over the columns so far and these: the largest m, z = sum exp(x - m),
    s = sum (x - m) exp(x - m) or zeros, and x at column `at_N`, -inf until it has come."""
    x = logits_NB / temperature
    largest = x.amax(1)
    inside = (at_N >= 0) & (at_N < x.shape[1])
    target_x = torch.where(inside, x.gather(1, at_N.clamp(0, x.shape[1] - 1)[:, None])[:, 0], -torch.inf)
    x -= largest[:, None]
    p = x.exp()
    z = p.sum(1)
    s = p.mul_(x).sum(1) if with_entropy else torch.zeros_like(z)
    return _merge(torch.stack((before_4N, torch.stack((largest, z, s, target_x)))))


def _merge(parts_K4N: Tensor) -> Tensor:
    """Statistics of disjoint sets of columns -> of their union. Exponents are never positive, so nothing overflows."""
    largest, z, s, target_x = parts_K4N.unbind(1)
    top = largest.amax(0)
    shift = largest - top
    scale = shift.exp()
    return torch.stack((top, (z * scale).sum(0), ((s + z * shift) * scale).sum(0), target_x.amax(0)))


def _gradient(
    logits_NB: Tensor,
    at_N: Tensor,
    log_z_N: Tensor,
    entropy_N: Tensor | None,
    grad_logprob_N: Tensor,
    grad_entropy_N: Tensor | None,
    temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    """Of the logits, in `dtype`: d logprob / d x = onehot - p; d entropy / d x = -p (log p + entropy)."""
    log_p = logits_NB / temperature
    log_p -= log_z_N[:, None]
    p = log_p.exp()
    if grad_entropy_N is None:
        p *= grad_logprob_N[:, None]
    else:
        assert entropy_N is not None
        log_p += entropy_N[:, None]
        p *= log_p.mul_(grad_entropy_N[:, None]).add_(grad_logprob_N[:, None])
    columns = torch.arange(p.shape[1], device=p.device)
    grad = torch.where(columns == at_N[:, None], grad_logprob_N[:, None], 0.0)
    return grad.sub_(p).div_(temperature).to(dtype)
