"""One row of a policy's dataset, in the recipe's schema or plain, and what rows of every kind are checked with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_fapo.config.data import DataConfig
from megatron_fapo.errors import UserError

LISTED_VIOLATIONS = 20


class DatasetError(UserError):
    """A dataset cannot be used; the message lists what is wrong, where, and the remedy."""


@dataclass(frozen=True)
class Row:
    """A row that has passed its checks, before it is tokenised."""

    data_source: str
    index: int
    messages: tuple[dict[str, str], ...]
    ground_truth: str
    question: str
    extra_info: dict[str, Any]

    @property
    def text(self) -> tuple[str, ...]:
        """All that the messages say: two rows with the same text are the same prompt."""
        return tuple(part for message in self.messages for part in message.values())


def parse_policy_row(raw: Any, data: DataConfig, stem: str, split: str, number: int) -> Row:
    """The row of a policy's dataset; `stem`, `split` and `number` become data_source, split and index of plain rows.

    Raises DatasetError with the first thing that is wrong.
    """
    raw = as_object(raw)
    if data.question_key is not None and data.answer_key is not None:
        question, answer = (text_at(raw, key) for key in (data.question_key, data.answer_key))
        messages = ({"role": "user", "content": f"{question}\n\n{data.instruction}"},)
        plain_info: dict[str, Any] = {"split": split, "index": number, "question": question}
        return Row(stem, number, messages, final_answer(answer), question, plain_info)
    if looks_like_critic_row(raw):
        raise DatasetError("a critic's row in a policy's dataset: set reward.task: critic, or take the file out")
    extra_info = object_at(raw, "extra_info", "plain rows need data.question_key and data.answer_key")
    return Row(
        text_at(raw, "data_source"),
        integer_at(extra_info, "index", "extra_info."),
        messages_at(raw),
        _ground_truth(object_at(raw, "reward_model").get("ground_truth")),
        text_at(extra_info, "question", "extra_info."),
        extra_info,
    )


def looks_like_critic_row(raw: dict[str, Any]) -> bool:
    """Critic rows, and no others, have this ability or count the steps of a solution."""
    extra_info = raw.get("extra_info")
    has_steps = isinstance(extra_info, dict) and extra_info.get("total_steps") is not None
    return has_steps or raw.get("ability") == "math_critic"


def as_object(raw: Any) -> dict[str, Any]:
    """`raw` itself. Raises what the reader could not read, and DatasetError for anything that is no object."""
    if isinstance(raw, DatasetError):
        raise raw
    if not isinstance(raw, dict):
        raise DatasetError(f"the row must be an object, not {type(raw).__name__}")
    return raw


def object_at(raw: dict[str, Any], key: str, remedy: str = "") -> dict[str, Any]:
    value = raw.get(key)
    if not isinstance(value, dict):
        hint = "" if key in raw else f" (columns: {'; '.join([', '.join(raw), *([remedy] if remedy else [])])})"
        raise DatasetError(f"{key} must be an object, got {value!r}{hint}")
    return value


def text_at(raw: dict[str, Any], key: str, prefix: str = "") -> str:
    value = raw.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DatasetError(f"{prefix}{key} must be non-empty text, got {value!r}{_columns(raw, key)}")
    return value


def integer_at(raw: dict[str, Any], key: str, prefix: str = "") -> int:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise DatasetError(f"{prefix}{key} must be an integer, got {value!r}{_columns(raw, key)}")
    return value


def messages_at(raw: dict[str, Any]) -> tuple[dict[str, str], ...]:
    value = raw.get("prompt")
    if not isinstance(value, list) or not value:
        raise DatasetError(f"prompt must be a non-empty list of {{role, content}} messages, got {value!r}")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DatasetError(f"each prompt message needs role and content as text, got {message!r}")
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def final_answer(answer: str) -> str:
    """GSM8K's convention: what follows the last `####`, thousands separators removed; without one, all of it."""
    final = answer.rpartition("####")[2].strip()
    if not final:
        raise DatasetError(f"nothing follows #### in the answer {answer[-60:]!r}")
    return re.sub(r"(?<=\d),(?=\d{3}\b)", "", final)


def listing(violations: Sequence[str]) -> str:
    """One message of all violations, the first 20 in full."""
    head = f"{len(violations)} problem{'s' if len(violations) > 1 else ''} in the datasets; correct or remove each:"
    return "\n  ".join([head, *capped(violations)])


def capped(lines: Sequence[str]) -> list[str]:
    """The first 20 of `lines`, and how many more there are."""
    more = len(lines) - LISTED_VIOLATIONS
    return [*lines[:LISTED_VIOLATIONS], *([f"... and {more} more"] if more > 0 else [])]


def _columns(raw: dict[str, Any], key: str) -> str:
    return "" if key in raw else f" (columns here: {', '.join(raw)})"


def _ground_truth(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise DatasetError(f"reward_model.ground_truth must be a number or non-empty text, got {value!r}")
    return str(value)
