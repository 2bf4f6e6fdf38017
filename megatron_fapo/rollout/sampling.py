"""Decisions of a rollout that need no engine: seeds and the assignment of prompts to engines."""

from __future__ import annotations

import hashlib
from itertools import pairwise

from megatron_fapo.data.records import SampleKey


def sample_seed(run_seed: int, key: SampleKey) -> int:
    """Seed of one sample, in [0, 2**63).

    It depends on the run's seed and the sample's identity alone, so a sample can be drawn again: not on the weight
    version, the engine, or which other samples there are.
    """
    text = f"{run_seed}\0{key.prompt_id}\0{key.epoch}\0{key.sample_index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def assign(count: int, engines: int) -> list[list[int]]:
    """Positions of `count` prompts for each of the engines: contiguous, in order, sizes differing by one at most.

    By position alone, never by load: the same call gives each engine the same batch, which keeps runs reproducible.
    """
    base, extra = divmod(count, engines)
    bounds = [0]
    for engine in range(engines):
        bounds.append(bounds[-1] + base + (engine < extra))
    return [list(range(start, end)) for start, end in pairwise(bounds)]
