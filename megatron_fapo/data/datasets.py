"""Prompt datasets: JSONL and parquet rows in, tokenised Prompt records out, and the other way round.

Two row forms are read. The recipe's schema (one row per prompt):

    {data_source, prompt: [{role, content}], ability, reward_model: {style, ground_truth},
     extra_info: {split, index, question}}

and plain rows such as GSM8K's, when `question_key` and `answer_key` name their columns. Every malformed row of every
file is reported in one DatasetError, with file and line, before anything else starts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fapo.config.data import DataConfig
from megatron_fapo.data.records import Prompt
from megatron_fapo.data.testbed import Problem, make_problem
from megatron_fapo.errors import UserError

SUFFIXES = (".jsonl", ".parquet")
LISTED_VIOLATIONS = 20
INSTRUCTION = DataConfig().instruction


class DatasetError(UserError):
    """A dataset cannot be used; the message lists what is wrong, where, and the remedy."""


@dataclass(frozen=True)
class PromptSet:
    prompts: tuple[Prompt, ...]
    dropped_overlong: int
    """Rows left out because their prompt has more than max_prompt_tokens tokens."""


@dataclass(frozen=True)
class _Row:
    data_source: str
    index: int
    messages: tuple[dict[str, str], ...]
    ground_truth: str
    question: str
    extra_info: dict[str, Any]


def load_prompts(
    paths: Sequence[str | Path], tokenizer: Any, data: DataConfig, *, split: str = "train", limit: int | None = None
) -> PromptSet:
    """Read `paths` in order as one dataset, tokenised with the chat template of `tokenizer` (the policy's).

    `split` is written into extra_info of plain rows; `limit` uses only the first so many rows of the whole. A row that
    repeats an earlier (data_source, index), as in the recipe's repeated files, gets `#1`, `#2`, ... after its
    prompt_id, so that ids stay unique. Raises DatasetError: missing file, unknown suffix, malformed rows, prompts over
    `data.max_prompt_tokens` when `data.overlong_prompts` is `error`, or no prompt left.
    """
    if (data.question_key is None) != (data.answer_key is None):
        raise DatasetError("data.question_key and data.answer_key go together: set both, or neither")
    prompts: list[Prompt] = []
    violations: list[str] = []
    dropped = rows_seen = 0
    repetitions: dict[str, int] = {}
    token_cache: dict[tuple[str, ...], tuple[int, ...]] = {}
    files = [Path(path) for path in paths]
    unusable = [problem for path in files if (problem := _unusable(path)) is not None]
    if unusable:
        raise DatasetError(_listing(unusable))
    for path in files:
        for where, raw in _read_rows(path):
            if limit is not None and rows_seen == limit:
                break
            try:
                row = _parse_row(raw, data, path.stem, split, rows_seen)
                rows_seen += 1
                # Repeated rows are the rule (the recipe repeats its files 20 times): template and tokenise each once.
                cache_key = tuple(part for message in row.messages for part in message.values())
                if cache_key not in token_cache:
                    token_cache[cache_key] = _tokenise(tokenizer, row.messages)
                token_ids = token_cache[cache_key]
                if len(token_ids) > data.max_prompt_tokens and data.overlong_prompts == "error":
                    raise DatasetError(f"the prompt has {len(token_ids)} tokens, over {data.max_prompt_tokens}")
            except DatasetError as problem:
                violations.append(f"{where}: {problem}")
                continue
            if len(token_ids) > data.max_prompt_tokens:
                dropped += 1
                continue
            prompt_id = f"{row.data_source}/{row.index}"
            repetition = repetitions[prompt_id] = repetitions.get(prompt_id, -1) + 1
            prompts.append(
                Prompt(
                    prompt_id if repetition == 0 else f"{prompt_id}#{repetition}",
                    row.data_source,
                    row.messages,
                    row.ground_truth,
                    row.question,
                    token_ids,
                    row.extra_info,
                )
            )
    if violations:
        raise DatasetError(_listing(violations))
    if not prompts:
        reason = f"all {dropped} are over data.max_prompt_tokens={data.max_prompt_tokens}" if dropped else "no rows"
        raise DatasetError(f"no prompts in {', '.join(map(str, paths))}: {reason}")
    return PromptSet(tuple(prompts), dropped)


def write_prompts(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSONL or parquet, by the suffix of `path`. Raises DatasetError for any other suffix."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise DatasetError(_unknown_suffix(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
        return
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def prompt_row(data_source: str, question: str, ground_truth: str, split: str, index: int) -> dict[str, Any]:
    """One row in the recipe's schema, with the recipe's answer-format instruction after the question."""
    return {
        "data_source": data_source,
        "prompt": [{"role": "user", "content": f"{question}\n\n{INSTRUCTION}"}],
        "ability": "Math",
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": {"split": split, "index": index, "question": question},
    }


def write_testbed(
    out_dir: str | Path, n_train: int, n_eval: int, seed: int, *, min_steps: int = 2, max_steps: int = 3
) -> tuple[Path, Path]:
    """Write testbed problems as out_dir/train.jsonl and out_dir/eval.jsonl; no evaluation question is in train."""
    train = [make_problem(seed, i, min_steps, max_steps) for i in range(n_train)]
    seen = {problem.question for problem in train}
    held_out: list[Problem] = []
    index = n_train
    while len(held_out) < n_eval:
        problem = make_problem(seed, index, min_steps, max_steps)
        index += 1
        if problem.question not in seen:
            seen.add(problem.question)
            held_out.append(problem)
    paths = Path(out_dir) / "train.jsonl", Path(out_dir) / "eval.jsonl"
    for path, split, problems in zip(paths, ("train", "test"), (train, held_out), strict=True):
        write_prompts(path, (prompt_row("testbed", p.question, p.answer, split, i) for i, p in enumerate(problems)))
    return paths


def _unknown_suffix(path: Path) -> str:
    return f"{path}: unknown suffix {path.suffix!r}; datasets are {' or '.join(SUFFIXES)} files"


def _unusable(path: Path) -> str | None:
    if path.suffix not in SUFFIXES:
        return _unknown_suffix(path)
    if not path.is_file():
        return f"{path}: no such file; check the paths in data.train and data.eval"
    return None


def _read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) with 1-based line numbers; a line that is no JSON comes as the DatasetError that says so."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        number = 0
        try:
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
        except pyarrow.ArrowInvalid as error:
            raise DatasetError(f"{path}: not a readable parquet file: {error}") from error
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError as error:
                row = DatasetError(f"not a JSON object in UTF-8: {error}")
            yield f"{path}:{number}", row


def _parse_row(raw: Any, data: DataConfig, stem: str, split: str, number: int) -> _Row:
    if isinstance(raw, DatasetError):
        raise raw
    if not isinstance(raw, dict):
        raise DatasetError(f"the row must be an object, not {type(raw).__name__}")
    if data.question_key is not None and data.answer_key is not None:
        question, answer = (_text(raw, key) for key in (data.question_key, data.answer_key))
        messages = ({"role": "user", "content": f"{question}\n\n{data.instruction}"},)
        extra_info: dict[str, Any] = {"split": split, "index": number, "question": question}
        return _Row(stem, number, messages, _final_answer(answer), question, extra_info)
    extra_info = _object(raw, "extra_info")
    index = extra_info.get("index")
    if isinstance(index, bool) or not isinstance(index, int):
        raise DatasetError(f"extra_info.index must be an integer, got {index!r}")
    return _Row(
        _text(raw, "data_source"),
        index,
        _messages(raw.get("prompt")),
        _ground_truth(_object(raw, "reward_model").get("ground_truth")),
        _text(extra_info, "question", "extra_info."),
        extra_info,
    )


def _object(raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key)
    if not isinstance(value, dict):
        hint = "" if key in raw else f" (columns: {', '.join(raw)}; plain rows need data.question_key and answer_key)"
        raise DatasetError(f"{key} must be an object, got {value!r}{hint}")
    return value


def _text(raw: dict[str, Any], key: str, prefix: str = "") -> str:
    value = raw.get(key)
    if not isinstance(value, str) or not value.strip():
        hint = "" if key in raw else f" (columns here: {', '.join(raw)})"
        raise DatasetError(f"{prefix}{key} must be non-empty text, got {value!r}{hint}")
    return value


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise DatasetError(f"prompt must be a non-empty list of {{role, content}} messages, got {value!r}")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DatasetError(f"each prompt message needs role and content as text, got {message!r}")
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def _ground_truth(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise DatasetError(f"reward_model.ground_truth must be a number or non-empty text, got {value!r}")
    return str(value)


def _final_answer(answer: str) -> str:
    """GSM8K's convention: what follows the last `####`, thousands separators removed; without one, all of it."""
    final = answer.rpartition("####")[2].strip()
    if not final:
        raise DatasetError(f"nothing follows #### in the answer {answer[-60:]!r}")
    return re.sub(r"(?<=\d),(?=\d{3}\b)", "", final)


def _tokenise(tokenizer: Any, messages: tuple[dict[str, str], ...]) -> tuple[int, ...]:
    return tuple(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False))


def _listing(violations: list[str]) -> str:
    head = f"{len(violations)} problem{'s' if len(violations) > 1 else ''} in the datasets; correct or remove each:"
    more = len(violations) - LISTED_VIOLATIONS
    tail = [f"... and {more} more"] if more > 0 else []
    return "\n  ".join([head, *violations[:LISTED_VIOLATIONS], *tail])
