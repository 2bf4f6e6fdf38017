"""Rows that train and test the critic (the GenRM itself): a judge's prompt, and where the first error really is.

As FAPO-Critic is published, and as `fapo data prepare` writes benchmarks:

    {data_source, prompt: [{role, content}], ability: "math_critic", reward_model: {ground_truth: int, style: "rule"},
     extra_info: {question_index, split, total_steps, ...}}

The label is -1 (no error) or the 0-based index of the first wrong paragraph. A wrong label or count of steps would not
fail a run, it would quietly teach the wrong verdict; hence the checks against the prompt's own tags.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from megatron_fapo.data.rows import (
    DatasetError,
    Row,
    as_object,
    integer_at,
    looks_like_critic_row,
    messages_at,
    object_at,
    text_at,
)

_TAG = re.compile(r"<paragraph_(\d+)>")


def critic_row(
    data_source: str,
    messages: Sequence[dict[str, str]],
    label: int,
    total_steps: int,
    *,
    question_index: int,
    split: str,
    **extra_info: Any,
) -> dict[str, Any]:
    """One critic row of `messages` as genrm/prompts.judge_messages makes them; further keys go to its extra_info."""
    return {
        "data_source": data_source,
        "prompt": list(messages),
        "ability": "math_critic",
        "reward_model": {"ground_truth": label, "style": "rule"},
        "extra_info": {"question_index": question_index, "split": split, "total_steps": total_steps, **extra_info},
    }


def parse_critic_row(raw: Any, number: int) -> Row:
    """The row of a critic's dataset; its index is extra_info.index, or else `number`, its place in the dataset.

    Raises DatasetError with the first thing that is wrong.
    """
    raw = as_object(raw)
    extra_info = object_at(raw, "extra_info")
    if not looks_like_critic_row(raw):
        raise DatasetError("a policy's row in a critic's dataset: set reward.task: policy, or take the file out")
    messages = messages_at(raw)
    total_steps = integer_at(extra_info, "total_steps", "extra_info.")
    if total_steps < 1:
        raise DatasetError(f"extra_info.total_steps must be positive, got {total_steps}")
    label = integer_at(object_at(raw, "reward_model"), "ground_truth", "reward_model.")
    if not -1 <= label < total_steps:
        raise DatasetError(f"the label reward_model.ground_truth must be in -1..{total_steps - 1}, got {label}")
    prompt = messages[-1]["content"]
    _check_tags(prompt, total_steps)
    # Absent as published; parquet gives every row all columns, so absent is None there.
    index = number if extra_info.get("index") is None else integer_at(extra_info, "index", "extra_info.")
    return Row(text_at(raw, "data_source"), index, messages, str(label), _problem(prompt), extra_info)


def _check_tags(prompt: str, total_steps: int) -> None:
    tags = [int(number) for number in _TAG.findall(prompt)]
    if not tags:
        return
    for expected, found in enumerate(tags):
        if found != expected:
            raise DatasetError(f"the paragraph tags must count 0, 1, 2, ...: <paragraph_{found}> is number {expected}")
    if len(tags) != total_steps:
        raise DatasetError(f"extra_info.total_steps is {total_steps}, and the prompt has {len(tags)} tagged paragraphs")


def _problem(prompt: str) -> str:
    """The bare problem of a judge's prompt; the whole prompt where it has no such section."""
    _, _, rest = prompt.partition("[Math Problem]")
    problem, end, _ = rest.partition("[Ground Truth]")
    return problem.strip() if end else prompt
