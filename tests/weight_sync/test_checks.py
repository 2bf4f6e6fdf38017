from __future__ import annotations

import pytest
import torch

from megatron_fapo.weight_sync.checks import Sample, Sums, checksum
from megatron_fapo.weight_sync.protocol import RefitError, require_equal_sums


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1000, 8 * 2**20 + 3])
def test_checksum_sees_any_flipped_bit_and_any_swap(size):
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    clean = checksum(data).tolist()
    assert checksum(data.clone()).tolist() == clean
    for position in {0, size // 2, size - 1} if size else ():
        data[position] ^= 4
        assert checksum(data).tolist() != clean
        data[position] ^= 4
    if size >= 16:
        words = data[: size // 8 * 8].view(torch.int64)
        words[[0, -1]] = words[[-1, 0]]
        assert checksum(data).tolist() != clean


def test_checksum_counts_the_length():
    assert checksum(torch.zeros(8)).tolist() != checksum(torch.zeros(10)).tolist()


def test_checksum_is_of_the_elements_however_they_lie():
    data = torch.randn(9, 7).bfloat16()
    wanted = checksum(data[1:, 2:5].clone()).tolist()
    assert checksum(data[1:, 2:5]).tolist() == wanted
    vector = torch.randn(40).bfloat16()
    for start in range(4):  # of every alignment
        assert checksum(vector[start : start + 20]).tolist() == checksum(vector[start : start + 20].clone()).tolist()


def test_a_sample_is_agreed_on_and_changes_with_the_version():
    mine, yours = Sample(3, 0.1), Sample(3, 0.1)
    assert [mine.of(part, 200) for part in range(5)] == [yours.of(part, 200) for part in range(5)]
    assert mine.of(1, 200) != Sample(4, 0.1).of(1, 200)
    assert mine.of(1, 200) != mine.of(2, 200)
    assert 0.07 < sum(len(Sample(v, 0.1).of(0, 200)) for v in range(50)) / 10_000 < 0.13
    assert Sample(3, 1).of(0, 5) == frozenset(range(5))
    assert all(len(Sample(v, 1e-9).of(0, 7)) == 1 for v in range(20)), "at least one of each part"
    assert frozenset().union(*(Sample(v, 0.02).of(0, 50) for v in range(400))) == frozenset(range(50))


def test_sums_are_compared_with_the_giver_and_givers_with_each_other():
    one, other = Sums(), Sums()
    assert one.read() == []
    for sums in (one, other):
        sums.add(0, 3, torch.arange(5.0))
        sums.add(2, 0, torch.ones(4, 2))
    require_equal_sums([one.read(), other.read()], [one.read(), other.read()[:1]])
    with pytest.raises(RefitError, match="worker 1 checked 1 copies of 2"):
        require_equal_sums([one.read()], [one.read(), other.read()[:1]], [2, 2])
    wrong = Sums()
    wrong.add(2, 0, torch.zeros(4, 2))
    with pytest.raises(RefitError, match="replicas of the policy hold different weights"):
        require_equal_sums([one.read(), wrong.read()], [])
    with pytest.raises(RefitError, match=r"1 of 1 checked copies arrived at worker 1 .*: copy 0 of part 2"):
        require_equal_sums([one.read()], [one.read(), wrong.read()])
    with pytest.raises(RefitError, match="copy 3 of part 0"):  # whose giver gave no sum
        require_equal_sums([], [one.read()])
