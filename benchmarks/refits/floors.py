"""What the machine's memory and links give, between the very processes that a refit joins: policy ranks and vLLM's
workers, all pairs at once.

- `copy`: a worker copies within its own memory (bytes copied, each read once and written once).
- `pull`: a worker copies out of memory that a policy rank exposes: CUDA IPC on GPUs, of the same card or over NVLink; a
  memory file on CPUs.
- `send`: a policy rank sends to a worker: NCCL between cards, gloo on CPUs. Not on one card, where NCCL refuses.

Worker number w takes from rank w modulo their number. A rate is the slowest worker's best of several times.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroup, TCPStore

from benchmarks.refits.reference import ReferencePolicy
from megatron_fapo.weight_sync.mapped import Exposer, Exposure, map_tensors

REPEATS = 5
_WAIT = timedelta(seconds=120)


class FloorPolicy(ReferencePolicy):
    """A policy rank with memory to take from."""

    def expose_floor(self, nbytes: int) -> dict[str, Any]:
        """Let workers map `nbytes` of this rank's device; for the wire."""
        self._floor_exposer = Exposer()
        self._floor = torch.ones(nbytes, dtype=torch.uint8, device=self._up.device)
        return self._floor_exposer.expose({"floor": self._floor}).to_wire()

    def conceal_floor(self) -> None:
        """Give that memory back."""
        del self._floor
        self._floor_exposer.conceal(one_taker=False)
        self._floor_exposer.close()

    def keep_store(self) -> int:
        """Where this rank and its worker meet: a port on this node."""
        self._floor_store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=_WAIT)
        return int(self._floor_store.port)

    def send_floor(self, workers: Sequence[int]) -> None:
        """Send to each of these workers in turn, as often as it receives."""
        for worker in workers:
            group = _pair(PrefixStore(str(worker), self._floor_store), 0, self._floor.device)
            for _ in range(1 + REPEATS):
                group.send([self._floor], 1, 0).wait()
            self._settle()
            _leave(group)


def _pair(store: Any, rank: int, device: torch.device) -> ProcessGroup:
    if device.type == "cuda":
        return torch.distributed.ProcessGroupNCCL(store, rank, 2, torch.distributed.ProcessGroupNCCL.Options())
    options = torch.distributed.ProcessGroupGloo._Options()
    options._timeout = _WAIT
    options._devices = [torch.distributed.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    return torch.distributed.ProcessGroupGloo(store, rank, 2, options)


def _leave(group: Any) -> None:
    if isinstance(group, torch.distributed.ProcessGroupNCCL):  # gloo's has nothing that outlives it
        group.abort()


def _rate(work: Callable[[], Any], nbytes: int, device: torch.device) -> float:
    """Bytes per second, the best of several; the first is not counted."""
    best = float("inf")
    for number in range(1 + REPEATS):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number:
            best = min(best, time.perf_counter() - began)
    return nbytes / best


def copy_rate(worker: Any, nbytes: int) -> float:
    """On a vLLM worker: see `copy` above."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=worker.device)
    target = torch.zeros_like(source)
    return _rate(lambda: target.copy_(source), nbytes, worker.device)


def pull_rate(worker: Any, exposed: Sequence[dict[str, Any]], first: int, nbytes: int) -> float:
    """On a vLLM worker: see `pull` above. `first`: number of the engine's first worker."""
    exposure = Exposure.from_wire(exposed[(first + worker.rank) % len(exposed)])
    source = map_tensors(exposure, worker.device, ["floor"])["floor"]
    target = torch.zeros(nbytes, dtype=torch.uint8, device=worker.device)
    return _rate(lambda: target.copy_(source), nbytes, worker.device)


def receive_rate(worker: Any, ports: Sequence[int], first: int, nbytes: int) -> float:
    """On a vLLM worker: see `send` above."""
    number = first + worker.rank
    store = TCPStore("127.0.0.1", ports[number % len(ports)], is_master=False, timeout=_WAIT)
    group = _pair(PrefixStore(str(number), store), 1, worker.device)
    target = torch.zeros(nbytes, dtype=torch.uint8, device=worker.device)
    rate = _rate(lambda: group.recv([target], 0, 0).wait(), nbytes, worker.device)
    _leave(group)
    return rate


async def measure(
    ranks: Sequence[Any], engines: Sequence[Any], workers: int, nbytes: int, *, send: bool
) -> dict[str, float]:
    """Bytes per second of each kind.

    Args:
        ranks: the policy's actors, of FloorPolicy.
        engines: the engines' actors, with `on_workers`.
        workers: of each engine.
        nbytes: of a copy.
    """

    async def slowest(function: Callable[..., float], *args: Any, numbered: bool = True) -> float:
        first = [(i * workers,) if numbered else () for i in range(len(engines))]
        calls = [e.on_workers.remote(function, *args, *at, nbytes) for e, at in zip(engines, first, strict=True)]
        return min(rate for rates in await asyncio.gather(*calls) for rate in rates)

    exposed = await asyncio.gather(*(rank.expose_floor.remote(nbytes) for rank in ranks))
    rates = {"copy": await slowest(copy_rate, numbered=False), "pull": await slowest(pull_rate, exposed)}
    if send:
        ports = await asyncio.gather(*(rank.keep_store.remote() for rank in ranks))
        takers = [list(range(i, workers * len(engines), len(ranks))) for i in range(len(ranks))]
        sends = [rank.send_floor.remote(mine) for rank, mine in zip(ranks, takers, strict=True)]
        rates["send"], *_ = await asyncio.gather(slowest(receive_rate, ports), *sends)
    await asyncio.gather(*(rank.conceal_floor.remote() for rank in ranks))
    return rates
