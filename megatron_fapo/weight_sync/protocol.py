"""When an engine may serve, and what a whole refit is. Pure: no I/O, no processes, no vLLM.

    FRESH(v) --begin--> UPDATING --complete(v+1)--> FRESH(v+1)
                            |fail
                            v
                          STALE --begin--> UPDATING ...

Invariants: an engine serves only while FRESH; its version changes only when a whole refit has completed; whatever
fails in between leaves it STALE, from where a new refit may begin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


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


def share_to_verify(refits_done: int, verify_every: int, verify_share: float) -> float:
    """Share of the copies of the next refit whose checksums are compared: all in the first of a run, and in every
    `verify_every`-th (0: in no other); else `verify_share`."""
    whole = refits_done == 0 or (verify_every > 0 and refits_done % verify_every == 0)
    return 1.0 if whole else verify_share


SumsOf = Sequence[tuple[int, int, int, int]]
"""Of one process: (part, copy, and the two numbers of its checksum)."""


def require_equal_sums(given: Sequence[SumsOf], taken: Sequence[SumsOf], counts: Sequence[int] | None = None) -> None:
    """Compare the checksums of policy ranks with each other's and with those of workers.

    Args:
        counts: how many copies each worker was to check; None: not known.

    Raises:
        RefitError: replicas of the policy differ, or something arrived other than it was given, or unchecked.
    """
    truth: dict[tuple[int, int], tuple[int, int]] = {}
    for part, copy, *pair in (each for sums in given for each in sums):
        if truth.setdefault((part, copy), (pair[0], pair[1])) != (pair[0], pair[1]):
            raise RefitError(f"replicas of the policy hold different weights (part {part}, copy {copy} of the plan)")
    for worker, sums in enumerate(taken):
        if counts is not None and len(sums) != counts[worker]:
            raise RefitError(f"worker {worker} checked {len(sums)} copies of {counts[worker]}")
        wrong = [(part, copy) for part, copy, *pair in sums if truth.get((part, copy)) != (pair[0], pair[1])]
        if wrong:
            where = ", ".join(f"copy {copy} of part {part}" for part, copy in wrong[:3])
            raise RefitError(
                f"{len(wrong)} of {len(sums)} checked copies arrived at worker {worker} with other bytes than were "
                f"given: {where}"
            )
