"""The scheduler of micro-batches: its docstring's invariants over random lengths."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_fapo.policy.batch import (
    TrainSample,
    build_micro_batches,
    plan_micro_batches,
    split_over_data_ranks,
    with_filler,
)

LENGTHS = st.lists(st.integers(2, 200), min_size=1, max_size=60)


@given(lengths=LENGTHS, ranks=st.integers(1, 9))
def test_every_sample_goes_to_one_rank_in_near_equal_shares(lengths: list[int], ranks: int) -> None:
    parts = split_over_data_ranks(lengths, ranks)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    counts = [len(part) for part in parts]
    assert max(counts) - min(counts) <= 1
    if len(lengths) >= ranks:
        tokens = [sum(lengths[i] for i in part) for part in parts]
        assert max(tokens) - min(tokens) <= 2 * max(lengths)


@given(lengths=LENGTHS, max_tokens=st.integers(1, 500))
def test_every_sample_is_in_one_micro_batch_within_the_budget(lengths: list[int], max_tokens: int) -> None:
    plan = plan_micro_batches(lengths, max_tokens)
    assert sorted(i for batch in plan for i in batch) == list(range(len(lengths)))
    for batch in plan:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded <= max_tokens or len(batch) == 1


@given(
    shapes=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 15)), min_size=1, max_size=12),
    max_tokens=st.integers(1, 90),
    multiple=st.integers(1, 4),
)
def test_each_response_token_is_predicted_from_the_position_before(
    shapes: list[tuple[int, int]], max_tokens: int, multiple: int
) -> None:
    """Tokens are numbered so that a token's predecessor can be told: token = 1000 * sample + position."""
    samples = [
        TrainSample(
            prompt_ids=tuple(1000 * i + j for j in range(prompt)),
            response_ids=tuple(1000 * i + prompt + j for j in range(response)),
            advantage=float(i),
            old_logprobs=tuple(-float(1000 * i + prompt + j) for j in range(response)),
        )
        for i, (prompt, response) in enumerate(shapes)
    ]
    seen = []
    for batch in build_micro_batches(samples, max_tokens, multiple, "cpu"):
        assert batch.tokens_BT.shape[1] % multiple == 0
        flat = batch.tokens_BT.reshape(-1)
        assert torch.equal(flat[batch.index_N] + 1, batch.target_N)
        assert batch.old_N is not None
        assert torch.equal(batch.old_N, -batch.target_N.float())
        assert torch.equal(batch.advantage_N, (batch.target_N // 1000).float())
        assert batch.behaviour_N is None
        seen += batch.target_N.tolist()
    assert sorted(seen) == sorted(t for s in samples for t in s.response_ids)


def test_a_rank_without_samples_gets_a_filler_without_loss() -> None:
    (batch,) = build_micro_batches(with_filler([]), 100, 2, "cpu")
    assert batch.tokens_BT.shape == (1, 2)
    assert len(batch.index_N) == len(batch.target_N) == 0
