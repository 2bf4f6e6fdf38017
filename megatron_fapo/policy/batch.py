"""A micro-batch as tensors: samples packed into one row, cut for this context rank.

In: the samples of one micro-batch (`policy/packing.py` decides which). Out: one `MicroBatch`.

Invariants (asserted by the tests)
- samples lie one after the other, and attention ends at their bounds; padding is a tail of the sample before it, which
  no token of a sample can see;
- response token j of a sample is predicted from the position before it, and only there: over the context ranks every
  response token is predicted exactly once.

Shapes: T tokens of the pack, t = T / context ranks of this rank, N response tokens that this rank predicts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from megatron_fapo.policy.attention import slices_of

Numbers = Any
"""A sequence of numbers; a sample makes an array of it. As Python numbers, samples would be sent to the ranks, and
packed there, one number at a time."""


@dataclass(frozen=True, eq=False)
class TrainSample:
    """One sample as the policy needs it."""

    prompt_ids: Numbers
    response_ids: Numbers
    advantage: float = 0.0
    old_logprobs: Numbers | None = None
    """By the policy itself as it was when the step began, one per response token. None: it is so still, and the forward
    pass of training gives them."""
    behaviour_logprobs: Numbers | None = None
    """The same tokens as the rollout engine saw them."""
    reference_logprobs: Numbers | None = None
    versions: tuple[tuple[int, int], ...] = ((0, 0),)
    """Whose weights the engine had (data.records.Sample.versions)."""

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "response_ids", "old_logprobs", "behaviour_logprobs", "reference_logprobs"):
            if (value := getattr(self, name)) is not None:
                kind = np.int32 if name.endswith("ids") else np.float32
                object.__setattr__(self, name, np.asarray(value, dtype=kind))

    @property
    def token_ids(self) -> np.ndarray[Any, Any]:
        return np.concatenate([self.prompt_ids, self.response_ids])

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class Padding:
    """What lengths must be multiples of."""

    sequence: int = 1
    """Of every sample: twice the context ranks, if there are several."""
    total: int = 1
    """Of the pack: what sequence parallelism splits and FP8 products ask for."""

    @classmethod
    def of(cls, *, context: int, tensor: int, fp8: bool) -> Padding:
        """
        Args:
            tensor: ranks that split activations along the sequence; 1 without sequence parallelism.
            fp8: a rank's tokens must be a multiple of 16, after they were split.
        """
        sequence = 1 if context == 1 else 2 * context
        return cls(sequence, math.lcm(sequence, context * tensor * (16 if fp8 else 1)))


@dataclass(frozen=True)
class MicroBatch:
    """One forward-backward pass of a rank. Per-token tensors are flat over the response tokens that it predicts."""

    tokens_1t: torch.Tensor
    cu_seqlens: torch.Tensor
    """Where the samples begin in the pack, and its end: int32, over all context ranks."""
    longest: int
    index_N: torch.Tensor
    """Which of this rank's positions predicts each response token."""
    place_N: torch.Tensor
    """Which response token of the micro-batch it is, counted over all samples and context ranks."""
    target_N: torch.Tensor
    advantage_N: torch.Tensor
    old_N: torch.Tensor | None
    behaviour_N: torch.Tensor | None
    reference_N: torch.Tensor | None
    response_lengths: tuple[int, ...]
    """Of every sample; () of a micro-batch without samples, which carries no loss."""

    def packed_seq_params(self) -> Any:
        from megatron.core.packed_seq_params import PackedSeqParams

        ends, longest = self.cu_seqlens, self.longest
        return PackedSeqParams("thd", ends, ends, max_seqlen_q=longest, max_seqlen_kv=longest)


def padded_lengths(lengths: Sequence[int], padding: Padding) -> list[int]:
    """What samples of these lengths take in a pack; the last one also has what the pack itself needs."""
    padded = [-(-length // padding.sequence) * padding.sequence for length in lengths]
    padded[-1] += -sum(padded) % padding.total
    return padded


def build_micro_batch(
    samples: Sequence[TrainSample], padding: Padding, *, device: str, rank: int = 0, ranks: int = 1
) -> MicroBatch:
    """
    Args:
        samples: in the order of the pack. None: this data-parallel rank has fewer samples than the others, and joins
            their collectives with one token that carries no loss.
        padding: what lengths are padded to.
        device: where the tensors go.
        rank: this context rank.
        ranks: context ranks.
    """
    padded = padded_lengths([s.tokens for s in samples] or [1], padding)
    ends = [0, *itertools.accumulate(padded)]
    row = np.zeros(ends[-1], dtype=np.int64)
    for start, s in zip(ends, samples, strict=False):
        row[start : start + s.tokens] = s.token_ids
    tokens_T = torch.from_numpy(row)

    parts = [(start, part) for i, start in enumerate(ends[:-1]) for part in slices_of(padded[i], rank, ranks)]
    mine = torch.cat([torch.arange(start + part.start, start + part.stop) for start, part in parts])
    local_T = torch.full((ends[-1],), -1)
    local_T[mine] = torch.arange(len(mine))
    counts = [len(s.response_ids) for s in samples]
    first = [start + len(s.prompt_ids) - 1 for start, s in zip(ends, samples, strict=False)]
    spans = [torch.arange(start, start + count) for start, count in zip(first, counts, strict=True)]
    index_M = local_T[torch.cat([torch.empty(0, dtype=torch.long), *spans])]
    place_N = (index_M >= 0).nonzero()[:, 0]

    def send(tensor: torch.Tensor) -> torch.Tensor:
        # A copy from memory that is not pinned waits until the GPU has done all it was given, which leaves it idle
        # while the host prepares the micro-batch.
        return tensor if device == "cpu" else tensor.pin_memory().to(device, non_blocking=True)

    def flat(name: str, dtype: type = np.float32) -> torch.Tensor | None:
        values = [getattr(s, name) for s in samples]
        if any(value is None for value in values):
            return None
        return send(torch.from_numpy(np.concatenate([np.empty(0, dtype), *values]))[place_N])

    target_N = flat("response_ids", np.int64)
    assert target_N is not None
    advantage_M = torch.tensor([s.advantage for s in samples]).repeat_interleave(torch.tensor(counts, dtype=torch.long))
    return MicroBatch(
        tokens_1t=send(tokens_T[mine][None]),
        cu_seqlens=send(torch.tensor(ends, dtype=torch.int32)),
        longest=max(padded),
        index_N=send(index_M[place_N]),
        place_N=send(place_N),
        target_N=target_N,
        advantage_N=send(advantage_M[place_N]),
        old_N=flat("old_logprobs"),
        behaviour_N=flat("behaviour_logprobs"),
        reference_N=flat("reference_logprobs"),
        response_lengths=tuple(counts),
    )


def set_logprobs(samples: Sequence[TrainSample], name: str, values: Sequence[Numbers]) -> list[TrainSample]:
    """The samples with `old_logprobs` or `reference_logprobs` filled in."""
    return [replace(s, **{name: v}) for s, v in zip(samples, values, strict=True)]
