"""Every scored sample of a step in one file, so that 'why did this sample get 0?' has an answer after the run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_fapo.data.records import ScoredSample
from megatron_fapo.observe.files import json_line, read_json_lines, write_atomically


def write_samples(run_dir: Path, step: int, samples: Iterable[ScoredSample]) -> Path:
    """Write `samples/step_000123.jsonl` whole or not at all; returns its path."""
    path = run_dir / "samples" / f"step_{step:06d}.jsonl"
    write_atomically(path, "".join(json_line(sample_record(sample)) for sample in samples))
    return path


def sample_steps(run_dir: Path) -> dict[int, Path]:
    """Step -> file of samples, in order of step."""
    return {int(path.stem.removeprefix("step_")): path for path in sorted((run_dir / "samples").glob("step_*.jsonl"))}


def write_evaluation_samples(run_dir: Path, name: str, samples: Iterable[ScoredSample]) -> Path:
    """Write `samples/eval_<name>.jsonl`, the samples of an evaluation set, whole or not at all; returns its path."""
    path = run_dir / "samples" / f"eval_{name}.jsonl"
    write_atomically(path, "".join(json_line(sample_record(sample)) for sample in samples))
    return path


def evaluation_samples(run_dir: Path) -> dict[str, Path]:
    """Evaluation set -> file of samples."""
    return {path.stem.removeprefix("eval_"): path for path in sorted((run_dir / "samples").glob("eval_*.jsonl"))}


def read_samples(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """The records that `write_samples` wrote for a step."""
    return read_json_lines(run_dir / "samples" / f"step_{step:06d}.jsonl")


def sample_record(scored: ScoredSample) -> dict[str, Any]:
    """One sample flat: who it is, what was written, and everything that made its reward."""
    sample, score, verdict = scored.sample, scored.score, scored.score.verdict
    return {
        "prompt_id": sample.key.prompt_id,
        "epoch": sample.key.epoch,
        "sample_index": sample.key.sample_index,
        "data_source": sample.prompt.data_source,
        "question": sample.prompt.question,
        "messages": list(sample.prompt.messages),
        "ground_truth": sample.prompt.ground_truth,
        "text": sample.text,
        "prompt_tokens": len(sample.prompt.token_ids),
        "response_tokens": len(sample.token_ids),
        "finish_reason": sample.finish_reason,
        "weight_version": sample.weight_version,
        "later_versions": [list(start) for start in sample.later_versions],
        "reward": score.reward,
        "correct": score.correct,
        "prediction": score.prediction,
        "flawed": score.flawed,
        "overlong": score.overlong,
        "unscored_reason": score.unscored_reason,
        "verdict": None
        if verdict is None
        else {
            "index": verdict.index,
            "critique": verdict.critique,
            "server": verdict.server,
            "latency_s": verdict.latency_s,
            "attempts": verdict.attempts,
            "completion_tokens": verdict.completion_tokens,
            "agreement": verdict.agreement,
        },
        "judging": [asdict(request) for request in score.judging],
        "extra": score.extra,
    }
