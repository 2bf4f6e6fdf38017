"""Which sample goes into which micro-batch of which data rank: pure decisions on lengths, no tensors.

A micro-batch is one packed row of whole sequences. Data ranks wait for each other at every update, stages of a pipeline
(and ranks that share experts) at every micro-batch, so both are made equal in compute rather than in tokens.

Invariants (asserted by the tests)
- every sample is in exactly one micro-batch of exactly one data rank;
- a micro-batch holds at most `max_tokens`, padding of its sequences included, unless it is one longer sample alone;
- all data ranks have equally many micro-batches, at least one, a multiple of `count_multiple`;
- a micro-batch is empty only if there are fewer samples than micro-batches; the caller puts a filler there;
- a rank's costliest micro-batch comes first: what does not fit in memory fails at once, not hours later;
- equal input gives an equal schedule.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_fapo.config.policy import ParallelConfig
from megatron_fapo.policy.flops import head_flops, layer_flops
from megatron_fapo.policy.hf_config import ModelShape


@dataclass(frozen=True)
class CostModel:
    """Compute of a sequence relative to that of one token: l + quadratic * l^2."""

    quadratic: float
    """FLOPs of attention scores over all other FLOPs, for a token of a sequence of length one."""

    @classmethod
    def from_shape(cls, shape: ModelShape) -> CostModel:
        """Of a model: its layers and its output layer."""
        linear = layer_flops(shape, 1, 0) + head_flops(shape, 1)
        return cls((layer_flops(shape, 1, 1) - layer_flops(shape, 1, 0)) / linear)

    def of(self, tokens: int) -> float:
        return tokens + self.quadratic * tokens * tokens


@dataclass(frozen=True)
class Schedule:
    """Micro-batches of all data ranks."""

    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    """[data rank][micro-batch] -> indexes of samples."""


@dataclass(frozen=True)
class Waste:
    """What a schedule loses, as shares."""

    total: float
    """Of all data ranks' time from first to last micro-batch, what is not spent on the samples' own compute: waiting
    for the costliest rank, and padding."""
    floor: float
    """Of `total`, what no schedule avoids: the costliest sample alone takes longer than the mean rank."""
    lockstep: float
    """Like `total`, if ranks also wait for each other at every micro-batch, as ranks that share experts do."""
    micro_batches: float
    """1 - mean over largest cost of a micro-batch: how much shorter than the longest the others are in a pipeline."""
    padding: float
    """Of the tokens, those that are padding."""
    fill: float
    """Tokens (padding included) of the most that the micro-batches may hold."""


def schedule(
    lengths: Sequence[int],
    *,
    data_ranks: int,
    max_tokens: int,
    cost: CostModel,
    count_multiple: int = 1,
    round_to: int = 1,
) -> Schedule:
    """Deal samples to data ranks and micro-batches, as few micro-batches as the placing below finds room for.

    Args:
        lengths: tokens of each sample, prompt and response; at least 1.
        max_tokens: most tokens of a micro-batch.
        count_multiple: a rank's number of micro-batches is a multiple of this (interleaved pipelines need it).
        round_to: each sequence is padded to a multiple of this (context parallelism cuts it into equal parts).
    """
    tokens = [-(-length // round_to) * round_to for length in lengths]
    costs = [cost.of(n) for n in tokens]
    alone = sum(n > max_tokens for n in tokens)
    least = alone + -(-sum(n for n in tokens if n <= max_tokens) // max_tokens)

    def whole(micro_batches: int) -> int:
        """Per rank, when so many are needed in all."""
        return max(1, -(-micro_batches // (data_ranks * count_multiple))) * count_multiple

    count = whole(least)
    while True:
        placed, left = _place(tokens, costs, data_ranks, count, max_tokens)
        if not left:
            break
        # What found no room needs at least this many more; one by one would take thousands of attempts when every
        # sample is a little over half of `max_tokens`.
        more = -(-sum(min(tokens[i], max_tokens) for i in left) // max_tokens)
        count = whole(count * data_ranks + more)
    ordered = [sorted(rank, key=lambda part: (-sum(costs[i] for i in part), part)) for rank in placed]
    return Schedule(tuple(tuple(tuple(part) for part in rank) for rank in ordered))


def schedule_for(parallel: ParallelConfig, cost: CostModel, lengths: Sequence[int], max_tokens: int) -> Schedule:
    """The schedule that a layout asks for."""
    return schedule(
        lengths,
        data_ranks=parallel.data,
        max_tokens=max_tokens,
        cost=cost,
        count_multiple=parallel.pipeline if parallel.virtual_pipeline > 1 else 1,
        round_to=2 * parallel.context if parallel.context > 1 else 1,
    )


def _place(
    tokens: list[int], costs: list[float], ranks: int, count: int, max_tokens: int
) -> tuple[list[list[list[int]]], list[int]]:
    """(samples of `count` micro-batches of each rank, samples that found no room).

    Costliest first, to the rank with least to do that has room, there into the micro-batch with least to do that has
    room. Lengths fall, so a micro-batch that is too full for one sample is looked at again only when samples have
    become short enough for it.
    """
    placed: list[list[list[int]]] = [[[] for _ in range(count)] for _ in range(ranks)]
    load, held = [0.0] * ranks, [[0] * count for _ in range(ranks)]
    # Heaps: of each rank (cost, micro-batch) of those with room for the sample at hand, all empty ones among them; of
    # the others (-room, cost, rank, micro-batch).
    roomy = [[(0.0, part) for part in range(count)] for _ in range(ranks)]
    full: list[tuple[int, float, int, int]] = []
    empty, left = ranks * count, []
    order = sorted(range(len(tokens)), key=lambda i: (-tokens[i], i))
    for place, i in enumerate(order):
        while full and -full[0][0] >= tokens[i]:
            _, done, rank, part = heapq.heappop(full)
            heapq.heappush(roomy[rank], (done, part))
        # The last samples, and the cheapest, go where there is none yet: a filler there would be one pass for nothing.
        spread = len(order) - place <= empty
        fitting = [r for r in range(ranks) if roomy[r] and (roomy[r][0][0] == 0.0 or not spread)]
        if not fitting:
            left.append(i)
            continue
        rank = min(fitting, key=load.__getitem__)
        done, part = heapq.heappop(roomy[rank])
        empty -= not placed[rank][part]
        placed[rank][part].append(i)
        held[rank][part] += tokens[i]
        load[rank] += costs[i]
        heapq.heappush(full, (held[rank][part] - max_tokens, done + costs[i], rank, part))
    return [[sorted(part) for part in rank] for rank in placed], left


def waste(schedule: Schedule, lengths: Sequence[int], cost: CostModel, *, max_tokens: int, round_to: int = 1) -> Waste:
    """What the schedule of samples of these lengths loses; 0 where there is nothing to do."""
    padded = [-(-length // round_to) * round_to for length in lengths]
    rows = [[sum(cost.of(padded[i]) for i in part) for part in rank] for rank in schedule.micro_batches]
    useful, ranks = sum(map(cost.of, lengths)), len(rows)
    if not useful:
        return Waste(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    parts = [each for row in rows for each in row]
    return Waste(
        total=1 - useful / (ranks * max(map(sum, rows))),
        floor=max(0.0, 1 - useful / (ranks * max(map(cost.of, lengths)))),
        lockstep=1 - useful / (ranks * sum(map(max, zip(*rows, strict=True)))),
        micro_batches=1 - sum(parts) / (len(parts) * max(parts)),
        padding=1 - sum(lengths) / sum(padded),
        fill=sum(padded) / (len(parts) * max_tokens),
    )
