"""Policy ranks as plain processes: imported once, then used for many layouts.

Importing megatron takes longer than a step of a tiny model, so the processes stay and only the parallel state changes.
"""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from torch.distributed import TCPStore

from megatron_fapo.config.algorithm import AlgorithmConfig
from megatron_fapo.config.policy import OptimizerConfig, ParallelConfig, PolicyConfig
from megatron_fapo.policy.batch import TrainSample
from megatron_fapo.policy.packing import CostModel, schedule_for
from megatron_fapo.policy.parallel import Rank
from megatron_fapo.policy.worker import PolicyWorker

_stores: list[TCPStore] = []


def free_port() -> int:
    """A port where ranks find each other, for this process alone or until the next `Ranks.run` is over. This process
    listens there: one that is merely free may be a connection's by the time that it is wanted."""
    _stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True))
    return _stores[-1].port


def _serve(rank: int, pipe: Connection) -> None:
    import os

    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # rank 0 need not listen: `free_port` does
    while True:
        try:
            job = pipe.recv()
        except EOFError:  # the tests are gone
            return
        function, args, world, port = job
        try:
            # By value: `Connection.send` would share the memory of each tensor, which this process then had to keep.
            answer = pickle.dumps((True, function(Rank(rank, world, "127.0.0.1", port), *args)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)
        gc.collect()  # models refer to themselves, and keep 60 threads and 80 files of their process groups


class Ranks:
    """Processes that run a function as ranks 0..n-1 of a fresh process group."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def run(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        while len(self.processes) < world:
            here, there = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(len(self.processes), there))
            process.start()
            self.processes.append(process)
            self.pipes.append(here)
        port = free_port()
        for pipe in self.pipes[:world]:
            pipe.send((function, args, world, port))
        results: list[Any] = []
        for rank, pipe in enumerate(self.pipes[:world]):
            # Others hang in a collective of a rank that has failed: its reason is the news.
            if not pipe.poll(240 if all(ok for ok, _ in results) else 5):
                if all(ok for ok, _ in results):
                    self.close()
                    raise TimeoutError(f"rank {rank} did not answer in 240 s")
                continue
            results.append(pickle.loads(pipe.recv_bytes()))
        _stores.clear()
        if failures := [text for ok, text in results if not ok]:
            self.close()  # the others may hang in a collective of the failed rank
            raise AssertionError("\n".join(failures))
        return [value for _, value in results]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []


def policy_config(model: str, layout: dict[str, Any] | None = None, **kwargs: Any) -> PolicyConfig:
    """
    Args:
        layout: fields of `policy.parallel`.
    """
    kwargs.setdefault("optimizer", OptimizerConfig(lr=1e-3, warmup_steps=0))
    return PolicyConfig(model_path=model, parallel=ParallelConfig(**layout or {}), **kwargs)


def make_worker(rank: Rank, cfg: PolicyConfig, algorithm: AlgorithmConfig | None = None, **kw: Any) -> PolicyWorker:
    kw = {"device": "cpu", "dtype": "float32", "seed": 1} | kw
    return PolicyWorker(rank, cfg, algorithm or AlgorithmConfig(), **kw)


def packs_of(worker: PolicyWorker, samples: Sequence[TrainSample]) -> tuple[list[list[int]], list[list[TrainSample]]]:
    """This data-parallel rank's micro-batches, as the group deals them: indexes, and the samples."""
    cfg = worker.cfg
    plan = schedule_for(
        cfg.parallel, CostModel.from_shape(worker.shape), [s.tokens for s in samples], cfg.micro_batch_tokens
    )
    indexes = [list(part) for part in plan.micro_batches[worker.data_rank]]
    return indexes, [[samples[i] for i in part] for part in indexes]
