"""A policy rank as a Ray actor: its process, its log, its part of a refit.

The driver's side is `policy/group.py`. Methods that say so are collective: the group calls them on all ranks at once.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_fapo.checksums import FileSum
from megatron_fapo.config.algorithm import AlgorithmConfig
from megatron_fapo.config.policy import PolicyConfig
from megatron_fapo.observe.log import setup_logging
from megatron_fapo.observe.trace import DIRECTORY, OWN, TRACER, Told
from megatron_fapo.policy.checkpoint import Part, Saver, load, verify
from megatron_fapo.policy.hf_weights import exports, owns_export
from megatron_fapo.policy.parallel import Rank
from megatron_fapo.policy.worker import ByMicroBatch, PolicyWorker, StepResult
from megatron_fapo.processes import use_interface_of

if TYPE_CHECKING:
    from megatron_fapo.weight_sync.source import WeightSource

log = logging.getLogger(__name__)

WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.gguf")
"""Files of an HF directory that hold weights; everything else describes the model and goes along with an export."""


def traced(method: Callable[..., Any]) -> Callable[..., Told]:
    """The driver gets the spans of the work along with the answer."""

    @wraps(method)
    def call(self: PolicyActor, *args: Any) -> Told:
        with TRACER.on(OWN, method.__name__):
            answer = method(self, *args)
        return Told(answer, TRACER.take_spans())

    return call


class PolicyActor:
    """One rank of the policy. Call `join` on all ranks before anything else."""

    def __init__(self, run_dir: str, rank: int) -> None:
        setup_logging(Path(run_dir), "policy", rank)
        TRACER.begin()
        self.rank, self._run_dir = rank, Path(run_dir)
        self._profile: tuple[int, Any] | None = None
        self.worker: PolicyWorker | None = None
        self._weights: WeightSource | None = None
        self._meeting: Any = None

    def address(self) -> tuple[str, int]:
        """Where rank 0 listens: this node's address and a port."""
        import ray
        from torch.distributed import TCPStore

        here = ray.util.get_node_ip_address()
        # Held from now on, and found by `join` in this process: a port that is merely free may be another's connection
        # by the time that megatron has been imported.
        self._store = TCPStore(here, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
        return here, self._store.port

    def join(
        self, rank: Rank, cfg: PolicyConfig, algorithm: AlgorithmConfig, options: dict[str, Any]
    ) -> dict[str, Any]:
        """Build the model and join the process group. Collective. Returns facts about this rank."""
        import ray
        import torch

        from megatron_fapo.weight_sync.mapped import gpu_uuid

        if options.pop("in_cluster"):
            use_interface_of(ray.util.get_node_ip_address())
        self.worker = PolicyWorker(rank, cfg, algorithm, **options)
        logging.getLogger(__name__).info("rank %d of %d is up", rank.rank, rank.world_size)
        state = self.worker.state
        return {
            "data_rank": self.worker.data_rank,
            "reports": self.worker.reports,
            "exports": exports(state),
            "gpu": gpu_uuid(torch.device(self.worker.device)),
            "cards": ray.get_runtime_context().get_accelerator_ids()["GPU"] if options["device"] == "gpu" else [],
            "pid": os.getpid(),
        }

    @traced
    def enter(self, phase: str) -> dict[str, float]:
        """Have on the device what the phase needs; see policy/memory.py. Returns the ledger's metrics."""
        return self._up.memory.enter(phase)

    @traced
    def logprobs(self, packs: bytes, reference: bool) -> ByMicroBatch | None:
        """Collective; see PolicyWorker.logprobs."""
        return self._up.logprobs(pickle.loads(packs), reference=reference)

    @traced
    def train(self, packs: bytes, loss: str) -> StepResult:
        """Collective; see PolicyWorker.train."""
        return self._up.train(pickle.loads(packs), loss=loss)

    @traced
    def save(self, directory: str) -> None:
        """Copy this rank's part of the state and begin to write it. Collective; see policy/checkpoint.py."""
        self._saver.begin(Path(directory))

    def saved(self) -> Part | None:
        """What the save under way has written; None while it writes. Not collective, so it may come at any time."""
        return self._saver.part()

    def complete_save(self, parts: list[Part]) -> dict[str, FileSum]:
        """Write the index of all ranks' parts, on rank 0; returns the files. Not collective."""
        return self._saver.complete(parts)

    @cached_property
    def _saver(self) -> Saver:
        return Saver(self._up)

    def verify(self, directory: str, files: dict[str, str], ranks: int) -> list[str]:
        """What is wrong with this rank's share of `files`. Not collective; see policy/checkpoint.py."""
        return verify(Path(directory), files, self.rank, ranks)

    def load(self, directory: str) -> None:
        """Collective; see policy/checkpoint.py."""
        load(self._up, directory)

    def export(self, directory: str) -> list[str]:
        """Write this stage's part of an HF checkpoint. Collective over the ranks that export. Returns its names."""
        from megatron_fapo.policy.hf_weights import save_stage

        state = self._up.state
        tensors = self._up.export()
        if not owns_export(state):
            for _ in tensors:  # the gathers need every rank that exports
                pass
            return []
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        return save_stage(
            tensors, path, state.get_pipeline_model_parallel_rank(), state.get_pipeline_model_parallel_world_size()
        )

    @traced
    def source_index(self) -> str:
        """What this rank holds of the HF checkpoint: an `Index` as JSON."""
        from megatron_fapo.policy.source_index import source_index

        return source_index(self._up.chunks, self._up.shape).to_json()

    @traced
    def take_share(self, share: str) -> int:
        """Take this rank's share of the plan of refits, as JSON; see WeightSource.take. It gets a new place in it."""
        import torch

        from megatron_fapo.policy.source_index import source_tensors
        from megatron_fapo.weight_sync.share import Share
        from megatron_fapo.weight_sync.source import WeightSource

        worker = self._up
        self._weights = WeightSource(lambda: source_tensors(worker.chunks), torch.device(worker.device))
        return self._weights.take(Share.from_json(share))

    def open_group(self, address: str) -> tuple[str, int]:
        """Where those that exchange weights meet, kept by this rank: an address and a port."""
        from torch.distributed import TCPStore

        self._meeting = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        return address, self._meeting.port

    @traced
    def weights(self, what: str, *args: Any) -> Any:
        """A step of a refit: a method of WeightSource."""
        assert self._weights is not None, "take_share() comes first"
        with TRACER.on(OWN, what):
            return getattr(self._weights, what)(*args)

    @traced
    def profile(self, step: int | None) -> None:
        """Record what this rank computes, kernels on GPUs among it; None: write that to
        RUN_DIR/trace/policy-RANK-step-STEP.json.gz, or say in the log why it cannot be."""
        from torch.profiler import ProfilerActivity, profile

        if step is not None:
            gpu = [ProfilerActivity.CUDA] if self._up.device == "cuda" else []
            self._profile = step, profile(activities=[ProfilerActivity.CPU, *gpu]).__enter__()
        elif self._profile is not None:
            (step, profiler), self._profile = self._profile, None
            profiler.__exit__(None, None, None)
            path = self._run_dir / DIRECTORY / f"policy-{self.rank}-step-{step:06d}.json.gz"
            try:
                path.parent.mkdir(exist_ok=True)
                profiler.export_chrome_trace(str(path))
            except OSError as error:  # of a full disk, say: the run is worth more
                log.warning("the kernels of step %d could not be written: %s", step, error)

    def close(self) -> None:
        """Give shared memory back and leave the process group."""
        if self._weights is not None:
            self._weights.close()
        if self.worker is not None:
            self.worker.close()

    @property
    def _up(self) -> PolicyWorker:
        assert self.worker is not None, "join() comes first"
        return self.worker


def copy_model_files(source: Path, target: Path, max_positions: int | None = None) -> None:
    """Copy what describes an HF model (config, tokenizer, chat template), leaving weights out.

    `max_positions` replaces max_position_embeddings in the copy: whoever loads the export needs no override.
    """
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in WEIGHT_PATTERNS):
            shutil.copyfile(file, target / file.name)
    if max_positions is not None:
        path = target / "config.json"
        changed = json.loads(path.read_text()) | {"max_position_embeddings": max_positions}
        path.write_text(json.dumps(changed, indent=2) + "\n")
