"""Tensors of one process in another."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import replace

import msgspec
import pytest
import torch

from megatron_fapo.weight_sync.mapped import Exposer, Exposure, host_id, map_tensors, require_exportable_memory, viewed
from megatron_fapo.weight_sync.protocol import RefitError
from megatron_fapo.weight_sync.regions import View

CPU = torch.device("cpu")
TENSORS = {
    "float": torch.randn(7, 5),
    "bfloat16": torch.randn(3, 11).bfloat16(),
    "scalar": torch.tensor(2.5),
    "a view": torch.randn(90)[13:],
}


@pytest.fixture
def exposer():
    exposer = Exposer()
    yield exposer
    exposer.close()


def test_every_tensor_is_seen_bit_for_bit(exposer):
    seen = map_tensors(exposer.expose(TENSORS), CPU, list(TENSORS))
    for name, tensor in TENSORS.items():
        assert seen[name].dtype == tensor.dtype
        assert torch.equal(seen[name], tensor.reshape(-1))


def test_views_are_found_in_the_model_s_tensors_and_in_mapped_ones(exposer):
    tensor = torch.arange(90.0)[10:].view(8, 10)  # as megatron's parameters, a part of a larger storage
    view = View("t", 23, (10, 1))
    wanted = tensor[2:5, 3:7]
    assert torch.equal(viewed(tensor, view, (3, 4)), wanted)
    assert torch.equal(viewed(map_tensors(exposer.expose({"t": tensor}), CPU, ["t"])["t"], view, (3, 4)), wanted)


def test_what_was_exposed_stays_valid_while_the_next_is(exposer):
    previous = exposer.expose({"t": torch.zeros(1000)})
    for i in range(1, 5):
        following = exposer.expose({"t": torch.full((1000,), float(i))})
        assert torch.all(map_tensors(previous, CPU, ["t"])["t"] == i - 1)
        previous = following


def test_another_process_sees_them_through_the_engine_s_wire(exposer):
    wire = msgspec.msgpack.decode(msgspec.msgpack.encode(exposer.expose({"t": torch.arange(1000.0)}).to_wire()))
    script = (
        "import pickle, sys, torch; from megatron_fapo.weight_sync.mapped import Exposure, map_tensors\n"
        "exposure = Exposure.from_wire(pickle.load(sys.stdin.buffer))\n"
        "print(map_tensors(exposure, torch.device('cpu'), ['t'])['t'].sum().item())"
    )
    result = subprocess.run([sys.executable, "-c", script], input=pickle.dumps(wire), capture_output=True, check=True)
    assert float(result.stdout) == 499500.0


def test_what_cannot_be_mapped_is_refused(exposer):
    exposure = exposer.expose({"t": torch.arange(1000.0)})
    with pytest.raises(RefitError, match="another node"):
        map_tensors(replace(exposure, host="elsewhere"), CPU, ["t"])
    with pytest.raises(RefitError, match="does not expose u"):
        map_tensors(exposure, CPU, ["t", "u"])
    kind, path, inode, nbytes = exposure.memories[0]
    with pytest.raises(RefitError, match=rf"{nbytes} bytes where {2 * nbytes} were announced"):
        map_tensors(replace(exposure, memories=((kind, path, inode, 2 * nbytes),)), CPU, ["t"])
    with pytest.raises(RefitError, match="t lies outside"):
        map_tensors(replace(exposure, tensors={"t": (0, 512, "float32", 1000)}), CPU, ["t"])
    exposer.close()
    with pytest.raises(RefitError, match="has its policy rank ended"):
        map_tensors(exposure, CPU, ["t"])
    other = os.open("/dev/null", os.O_RDONLY)  # takes the number of the descriptor
    assert path.endswith(f"/{other}")
    with pytest.raises(RefitError, match="was given back"):
        map_tensors(exposure, CPU, ["t"])
    os.close(other)


def test_memory_is_given_back(exposer):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        for size in (10, 10_000):
            exposer.expose({"t": torch.zeros(size)})
    assert len(os.listdir("/proc/self/fd")) <= before + 4, "two mirrors, and Python's mmap has a descriptor of its own"
    exposer.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_host_id_is_the_same_for_every_process_of_the_node():
    script = "from megatron_fapo.weight_sync.mapped import host_id; print(host_id())"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == host_id()


def test_expandable_segments_are_refused(monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64, expandable_segments: True")
    with pytest.raises(RefitError, match="expandable_segments"):
        require_exportable_memory()


def test_an_exposure_survives_the_wire():
    exposure = Exposure("host", (("cuda_ipc", 16, b"\\x00\\xff", 3, True),), {"t": (0, 0, "bfloat16", 8)})
    wire = msgspec.msgpack.decode(msgspec.msgpack.encode(exposure.to_wire()))
    assert Exposure.from_wire(wire) == exposure
