"""Packs: nothing is lost or seen twice, over context ranks either."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_fapo.policy.batch import MicroBatch, Padding, build_micro_batch, set_logprobs
from tests.policy.models import make_samples

SAMPLES = make_samples(6)
FLAT = [t for s in SAMPLES for t in s.response_ids]


def _build(padding: Padding, rank: int = 0, ranks: int = 1) -> MicroBatch:
    return build_micro_batch(SAMPLES, padding, device="cpu", rank=rank, ranks=ranks)


def test_samples_lie_one_after_the_other() -> None:
    batch = _build(Padding())
    ends = batch.cu_seqlens.tolist()
    assert ends[-1] == batch.tokens_1t.shape[1] == sum(s.tokens for s in SAMPLES)  # nothing is padded
    for start, end, s in zip(ends, ends[1:], SAMPLES, strict=False):
        assert batch.tokens_1t[0, start:end].tolist() == s.token_ids.tolist()
    assert batch.longest == max(s.tokens for s in SAMPLES)
    # Each token is predicted from the position before it.
    assert batch.tokens_1t[0, batch.index_N + 1].tolist() == batch.target_N.tolist() == FLAT
    assert batch.advantage_N.tolist() == pytest.approx([s.advantage for s in SAMPLES for _ in s.response_ids])


@pytest.mark.parametrize("ranks", [2, 4])
def test_context_ranks_share_out_every_token_once(ranks: int) -> None:
    padding = Padding.of(context=ranks, tensor=2, fp8=False)
    parts = [_build(padding, rank, ranks) for rank in range(ranks)]
    ends = parts[0].cu_seqlens.tolist()
    assert all((end - start) % (2 * ranks) == 0 for start, end in itertools.pairwise(ends))
    assert all(part.tokens_1t.shape == (1, ends[-1] // ranks) for part in parts)
    assert ends[-1] // ranks % 2 == 0  # what sequence parallelism splits
    places = torch.cat([part.place_N for part in parts])
    assert places.sort().values.tolist() == list(range(len(FLAT)))
    assert torch.cat([part.target_N for part in parts])[places.argsort()].tolist() == FLAT
    old = torch.cat([part.old_N for part in parts])[places.argsort()]  # type: ignore[arg-type]
    assert old.tolist() == pytest.approx([x for s in SAMPLES for x in s.old_logprobs])
    # The tokens are the pack's, each rank with its first and its last slices.
    tokens = sorted(t for part in parts for t in part.tokens_1t[0].tolist())
    assert tokens == sorted([t for s in SAMPLES for t in s.token_ids] + [0] * (ends[-1] - _total()))


def _total() -> int:
    return sum(s.tokens for s in SAMPLES)


def test_a_context_rank_predicts_from_what_it_holds() -> None:
    for rank in range(2):
        part = _build(Padding.of(context=2, tensor=1, fp8=False), rank, 2)
        whole = _build(Padding(4, 4))
        slots = []
        for start, end in zip(whole.cu_seqlens.tolist(), whole.cu_seqlens.tolist()[1:], strict=False):
            width = (end - start) // 4
            slots += [*range(start + rank * width, start + (rank + 1) * width)]
            slots += [*range(start + (3 - rank) * width, start + (4 - rank) * width)]
        assert part.tokens_1t[0].tolist() == whole.tokens_1t[0, slots].tolist()
        predicted_from = [slots[i] for i in part.index_N.tolist()]
        assert predicted_from == whole.index_N[part.place_N].tolist()


def test_padding_goes_to_the_end_of_the_last_sample() -> None:
    batch = _build(Padding.of(context=1, tensor=2, fp8=True))
    assert batch.tokens_1t.shape[1] % 32 == 0
    ends = batch.cu_seqlens.tolist()
    assert [end - start for start, end in itertools.pairwise(ends)][:-1] == [s.tokens for s in SAMPLES[:-1]]


def test_no_samples_is_a_pack_without_loss() -> None:
    batch = build_micro_batch([], Padding.of(context=2, tensor=2, fp8=False), device="cpu", rank=1, ranks=2)
    assert batch.tokens_1t.numel() % 2 == 0
    assert batch.target_N.numel() == batch.index_N.numel() == 0
    assert batch.response_lengths == ()


def test_missing_logprobs_are_missing() -> None:
    assert _build(Padding()).reference_N is None
    filled = set_logprobs(SAMPLES, "reference_logprobs", [[0.5] * len(s.response_ids) for s in SAMPLES])
    batch = build_micro_batch(filled, Padding(), device="cpu")
    assert batch.reference_N is not None
    assert batch.reference_N.tolist() == [0.5] * len(FLAT)
