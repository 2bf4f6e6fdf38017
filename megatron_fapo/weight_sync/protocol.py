"""When an engine may serve, and what a whole refit is. Pure: no I/O, no processes, no vLLM.

    FRESH(v) --begin--> UPDATING --complete(v+1)--> FRESH(v+1)
                            |fail
                            v
                          STALE --begin--> UPDATING ...

Invariants: an engine serves only while FRESH; its version changes only when a whole refit has completed; whatever
fails in between leaves it STALE, from where a new refit may begin.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any


class RefitError(RuntimeError):
    """A refit did not complete. The engine is stale and serves nothing until a whole refit succeeds."""


class StaleEngineError(RuntimeError):
    """The engine was asked to serve while its weights are not one whole version."""


class EngineState(Enum):
    FRESH = "fresh"
    UPDATING = "updating"
    STALE = "stale"


@dataclass
class EngineVersion:
    """The version that an engine holds, and whether it may serve with it."""

    version: int
    """The last version that was whole; -1: none yet."""
    state: EngineState = EngineState.FRESH

    def require_fresh(self) -> int:
        """The version to stamp on samples.

        Raises:
            StaleEngineError: the weights are not one whole version.
        """
        if self.state is not EngineState.FRESH:
            raise StaleEngineError(
                f"the engine is {self.state.value} (last whole version {self.version}): it serves nothing until a "
                "refit succeeds"
            )
        return self.version

    def begin(self) -> None:
        if self.state is EngineState.UPDATING:
            raise RefitError("a refit is under way: abort it before another begins")
        self.state = EngineState.UPDATING

    def require_updating(self) -> None:
        if self.state is not EngineState.UPDATING:
            raise RefitError(f"no refit is under way: the engine is {self.state.value}")

    def complete(self, version: int) -> None:
        self.require_updating()
        self.version, self.state = version, EngineState.FRESH

    def fail(self) -> None:
        self.state = EngineState.STALE


@dataclass(frozen=True)
class TensorEntry:
    """One HF-named tensor in a bucket."""

    name: str
    dtype: str
    """As torch names it, without `torch.`."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the bucket."""
    nbytes: int
    checksum: str | None = None
    """Of its bytes (buckets.checksum), when this refit is verified."""


@dataclass(frozen=True)
class Bucket:
    """Where the bytes of some tensors are, and which. Small and picklable; of builtin types on the sender's node."""

    host: str
    """Boot and PID namespace of the sender (buckets.host_id): its memory can be mapped nowhere else."""
    transport: str
    """`shm` or `cuda_ipc`."""
    handle: tuple[Any, ...]
    """shm: (path, inode). cuda_ipc: (GPU UUID, then what PyTorch's CUDA sharing gives)."""
    nbytes: int
    entries: tuple[TensorEntry, ...]
    pack_s: float = 0.0
    """Seconds that the sender took to fill it, gathers over its tensor-parallel group included."""
    payload: Any = None
    """For engines on other nodes: a reference to the same bytes in Ray's object store."""

    def to_wire(self) -> dict[str, Any]:
        """As builtin types, which vLLM's RPC carries without pickle."""
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> Bucket:
        entries = tuple(TensorEntry(**(entry | {"shape": tuple(entry["shape"])})) for entry in wire["entries"])
        return cls(**(wire | {"handle": tuple(wire["handle"]), "entries": entries}))


@dataclass
class Coverage:
    """What a refit must deliver, and what it has delivered: every tensor once, in the shape of the checkpoint."""

    expected: Mapping[str, tuple[int, ...]]
    """HF name -> shape."""
    optional: frozenset[str] = frozenset()
    """Names that may come and are ignored by the engine: the output layer of a model with tied embeddings."""
    received: set[str] = field(default_factory=set)

    def add(self, entries: Iterable[TensorEntry]) -> None:
        """Count the tensors of one bucket.

        Raises:
            RefitError: a name that the engine does not know, that came before, or whose shape differs.
        """
        for entry in entries:
            if entry.name in self.received:
                raise RefitError(f"{entry.name} was sent twice in one refit")
            if entry.name in self.expected and entry.shape != self.expected[entry.name]:
                raise RefitError(
                    f"{entry.name} has shape {entry.shape}; the engine's checkpoint has {self.expected[entry.name]}"
                )
            if entry.name not in self.expected and entry.name not in self.optional:
                raise RefitError(f"{entry.name} is not in the engine's checkpoint: policy and engine differ in model")
            self.received.add(entry.name)

    def require_complete(self) -> None:
        """
        Raises:
            RefitError: tensors are missing; names them.
        """
        missing = sorted(set(self.expected) - self.received)
        if missing:
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise RefitError(f"{len(missing)} of {len(self.expected)} tensors were never sent: {shown}")


@dataclass(frozen=True)
class Place:
    """Where an end of a refit is."""

    node: str
    """Ray's id of the node: two Ray nodes on one machine count as two."""
    gpus: tuple[str, ...]
    """UUIDs of its GPUs; an empty one on CPUs."""


def choose_transports(senders: Sequence[Place], engines: Sequence[Place]) -> list[list[str]]:
    """How the buckets of each sender reach each engine: `transports[sender][engine]`.

    `network` to another node. On the sender's own node `shm`; `cuda_ipc` when all senders and engines sit on one GPU.
    A process that Ray confines to its own cards cannot open memory of another card, so peers on different cards of one
    node meet in host memory.
    """
    everyone = [*senders, *engines]
    gpus = {uuid for place in everyone for uuid in place.gpus}
    one_card = len(gpus) == 1 and "" not in gpus and len({place.node for place in everyone}) == 1
    local = "cuda_ipc" if one_card else "shm"
    return [[local if sender.node == engine.node else "network" for engine in engines] for sender in senders]


def verify_due(refits_done: int, verify_every: int) -> bool:
    """Whether the next refit carries checksums: the first of a run always, then every `verify_every` (0: never)."""
    return refits_done == 0 or (verify_every > 0 and refits_done % verify_every == 0)
