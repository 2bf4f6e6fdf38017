"""`fapo data prepare`: the recipe's data sets and the GenRM's benchmarks, as parquet in the recipe's row schema.

Sources are the published data sets, from local files or from the Hugging Face hub. Each builder turns one source row
into one of ours. Rows are never repeated: that is what rollout.samples_per_prompt and
training.evaluation.samples_per_prompt are for. The same sources and seed give the same bytes.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from megatron_fapo.data.critic import critic_row, parse_critic_row
from megatron_fapo.data.datasets import INSTRUCTION, prompt_row, read_rows, write_prompts
from megatron_fapo.data.rows import DatasetError, as_object, final_answer, integer_at, listing, text_at
from megatron_fapo.errors import UserError
from megatron_fapo.genrm.prompts import judge_messages
from megatron_fapo.genrm.rules import last_boxed

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
LETTER_INSTRUCTION = INSTRUCTION.replace("final answer", "final answer (only the choice letter)")
NOT_GIVEN = "(not given)"
"""Stands in the judge's prompt where the source has no ground truth."""


@dataclass(frozen=True)
class _Place:
    """What a builder may need to know beside the row itself."""

    stem: str
    """Name of the row's file, without suffix."""
    split: str
    index: int
    """The row's place in the file that is written."""
    seed: int
    questions: dict[str, int]
    """Numbers of the questions met so far in this set."""


_Build = Callable[[dict[str, Any], _Place], dict[str, Any] | None]


def _dapo_math(raw: dict[str, Any], at: _Place) -> dict[str, Any]:
    return prompt_row("math-dapo", text_at(raw, "prompt").strip(), _scalar(raw, "solution"), at.split, at.index)


def _gsm8k(raw: dict[str, Any], at: _Place) -> dict[str, Any]:
    answer = text_at(raw, "answer")
    if "####" not in answer:
        raise DatasetError(f"no #### in the answer {answer[-60:]!r}")
    return prompt_row("gsm8k", text_at(raw, "question").strip(), final_answer(answer), at.split, at.index)


def _aime(year: str) -> _Build:
    def build(raw: dict[str, Any], at: _Place) -> dict[str, Any]:
        answer = _scalar(raw, "Answer", "answer", "solution")
        integer = re.fullmatch(r"(\d{1,3})(\^\\circ|°)?", answer)
        if integer is None:
            raise DatasetError(f"an AIME answer is an integer from 0 to 999, got {answer!r}")
        question = text_at(raw, "Problem" if "Problem" in raw else "problem").strip()
        return prompt_row(f"aime{year}", question, str(int(integer[1])), at.split, at.index)

    return build


def _gpqa(raw: dict[str, Any], at: _Place) -> dict[str, Any]:
    """The question that the judge reads has the options too: without them no judge could tell what the letter means."""
    question = text_at(raw, "Question").strip()
    right, *wrong = (
        text_at(raw, key).strip() for key in ("Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3)))
    )
    if right in wrong:
        raise DatasetError(f"the right option {right!r} is among the wrong ones")
    options = [right, *wrong]
    # Seeded by the question, so that the order of one question depends on no other row.
    random.Random(f"{at.seed}/{question}").shuffle(options)
    lines = [question, *(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))]
    answer = "ABCD"[options.index(right)]
    return prompt_row("gpqa-diamond", "\n".join(lines), answer, at.split, at.index, instruction=LETTER_INSTRUCTION)


def _fapo_critic(raw: dict[str, Any], at: _Place) -> dict[str, Any]:
    parse_critic_row(raw, at.index)
    return raw


def _process_bench(raw: dict[str, Any], at: _Place) -> dict[str, Any]:
    """Without a column of answers no row gets a ground truth: one for the right solutions alone would mark them."""
    return _process_bench_row("ProcessBench", raw, at, _given_answer(raw) or (NOT_GIVEN, "nowhere"))


def _flawed_positive_bench(raw: dict[str, Any], at: _Place) -> dict[str, Any] | None:
    """Only right final answers, so the solution's own last box is the ground truth where the source has none."""
    if raw.get("final_answer_correct") is False:
        return None
    boxed = last_boxed("\n\n".join(_steps(raw)))
    own = (boxed.strip(), "solution") if boxed and boxed.strip() else (NOT_GIVEN, "nowhere")
    return _process_bench_row("FlawedPositiveBench", raw, at, _given_answer(raw) or own)


def _process_bench_row(benchmark: str, raw: dict[str, Any], at: _Place, truth: tuple[str, str]) -> dict[str, Any]:
    row_id = str(raw.get("id", ""))
    subset = re.match(r"gsm8k|math|olympiadbench|omnimath", row_id) or re.match(r"[a-z0-9]+", at.stem.lower())
    if subset is None:
        raise DatasetError(f"neither the id {row_id!r} nor the file's name tells the subset")
    correct = raw.get("final_answer_correct")
    if not isinstance(correct, bool):
        raise DatasetError(f"final_answer_correct must be true or false, got {correct!r}")
    further = {"id": row_id, "final_answer_correct": correct, "ground_truth_from": truth[1]}
    label, data_source = integer_at(raw, "label"), f"{benchmark}/{subset[0]}"
    return _judged(data_source, text_at(raw, "problem"), truth[0], raw, label, at, further)


