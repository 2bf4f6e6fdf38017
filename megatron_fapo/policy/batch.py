"""From samples to micro-batches: pure decisions, no processes.

In: training samples of one global mini-batch. Out: per data-parallel rank, micro-batches as tensors.

Invariants (asserted by the tests)
- every sample is in exactly one micro-batch of exactly one data-parallel rank;
- a micro-batch holds at most `max_tokens` tokens, padding included, unless a single sample is longer;
- every rank has at least one micro-batch: a rank without samples gets a filler that carries no loss;
- response token j of a sample is predicted from the position before it, and only there.

Shapes: B samples, T padded length, N response tokens of the micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True)
class TrainSample:
    """One sample as the policy needs it."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    advantage: float = 0.0
    old_logprobs: tuple[float, ...] | None = None
    """By the policy itself under the weights that the rollout was sampled with; one per response token."""
    behaviour_logprobs: tuple[float, ...] | None = None
    """The same tokens as the rollout engine saw them."""
    reference_logprobs: tuple[float, ...] | None = None
    filler: bool = False
    """Present only so that a rank has something to compute; carries no loss."""

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class MicroBatch:
    """One forward-backward pass. Per-token tensors are flat over the response tokens of all samples."""

    tokens_BT: torch.Tensor
    positions_BT: torch.Tensor
    index_N: torch.Tensor
    """Row of the flattened [B*T] logits that predicts each response token."""
    target_N: torch.Tensor
    advantage_N: torch.Tensor
    old_N: torch.Tensor | None = None
    behaviour_N: torch.Tensor | None = None
    reference_N: torch.Tensor | None = None
    samples: tuple[int, ...] = field(default=())
    """Which samples of the rank's list these are, in order."""
    response_lengths: tuple[int, ...] = field(default=())


def split_over_data_ranks(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Deal samples to ranks, longest first in snake order, so that ranks get equal counts and near-equal tokens."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for place, sample in enumerate(order):
        lap, slot = divmod(place, ranks)
        dealt[slot if lap % 2 == 0 else ranks - 1 - slot].append(sample)
    return [sorted(part) for part in dealt]


def plan_micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group samples of like length so that (count x longest) stays within `max_tokens`."""
    batches: list[list[int]] = []
    current: list[int] = []
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[current[0]] if current else lengths[sample]
        if current and (len(current) + 1) * longest > max_tokens:
            batches.append(current)
            current = []
        current.append(sample)
    return [*batches, current] if current else batches


def build_micro_batches(
    samples: Sequence[TrainSample], max_tokens: int, multiple: int, device: str
) -> list[MicroBatch]:
    """Tensors for one data-parallel rank.

    Args:
        samples: this rank's samples; must not be empty (use `with_filler`).
        max_tokens: padded tokens of one micro-batch.
        multiple: padded length is a multiple of this (sequence parallelism splits it over tensor ranks).
        device: where the tensors go.
    """
    plan = plan_micro_batches([s.tokens for s in samples], max_tokens)
    return [_micro_batch([samples[i] for i in part], tuple(part), multiple, device) for part in plan]


def with_filler(samples: Sequence[TrainSample]) -> list[TrainSample]:
    """Samples of a rank, or one filler when there are none: every rank must join the collectives."""
    return list(samples) or [TrainSample(prompt_ids=(0,), response_ids=(0,), filler=True)]


def _micro_batch(samples: list[TrainSample], which: tuple[int, ...], multiple: int, device: str) -> MicroBatch:
    width = -(-max(s.tokens for s in samples) // multiple) * multiple
    tokens_BT = torch.zeros(len(samples), width, dtype=torch.long)
    for row, sample in enumerate(samples):
        tokens_BT[row, : sample.tokens] = torch.tensor(sample.prompt_ids + sample.response_ids)
    lossy = [(row, s) for row, s in enumerate(samples) if not s.filler]

    def flat(name: str) -> torch.Tensor | None:
        values = [getattr(s, name) for _, s in lossy]
        if any(v is None for v in values):
            return None
        return torch.tensor([x for v in values for x in v], dtype=torch.float32, device=device)

    starts = [row * width + len(s.prompt_ids) - 1 for row, s in lossy]
    index = [start + j for start, (_, s) in zip(starts, lossy, strict=True) for j in range(len(s.response_ids))]
    return MicroBatch(
        tokens_BT=tokens_BT.to(device),
        positions_BT=torch.arange(width, device=device).expand(len(samples), width),
        index_N=torch.tensor(index, dtype=torch.long, device=device),
        target_N=torch.tensor([t for _, s in lossy for t in s.response_ids], dtype=torch.long, device=device),
        advantage_N=torch.tensor(
            [s.advantage for _, s in lossy for _ in s.response_ids], dtype=torch.float32, device=device
        ),
        old_N=flat("old_logprobs"),
        behaviour_N=flat("behaviour_logprobs"),
        reference_N=flat("reference_logprobs"),
        samples=which,
        response_lengths=tuple(0 if s.filler else len(s.response_ids) for s in samples),
    )


def set_logprobs(samples: Sequence[TrainSample], name: str, values: Sequence[Sequence[float]]) -> list[TrainSample]:
    """The samples with `old_logprobs` or `reference_logprobs` filled in."""
    return [replace(s, **{name: tuple(v)}) for s, v in zip(samples, values, strict=True)]  # type: ignore[arg-type]
