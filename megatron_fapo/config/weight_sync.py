"""`weight_sync`: how new policy weights reach the engines."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_fapo.config.section import Section


class WeightSyncConfig(Section):
    bucket_mb: int = Field(512, gt=0)
    """MiB of weights on their way that a process sends and receives in one step of the messages; it holds two steps. On
    CPUs also of tensors mirrored for others to map, twice. A larger tensor is mirrored whole. Mapped memory of cards
    needs none."""
    node_link: Literal["auto", "map", "message"] = "auto"
    """How weights go from card to card of one node: by `map` a worker copies out of the policy's memory (CUDA IPC), by
    `message` NCCL carries them. `auto`: messages between cards, mapping on CPUs. On one card memory is always mapped,
    between nodes there are always messages."""
    verify_share: float = Field(0.02, gt=0, le=1)
    """Of the copies of every refit, this share is proven by checksums of giver and taker, others each time."""
    verify_every: int = Field(50, ge=0)
    """Every so many refits all copies are. In the first refit of a run they always are. 0: in no other."""
    in_flight: bool = False
    """Engines may be refitted while they generate: samples wait, the new weights read what they said so far, and go on;
    a sample's `later_versions` says from which token on. False: refits wait until none are in flight. Without
    training.asynchrony none ever are."""
    timeout_s: float = Field(600.0, gt=0)
    """Seconds for a whole refit; then all give it up, and the engines are stale."""
