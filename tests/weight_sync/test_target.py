"""How long a worker keeps the policy's memory mapped, which the policy cannot give back meanwhile."""

from __future__ import annotations

import logging
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fapo.weight_sync import mapped, target
from megatron_fapo.weight_sync.plan import Endpoint, make_plan
from megatron_fapo.weight_sync.protocol import RefitError
from megatron_fapo.weight_sync.share import Terms, shares_of
from megatron_fapo.weight_sync.source import WeightSource
from megatron_fapo.weight_sync.target import WeightTarget
from tests.weight_sync.plain import PlainMemory, columns_of, contents, rows_of

SHAPES = {"a": (12, 8), "b": (6, 10)}
CPU = torch.device("cpu")


class Pair:
    """A policy rank and a worker in this process."""

    def __init__(self, keep: bool) -> None:
        held, wanted = rows_of(SHAPES, 1, 0), columns_of(SHAPES, 1, 0)
        plan = make_plan([Endpoint("x", "", held)], [Endpoint("x", "", wanted)])
        shares, _ = shares_of(plan, Terms(False, 10**6, keep))
        self.whole = {name: torch.randn(shape) for name, shape in SHAPES.items()}
        tensors = contents(held, self.whole)
        self.source, self.memory = WeightSource(lambda: tensors, CPU), PlainMemory(wanted)
        self.target = WeightTarget(self.memory, CPU)
        self.source.take(shares[0])
        self.target.take(shares[1])
        self.source.open(1, 1.0)
        self.wire = self.source.expose(0)

    def refit(self) -> None:
        self.target.begin(1, 1.0)
        self.target.pull([(0, self.wire)])
        self.target.finish()
        assert all(torch.equal(self.memory.tensors[name], tensor) for name, tensor in self.whole.items())


@pytest.mark.parametrize(("keep", "times"), [(True, 1), (False, 3)])
def test_what_stays_where_it_is_is_mapped_once(monkeypatch: pytest.MonkeyPatch, keep: bool, times: int) -> None:
    calls: list[Any] = []

    def counting(*args: Any) -> dict[str, torch.Tensor]:
        calls.append(args)
        return mapped.map_tensors(*args)

    monkeypatch.setattr(target, "map_tensors", counting)
    pair = Pair(keep)
    for _ in range(3):
        pair.refit()
    assert len(calls) == times
    pair.target.begin(1, 1.0)
    pair.target.pull([(0, pair.wire)])
    pair.target.abort()  # whatever was mapped may be what failed
    pair.refit()
    assert len(calls) == {1: 2, 3: 5}[times]
    pair.source.close()


def test_what_was_not_exposed_cannot_be_sent() -> None:
    pair = Pair(keep=False)
    copy = pair.target._plan.parts[0].copies[0]
    with pytest.raises(RefitError, match="was not exposed to be sent"):
        pair.target._read(copy, copy.source, copy.shape)
    pair.source.close()


class OnCard:
    """A tensor of a GPU, as far as an Exposer looks."""

    is_cuda, device = True, torch.device("cuda:0")

    def __init__(self, address: int) -> None:
        self.data_ptr = lambda: address


def test_a_card_s_tensors_are_exposed_once_while_they_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "_expose_cuda", lambda tensors: (object(), dict(tensors)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    exposer = mapped.Exposer()

    def show(address: int) -> Any:
        return exposer.expose({"t": OnCard(address)})  # type: ignore[dict-item]

    first = show(64)
    assert show(64) is first
    moved = show(128)
    assert moved is not first
    exposer.conceal(one_taker=True)
    assert show(128) is not moved, "its takers have let go: CUDA would not count them again"


def test_counters_of_shared_memory_say_that_it_may_go(caplog: pytest.LogCaptureFixture) -> None:
    """As torch keeps them: 64-bit numbers in a file of /dev/shm; -1 after two takers, read as unsigned, is huge."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.write(struct.pack("4q", 7, 1, -1, 9))
        file.flush()
        name = b"/" + Path(file.name).name.encode()
        memories = tuple(("cuda_ipc", 16, b"handle", 16, 0, False, name, number, b"event", True) for number in (1, 2))
        mapped._count_as_released(mapped.Exposure("host", memories, {}))
        assert struct.unpack("4q", Path(file.name).read_bytes()) == (7, 0, 0, 9)
    with caplog.at_level(logging.WARNING, "megatron_fapo"):
        logging.getLogger("megatron_fapo").propagate = True
        mapped._count_as_released(mapped.Exposure("host", memories, {}))
    assert "counters cannot be set" in caplog.text
