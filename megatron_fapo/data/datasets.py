"""Prompt datasets: JSONL and parquet rows in, tokenised Prompt records out, and the other way round.

A policy's rows have two forms. The recipe's schema (one row per prompt):

    {data_source, prompt: [{role, content}], ability, reward_model: {style, ground_truth},
     extra_info: {split, index, question}}

and plain rows such as GSM8K's, when `question_key` and `answer_key` name their columns. The critic's rows are in
data/critic.py. Every malformed row of every file is reported, with file and line, before anything else starts.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fapo.config.data import DataConfig
from megatron_fapo.data.critic import parse_critic_row
from megatron_fapo.data.records import Prompt
from megatron_fapo.data.rows import DatasetError, Row, capped, listing, parse_policy_row
from megatron_fapo.data.testbed import Problem, make_problem

SUFFIXES = (".jsonl", ".parquet")
INSTRUCTION = DataConfig().instruction


@dataclass(frozen=True)
class PromptSet:
    prompts: tuple[Prompt, ...]
    dropped_overlong: int
    """Rows left out because their prompt has more than max_prompt_tokens tokens."""
    skipped_bad: tuple[str, ...] = ()
    """What is wrong with each row left out under `data.bad_rows: skip`, with file and line."""
    merged_repeats: int = 0
    """Rows left out under `data.merge_repeats`."""

    def left_out(self) -> list[str]:
        """For the log: what the files have and `prompts` has not. Empty when all rows are there."""
        notes = []
        if self.dropped_overlong:
            notes.append(f"{self.dropped_overlong} prompts over data.max_prompt_tokens were left out")
        if self.merged_repeats:
            notes.append(f"{self.merged_repeats} rows that repeat an earlier one were left out")
        if self.skipped_bad:
            head = f"{len(self.skipped_bad)} malformed rows were left out:"
            notes.append("\n  ".join([head, *capped(self.skipped_bad)]))
        return notes


def load_prompts(
    paths: Sequence[str | Path],
    tokenizer: Any,
    data: DataConfig,
    *,
    task: str = "policy",
    split: str = "train",
    limit: int | None = None,
) -> PromptSet:
    """Read `paths` in order as one dataset, tokenised with the chat template of `tokenizer` (that of what is trained).

    `task` is reward.task; `split` is written into extra_info of plain rows; `limit` uses only the first so many rows
    of the whole. A policy's row that repeats an earlier (data_source, index), as in the recipe's repeated files, gets
    `#1`, `#2`, ... after its prompt_id, so that ids stay unique; a critic's is malformed. Raises DatasetError: missing
    file, unknown suffix, malformed rows unless `data.bad_rows` is `skip`, prompts over `data.max_prompt_tokens` when
    `data.overlong_prompts` is `error`, or no prompt left.
    """
    if (data.question_key is None) != (data.answer_key is None):
        raise DatasetError("data.question_key and data.answer_key go together: set both, or neither")
    if task == "critic" and data.question_key is not None:
        raise DatasetError("data.question_key is for a policy's plain rows; unset it and answer_key for the critic")
    files = [Path(path) for path in paths]
    if unusable := [problem for path in files if (problem := _unusable(path)) is not None]:
        raise DatasetError(listing(unusable))
    prompts: list[Prompt] = []
    refused: list[str] = []
    skipped: list[str] = []
    dropped = 0
    repeats = _Repeats(task, data.merge_repeats)
    token_cache: dict[tuple[str, ...], tuple[int, ...]] = {}
    rows = ((path.stem, *row) for path in files for row in read_rows(path))
    for number, (stem, where, raw) in enumerate(itertools.islice(rows, limit)):
        try:
            if task == "critic":
                row = parse_critic_row(raw, number)
            else:
                row = parse_policy_row(raw, data, stem, split, number)
            if repeats.merges(row, where):
                continue
        except DatasetError as problem:
            (skipped if data.bad_rows == "skip" else refused).append(f"{where}: {problem}")
            continue
        # Repeated rows are the rule (the recipe repeats its files 20 times): template and tokenise each once.
        if row.text not in token_cache:
            token_cache[row.text] = _tokenise(tokenizer, row.messages)
        token_ids = token_cache[row.text]
        if len(token_ids) > data.max_prompt_tokens:
            dropped += 1
            if data.overlong_prompts == "error":
                refused.append(f"{where}: the prompt has {len(token_ids)} tokens, over {data.max_prompt_tokens}")
            continue
        prompt_id = repeats.unique_id(row)
        prompts.append(
            Prompt(prompt_id, row.data_source, row.messages, row.ground_truth, row.question, token_ids, row.extra_info)
        )
    if refused:
        raise DatasetError(listing(refused))
    loaded = PromptSet(tuple(prompts), dropped, tuple(skipped), repeats.merged)
    if not prompts:
        reasons = "; ".join(loaded.left_out()) or "no rows"
        where = f"{', '.join(map(str, paths))} (data.max_prompt_tokens={data.max_prompt_tokens})"
        raise DatasetError(f"no prompts in {where}: {reasons}")
    return loaded


class _Repeats:
    """Which rows have been read before, and where."""

    def __init__(self, task: str, merge: bool) -> None:
        self._critic, self._merge = task == "critic", merge
        self._first: dict[tuple[Any, ...], str] = {}
        self._ids: Counter[str] = Counter()
        self.merged = 0

    def merges(self, row: Row, where: str) -> bool:
        """Whether `row` is an earlier one over again that is to be left out.

        Raises DatasetError for a critic's row that repeats the prompt or the index of an earlier one: it would count
        twice, or with two labels.
        """
        index = row.extra_info.get("index")
        whole = (row.data_source, index, row.text, row.ground_truth)
        if self._merge and whole in self._first:
            self.merged += 1
            return True
        if self._critic:
            keys: dict[str, tuple[Any, ...]] = {"prompt": (row.data_source, row.text)}
            if index is not None:
                keys["extra_info.index"] = (row.data_source, index)
            for name, key in keys.items():
                if key in self._first:
                    raise DatasetError(f"the same data_source and {name} as {self._first[key]}")
            self._first |= dict.fromkeys(keys.values(), where)
        self._first[whole] = where
        return False

    def unique_id(self, row: Row) -> str:
        prompt_id = f"{row.data_source}/{row.index}"
        self._ids[prompt_id] += 1
        repetition = self._ids[prompt_id] - 1
        return f"{prompt_id}#{repetition}" if repetition else prompt_id


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


def prompt_row(
    data_source: str, question: str, ground_truth: str, split: str, index: int, *, instruction: str = INSTRUCTION
) -> dict[str, Any]:
    """One row in the recipe's schema, with the recipe's answer-format instruction after the question."""
    return {
        "data_source": data_source,
        "prompt": [{"role": "user", "content": f"{question}\n\n{instruction}"}],
        "ability": "Math",
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": {"split": split, "index": index, "question": question},
    }


def write_testbed(out_dir: str | Path, n_train: int, n_eval: int, seed: int) -> tuple[Path, Path]:
    """Write testbed problems as out_dir/train.jsonl and out_dir/eval.jsonl; no evaluation question is in train."""
    train = [make_problem(seed, i) for i in range(n_train)]
    seen = {problem.question for problem in train}
    held_out: list[Problem] = []
    index = n_train
    while len(held_out) < n_eval:
        problem = make_problem(seed, index)
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


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
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


def _tokenise(tokenizer: Any, messages: tuple[dict[str, str], ...]) -> tuple[int, ...]:
    return tuple(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False))