def _bigbench_mistake(raw: dict[str, Any], at: _Place) -> dict[str, Any]:
    """An answer can be wrong with no step marked: the label is the annotators', not derived from the answer."""
    label = -1 if raw.get("mistake_index", 0) is None else integer_at(raw, "mistake_index")
    target = _scalar(raw, "target")
    answer = None if raw.get("answer", "") is None else _scalar(raw, "answer")  # Null: the solution gives none.
    further = {"final_answer_correct": answer == target, "ground_truth_from": "source"}
    return _judged(f"BIGBenchMistake/{at.stem}", text_at(raw, "input"), target, raw, label, at, further)


def _judged(
    data_source: str, question: str, truth: str, raw: dict[str, Any], label: int, at: _Place, further: dict[str, Any]
) -> dict[str, Any]:
    steps = _steps(raw)
    row = critic_row(
        data_source,
        judge_messages(question.strip(), truth, steps, "tagged"),
        label,
        len(steps),
        question_index=at.questions.setdefault(question, len(at.questions)),
        split=at.split,
        index=at.index,
        **further,
    )
    parse_critic_row(row, at.index)
    return row


def _steps(raw: dict[str, Any]) -> list[str]:
    steps = raw.get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps) or not "".join(steps).strip():
        raise DatasetError(f"steps must be a list of texts, got {steps!r}")
    return steps


def _given_answer(raw: dict[str, Any]) -> tuple[str, str] | None:
    present = [key for key in ("ground_truth", "answer") if raw.get(key) is not None]
    return (_scalar(raw, *present), "source") if present else None


def _scalar(raw: dict[str, Any], *keys: str) -> str:
    """The first of these columns that the row has, as text."""
    value = next((raw[key] for key in keys if raw.get(key) is not None), None)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise DatasetError(f"{' or '.join(keys)} must be text or a number, got {value!r} (columns: {', '.join(raw)})")
    return str(value).strip()


@dataclass(frozen=True)
class _Set:
    build: _Build
    split: str | None
    """None: by the name of each source file, and each split in a file of its own."""
    repo: str | None = None
    """Data set on the Hugging Face hub."""
    files: tuple[str, ...] = ("*",)
    """Which files of a folder belong to the set: patterns of paths without suffix."""


SETS: Mapping[str, _Set] = {
    "dapo-math": _Set(_dapo_math, "train", "open-r1/DAPO-Math-17k-Processed", ("all/*", "train*")),
    "gsm8k": _Set(_gsm8k, None, "openai/gsm8k", ("main/*", "train*", "test*")),
    "aime24": _Set(_aime("24"), "test", "Maxwell-Jia/AIME_2024"),
    "aime25": _Set(_aime("25"), "test", "yentinglin/aime_2025"),
    "gpqa-diamond": _Set(_gpqa, "test", "Idavidrein/gpqa", ("*diamond*",)),
    "fapo-critic": _Set(_fapo_critic, None, "dyyyyyyyy/FAPO-Critic"),
    "processbench": _Set(_process_bench, "test", "Qwen/ProcessBench"),
    "flawed-positive-bench": _Set(_flawed_positive_bench, "test", "Qwen/ProcessBench"),
    "bigbench-mistake": _Set(_bigbench_mistake, "test"),
}


@dataclass
class _Output:
    rows: list[dict[str, Any]]
    source: str
    dropped: Counter[str]


def prepare(sets: Sequence[str], out: Path, sources: Mapping[str, Path], seed: int) -> dict[str, Any]:
    """Write each of `sets` into `out`, with a manifest.json, and return the manifest's entries of what was written.

    `sources` names local files or folders by set; the others are downloaded. Nothing is written unless every row of
    every set is sound. Raises DatasetError with all bad rows and all sources that cannot be had.
    """
    outputs: dict[str, _Output] = {}
    problems: list[str] = []
    for name in dict.fromkeys(sets):
        try:
            files, source = _locate(name, sources.get(name))
            built, bad = _build(name, files, source, seed)
            outputs |= built
            problems += bad or [f"{file}: no rows in {source}" for file, output in built.items() if not output.rows]
        except DatasetError as problem:
            problems.append(f"{name}: {problem}")
    if problems:
        raise DatasetError(listing(problems))
    return _write(outputs, out, seed)


def prepare_command(sets: Sequence[str], *, out: Path, sources: Sequence[str], seed: int) -> int:
    """`fapo data prepare`: returns the exit code. Raises UserError for unknown sets and for sources of other sets."""
    pairs = dict(entry.partition("=")[::2] for entry in sources)
    problems = [f"no set {name!r}: the sets are {', '.join(SETS)}" for name in sets if name not in SETS]
    problems += [f"--source {name}={path}: write SET=PATH" for name, path in pairs.items() if not path]
    problems += [f"--source {name}: {name} is not among the sets to prepare" for name in pairs if name not in sets]
    if problems:
        raise UserError("\n".join(problems))
    for file, entry in prepare(sets, out, {name: Path(path) for name, path in pairs.items()}, seed).items():
        dropped = "".join(f", {count} left out ({why})" for why, count in entry["dropped"].items())
        print(f"{out / file}: {entry['rows']} rows from {entry['source']}{dropped}")
    return 0


