"""Attention over packed sequences in plain PyTorch, where Transformer Engine's is not there: on CPUs above all.

In: query, key and value of this rank's tokens, [t, heads, d], and where sequences begin. Out: [t, heads * d].
Each sequence attends by itself, so that packing changes nothing but the order of work. It stands in mcore's layer
specification where megatron's own attention would, which knows neither packing nor context parallelism.

With context parallelism of c ranks a sequence of length l (a multiple of 2c) is cut into 2c slices, of which rank r
has slices r and 2c-1-r: those of mcore's RoPE and of Transformer Engine. Keys and values are gathered from all ranks,
which suits a backend that is here to be exact rather than fast.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F


class PackedAttention(torch.nn.Module):
    """mcore's core attention for `PackedSeqParams`; causal, without dropout."""

    def __init__(self, config: Any, layer_number: int, *args: Any, pg_collection: Any, **kwargs: Any) -> None:
        super().__init__()
        del layer_number, args, kwargs  # of attention that we do not have: softmax scales, dropout, other masks
        self.context, self.heads_dim = pg_collection.cp, config.kv_channels

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None = None,  # noqa: ARG002 -- mcore passes it; causality is all there is
        *,
        packed_seq_params: Any,
        **_: Any,
    ) -> torch.Tensor:
        """
        Args:
            query: [t, heads, d], this rank's tokens of all sequences.
            key: [t, groups, d].
            value: like `key`.
            packed_seq_params: `cu_seqlens_q` over the whole sequences, padding included.
        """
        ends = packed_seq_params.cu_seqlens_q.tolist()
        lengths = [end - start for start, end in itertools.pairwise(ends)]
        ranks = self.context.size()
        if ranks == 1:
            parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
            return torch.cat([_attend(q, k, v, is_causal=True) for q, k, v in parts])
        keys, values = (_whole(x, lengths, self.context) for x in (key, value))
        rank, output = self.context.rank(), []
        local = query.split([length // ranks for length in lengths])
        for length, q, k, v in zip(lengths, local, keys.split(lengths), values.split(lengths), strict=True):
            width = length // (2 * ranks)
            for part, slot in zip(q.split(width), (rank, 2 * ranks - 1 - rank), strict=True):
                end = (slot + 1) * width
                mask = torch.ones(width, end, dtype=torch.bool, device=q.device).tril(slot * width)
                output.append(_attend(part, k[:end], v[:end], attn_mask=mask))
        return torch.cat(output)


def slices_of(length: int, rank: int, ranks: int) -> list[range]:
    """Which positions of a sequence a context rank has, in its order; all of them when it is alone."""
    if ranks == 1:
        return [range(length)]
    width = length // (2 * ranks)
    return [range(slot * width, (slot + 1) * width) for slot in (rank, 2 * ranks - 1 - rank)]


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **mask: Any) -> torch.Tensor:
    """[tokens, heads, d] of one sequence -> [tokens, heads * d]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    output = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **mask)
    return output[0].transpose(0, 1).reshape(len(query), -1)


def _whole(x: torch.Tensor, lengths: list[int], group: Any) -> torch.Tensor:
    """All ranks' tokens in the order of the sequences; the gradient goes back to the ranks, summed."""
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    ranks = group.size()
    gathered = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)
    offset, order = 0, torch.empty(sum(lengths), dtype=torch.long)
    for length in lengths:
        start = offset
        for rank in range(ranks):
            mine = torch.tensor([p for part in slices_of(length, rank, ranks) for p in part])
            first = rank * len(x) + start // ranks
            order[start + mine] = torch.arange(first, first + length // ranks)
        offset += length
    return gathered[order.to(x.device)]
