"""The place in an endless, shuffled sequence of prompts, small enough to write into every checkpoint.

Invariants: each prompt comes exactly once per epoch; the order of an epoch depends on (seed, epoch) alone, so a resumed
run sees what the uninterrupted one would have seen; a take may reach over the end of an epoch, or over several.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Sequence
from typing import Any

from megatron_fapo.data.records import Prompt


class DataCursor:
    """Hands out (prompt, epoch) pairs in order. Raises ValueError when `prompts` is empty."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool = True) -> None:
        if not prompts:
            raise ValueError("a data cursor needs at least one prompt")
        self._prompts = prompts
        self._identity = {"seed": seed, "shuffle": shuffle, "fingerprint": fingerprint(prompts)}
        self._move(epoch=0, offset=0)

    def take(self, k: int) -> list[tuple[Prompt, int]]:
        """The next k prompts, each with the epoch it belongs to."""
        taken: list[tuple[Prompt, int]] = []
        while len(taken) < k:
            if self._offset == len(self._prompts):
                self._move(self._epoch + 1, 0)
            chosen = self._order[self._offset : self._offset + k - len(taken)]
            taken += [(self._prompts[i], self._epoch) for i in chosen]
            self._offset += len(chosen)
        return taken

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: epoch, offset, seed, shuffle and the fingerprint of the dataset."""
        return {"epoch": self._epoch, "offset": self._offset, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at `state`. Raises ValueError when it belongs to other prompts, another seed or another order."""
        changed = [
            f"{key} is {mine!r} here and {state[key]!r} there"
            for key, mine in self._identity.items()
            if state[key] != mine
        ]
        if changed:
            raise ValueError(
                f"the checkpoint's data position belongs to another sequence of prompts ({'; '.join(changed)}): "
                "resume with the same data files, tokenizer, max_prompt_tokens, seed and shuffle, or start a new run "
                "from its weights"
            )
        self._move(state["epoch"], state["offset"])

    def _move(self, epoch: int, offset: int) -> None:
        order = list(range(len(self._prompts)))
        if self._identity["shuffle"]:
            random.Random(f"{self._identity['seed']}/{epoch}").shuffle(order)
        self._epoch, self._offset, self._order = epoch, offset, order


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """A digest of ids, tokens and ground truths in order: equal when a resumed run would see the same prompts."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(repr((prompt.prompt_id, prompt.ground_truth)).encode())
        digest.update(array("q", (len(prompt.token_ids), *prompt.token_ids)).tobytes())
    return digest.hexdigest()[:32]
