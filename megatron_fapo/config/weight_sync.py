"""`weight_sync`: how new policy weights reach the engines."""

from __future__ import annotations

from pydantic import Field

from megatron_fapo.config.section import Section


class WeightSyncConfig(Section):
    bucket_mb: int = Field(512, gt=0)
    """Weights travel in buckets of this size, MiB."""
    verify_every: int = Field(0, ge=0)
    """Every so many refits each engine reports checksums of what it received, compared with what was sent.
    The first refit of a run is always compared. 0: only the first."""
    timeout_s: float = Field(600.0, gt=0)
