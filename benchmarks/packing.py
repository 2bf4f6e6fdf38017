"""What the packing of samples loses on lengths like the recipe's, beside padding them.

    python benchmarks/packing.py

For each case, over 100 draws of a mini-batch's lengths: the mean and the largest `total` of packing.Waste, the mean
`lockstep` and `fill`, and the mean share lost by the plain way, which deals samples to data ranks by length and pads
those of a micro-batch to its longest. Then the processor time of scheduling 4,096 samples.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_fapo.plan.lengths import log_normal
from megatron_fapo.plan.shapes import BUILT_IN
from megatron_fapo.policy.packing import CostModel, schedule, waste

RECIPE = {  # model, mean and 99th percentile of responses, their limit, prompt, samples of a mini-batch, max_tokens
    "7B": ("Qwen2.5-Math-7B", 1100, 4400, 8192, 256, 32 * 8, 20480),
    "32B": ("Qwen2.5-32B", 2300, 9200, 20480, 256, 32 * 8, 22528),
    "32B, heavy tail": ("Qwen2.5-32B", 3000, 20000, 20480, 256, 32 * 8, 22528),
    "GenRM": ("Qwen3-4B", 1800, 7200, 8192, 2500, 32 * 16, 26624),
}


def draws(name: str, count: int) -> Iterator[list[int]]:
    """Lengths of `count` mini-batches of a case."""
    _, mean, p99, limit, prompt, samples, _ = RECIPE[name]
    draw = log_normal(mean, p99, limit)
    for seed in range(count):
        rng = random.Random(seed)
        yield [prompt + draw(rng) for _ in range(samples)]


def padded_waste(lengths: Sequence[int], ranks: int, max_tokens: int, cost: CostModel) -> float:
    """Share of the data ranks' time that is lost without packing."""
    order = sorted(lengths, reverse=True)
    loads = []
    for rank in range(ranks):
        load, rest = 0.0, order[rank::ranks]
        while rest:
            count = max(1, max_tokens // rest[0])
            load += len(rest[:count]) * cost.of(rest[0])
            rest = rest[count:]
        loads.append(load)
    return 1 - sum(map(cost.of, lengths)) / (ranks * max(loads))


def main() -> None:
    print(f"{'':<17}{'data ranks':>11}{'mean':>8}{'largest':>9}{'lockstep':>10}{'fill':>7}{'padded':>8}")
    for name, (model, *_, max_tokens) in RECIPE.items():
        cost = CostModel.from_shape(BUILT_IN[model])
        for ranks in (2, 4, 8, 16):
            found, padded = [], []
            for lengths in draws(name, 100):
                made = schedule(lengths, data_ranks=ranks, max_tokens=max_tokens, cost=cost)
                found.append(waste(made, lengths, cost, max_tokens=max_tokens))
                padded.append(padded_waste(lengths, ranks, max_tokens, cost))
            mean, lockstep, fill, plain = (
                sum(values) / 100
                for values in ([w.total for w in found], [w.lockstep for w in found], [w.fill for w in found], padded)
            )
            largest = max(w.total for w in found)
            print(f"{name:<17}{ranks:>11}{mean:>8.2%}{largest:>9.2%}{lockstep:>10.1%}{fill:>7.0%}{plain:>8.0%}")
    lengths = [length for each in draws("7B", 16) for length in each]
    began = time.process_time()
    schedule(lengths, data_ranks=8, max_tokens=20480, cost=cost)
    print(f"{len(lengths)} samples scheduled in {time.process_time() - began:.3f} s")


if __name__ == "__main__":
    main()