def _build(name: str, files: Sequence[Path], source: str, seed: int) -> tuple[dict[str, _Output], list[str]]:
    """The outputs of one set, and its bad rows. Of rows with the same prompt the first stays."""
    spec = SETS[name]
    outputs: dict[str, _Output] = defaultdict(lambda: _Output([], source, Counter()))
    answers: dict[tuple[str, ...], Any] = {}
    questions: dict[str, int] = {}
    bad: list[str] = []
    for path in files:
        split = spec.split or ("test" if re.search(r"(?<![a-z])test", path.stem.lower()) else "train")
        file = f"{name}.parquet" if spec.split else f"{name}-{split}.parquet"
        output = outputs[file]
        for where, raw in _source_rows(path):
            try:
                row = spec.build(as_object(raw), _Place(path.stem, split, len(output.rows), seed, questions))
            except DatasetError as problem:
                bad.append(f"{where}: {problem}")
                continue
            if row is None:
                output.dropped["final answer is wrong"] += 1
                continue
            prompt = (file, row["data_source"], *(message["content"] for message in row["prompt"]))
            answer = row["reward_model"]["ground_truth"]
            if prompt not in answers:
                answers[prompt] = answer
                output.rows.append(row)
            else:
                output.dropped["repeated prompt" if answers[prompt] == answer else "another answer to a prompt"] += 1
    return outputs, bad


def _write(outputs: Mapping[str, _Output], out: Path, seed: int) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    manifest_path = out / "manifest.json"
    # Sets are prepared one after the other into one folder: what is there stays listed.
    manifest = json.loads(manifest_path.read_text(encoding="utf-8")) if manifest_path.is_file() else {}
    written = {}
    for file, output in outputs.items():
        beside = out / f".partial-{file}"
        write_prompts(beside, output.rows)
        sha256 = hashlib.sha256(beside.read_bytes()).hexdigest()
        beside.replace(out / file)
        written[file] = {
            "rows": len(output.rows),
            "source": output.source,
            "seed": seed,
            "dropped": dict(output.dropped),
            "sha256": sha256,
        }
    manifest_path.write_text(json.dumps(manifest | written, indent=2) + "\n", encoding="utf-8")
    return written


def _locate(name: str, source: Path | None) -> tuple[list[Path], str]:
    """The files of a set, in order, and the source as the manifest names it."""
    spec = SETS[name]
    patterns = [f"{pattern}{suffix}" for pattern in spec.files for suffix in SUFFIXES]
    root, label = (source, str(source)) if source is not None else _download(name, spec.repo, patterns)
    if root.is_file():
        if root.suffix not in SUFFIXES:
            raise DatasetError(f"{root}: sources are {', '.join(SUFFIXES)} files")
        return [root], label
    files = sorted(path for path in root.rglob("*") if path.is_file())
    files = [path for path in files if any(fnmatch(path.relative_to(root).as_posix(), p) for p in patterns)]
    if not files:
        wanted = " or ".join(f"{pattern}{{{','.join(SUFFIXES)}}}" for pattern in spec.files)
        raise DatasetError(f"{root}: no such file, and no folder with {wanted}")
    return files, label


def _download(name: str, repo: str | None, patterns: list[str]) -> tuple[Path, str]:
    remedy = f"pass a copy as --source {name}=PATH (a file or a folder)"
    if repo is None:
        raise DatasetError(f"this set is not on the Hugging Face hub: {remedy}")
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        # The folder is named after the commit.
        folder = Path(snapshot_download(repo, repo_type="dataset", allow_patterns=patterns))
    except GatedRepoError as error:
        terms = f"accept its terms at https://huggingface.co/datasets/{repo} and set HF_TOKEN"
        raise DatasetError(f"{repo} is gated: {terms}, or {remedy}") from error
    except (OSError, HTTPError) as error:
        raise DatasetError(f"cannot download {repo} ({str(error).strip().splitlines()[0]}): {remedy}") from error
    return folder, f"{repo}@{folder.name}"


def _source_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, row) of a file of any of SUFFIXES. Raises DatasetError for a file that is not what its suffix says."""
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                for number, row in enumerate(csv.DictReader(file, restkey="(without a heading)"), start=1):
                    yield f"{path} row {number}", row
        elif path.suffix == ".json" and path.read_bytes().lstrip().startswith(b"["):
            for number, row in enumerate(json.loads(path.read_bytes()), start=1):
                yield f"{path} row {number}", row
        else:  # A .json file that is no list has an object on each line.
            yield from read_rows(path)
    except (ValueError, csv.Error) as error:
        raise DatasetError(f"{path}: not a {path.suffix[1:]} file in UTF-8: {error}") from error
