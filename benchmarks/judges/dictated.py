"""A vLLM logits processor that dictates each critique: whatever the model, it says what the problem's text demands.

A real server with a tiny random model then gives verdicts whose truth is known. `vllm serve --logits-processors
benchmarks.judges.dictated:Dictated`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from benchmarks.judges.problems import chance, critique, read_mark

if TYPE_CHECKING:
    from vllm.config import VllmConfig

FILLER = "And so on, step by step. "


class Dictated(LogitsProcessor):
    def __init__(self, vllm_config: VllmConfig, _device: torch.device, _is_pin_memory: bool) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(vllm_config.model_config.tokenizer)
        self._rows: dict[int, tuple[list[int], list[int]]] = {}
        """Row of the batch -> what it says, and what it has said."""

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, _, prompt, said in batch_update.added:
            self._rows[index] = self._script(prompt or []), said
        for one, other, direction in batch_update.moved:
            moved, displaced = self._rows.pop(one, None), self._rows.pop(other, None)
            if moved is not None:
                self._rows[other] = moved
            if displaced is not None and direction is MoveDirectionality.SWAP:
                self._rows[one] = displaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for index, (script, said) in self._rows.items():
            logits[index] = -torch.inf
            logits[index, script[min(len(said), len(script) - 1)]] = 0.0
        return logits

    def _script(self, prompt: list[int]) -> list[int]:
        number, verdict = read_mark(self._tokenizer.decode(prompt))
        text = FILLER * int(4 * chance("filler", number)) + critique(0, number, verdict, "healthy", (0, 0))[-60:]
        return [*self._tokenizer(text)["input_ids"], self._tokenizer.eos_token_id]
