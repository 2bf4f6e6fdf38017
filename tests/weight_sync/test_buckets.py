"""Packing, and mapping from another process."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from megatron_fapo.weight_sync.buckets import checksum, host_id, map_bucket, view
from megatron_fapo.weight_sync.protocol import RefitError
from megatron_fapo.weight_sync.sender import WeightSender

CPU = torch.device("cpu")
MIB = 2**20


def drain(sender):
    while (bucket := sender.next()) is not None:
        yield bucket


@pytest.fixture
def sender():
    sender = WeightSender(bucket_mb=1)
    yield sender
    sender.close()


TENSORS = {
    "float": torch.randn(7, 5),
    "bfloat16": torch.randn(3, 11).bfloat16(),
    "not contiguous": torch.randn(6, 4).t(),
    "scalar": torch.tensor(2.5),
    "larger than a bucket": torch.randn(600, 600),
    "after": torch.randn(3),
}


def test_every_tensor_arrives_bit_for_bit(sender):
    sender.open(TENSORS.items(), owner=True, verify=True)
    received = {}
    for bucket in drain(sender):
        data = map_bucket(bucket, CPU)
        for entry in bucket.entries:
            received[entry.name] = view(data, entry).clone()
            assert checksum(data[entry.offset : entry.offset + entry.nbytes]) == entry.checksum
    assert received.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert received[name].dtype == tensor.dtype
        assert torch.equal(received[name], tensor)


def test_buckets_keep_to_their_size(sender):
    sender.open(((str(i), torch.ones(MIB // 16)) for i in range(10)), owner=True, verify=False)
    buckets = list(drain(sender))
    assert [len(bucket.entries) for bucket in buckets] == [4, 4, 2]
    assert all(bucket.nbytes <= MIB for bucket in buckets)


def test_one_bucket_stays_readable_while_the_next_is_packed(sender):
    sender.open(((str(i), torch.full((MIB // 4,), float(i))) for i in range(4)), owner=True, verify=False)
    previous = sender.next()
    for i in range(1, 4):
        bucket = sender.next()
        assert torch.all(view(map_bucket(previous, CPU), previous.entries[0]) == i - 1)
        previous = bucket


def test_a_rank_that_does_not_own_runs_the_gathers_and_sends_nothing(sender):
    gathered = []
    sender.open(((name, gathered.append(name) or tensor) for name, tensor in TENSORS.items()), owner=False, verify=True)
    assert sender.next() is None
    assert gathered == list(TENSORS)


def test_a_new_refit_drops_an_unfinished_one_but_not_its_gathers(sender):
    gathered = []
    sender.open(((str(i), gathered.append(i) or torch.ones(MIB // 4)) for i in range(5)), owner=True, verify=False)
    sender.next()
    sender.open([("only", torch.ones(2))], owner=True, verify=False)
    assert gathered == list(range(5)), "the other tensor-parallel ranks would wait for ever"
    assert [entry.name for bucket in drain(sender) for entry in bucket.entries] == ["only"]


def test_another_process_maps_a_bucket(sender):
    sender.open([("t", torch.arange(1000.0))], owner=True, verify=True)
    bucket = sender.next()
    script = (
        "import pickle, sys, torch; from megatron_fapo.weight_sync.buckets import map_bucket, view\n"
        "bucket = pickle.load(sys.stdin.buffer)\n"
        "print(view(map_bucket(bucket, torch.device('cpu')), bucket.entries[0]).sum().item())"
    )
    result = subprocess.run([sys.executable, "-c", script], input=pickle.dumps(bucket), capture_output=True, check=True)
    assert float(result.stdout) == 499500.0


def test_wrong_buckets_are_refused(sender):
    sender.open([("t", torch.arange(1000.0))], owner=True, verify=True)
    bucket = sender.next()
    with pytest.raises(RefitError, match="another node"):
        map_bucket(replace(bucket, host="elsewhere"), CPU)
    with pytest.raises(RefitError, match=rf"{bucket.nbytes} bytes where its manifest says {bucket.nbytes * 2}"):
        map_bucket(replace(bucket, nbytes=bucket.nbytes * 2), CPU)
    sender.close()
    with pytest.raises(RefitError, match="has its policy rank ended"):
        map_bucket(bucket, CPU)
    sender.open([("u", torch.arange(1000.0))], owner=True, verify=True)
    assert sender.next().handle[0] == bucket.handle[0], "the descriptor's number is used anew"
    with pytest.raises(RefitError, match="was given back"):
        map_bucket(bucket, CPU)


def test_memory_is_given_back(sender):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        sender.open(TENSORS.items(), owner=True, verify=False)
        list(drain(sender))
    sender.close()
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1000, 8 * 2**20 + 3])
def test_checksum_sees_any_flipped_bit_and_any_swap(size):
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    clean = checksum(data)
    assert checksum(data.clone()) == clean
    for position in {0, size // 2, size - 1} if size else ():
        data[position] ^= 4
        assert checksum(data) != clean
        data[position] ^= 4
    if size >= 16:
        words = data[: size // 8 * 8].view(torch.int64)
        words[[0, -1]] = words[[-1, 0]]
        assert checksum(data) != clean


def test_checksum_counts_the_length():
    assert checksum(torch.zeros(8, dtype=torch.uint8)) != checksum(torch.zeros(16, dtype=torch.uint8))


def test_host_is_stable():
    assert host_id() == host_id()


def test_expandable_segments_are_refused(monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments: True")
    sender = WeightSender(1, "cuda_ipc")
    sender.open([("t", torch.ones(1))], owner=True, verify=False)
    with pytest.raises(RefitError, match="expandable_segments"):
        sender.next()
