"""How long samples and critiques are: assumed, stated, or drawn from what a run wrote.

A record is what one step of a run did: its samples' lengths in order of groups, and its measured phases. Records come
out of a run directory, or a JSON file with the same (`{"steps": [{"phases": ..., "samples": [[prompt, response,
critique], ...]}]}`).
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_fapo.config.root import Config
from megatron_fapo.errors import UserError
from megatron_fapo.observe.metrics import read_metrics
from megatron_fapo.observe.samples import read_samples, sample_steps
from megatron_fapo.plan.simulate import SimSample

CRITIQUE_MEAN = 3000
"""Tokens; the paper's Table 4 has 3.0k for the 7B run and 3.2k for the 32B run."""


@dataclass(frozen=True)
class Lengths:
    """Where samples come from. `draw` gives those of one step, the same for the same seed."""

    text: str
    """For the output."""
    draw: Callable[[int, int], list[SimSample]]
    """(samples, seed) -> samples."""


@dataclass(frozen=True)
class Record:
    """One step of a run."""

    phases: dict[str, float]
    """Seconds by phase, names without `phase_s/`."""
    samples: list[SimSample]


def log_normal(mean: float, p99: float, limit: int) -> Callable[[random.Random], int]:
    """Lengths of this mean and 99th percentile before they are cut at `limit`.

    Raises:
        ValueError: no log-normal distribution has them (p99 must be above the mean, and not 15 times as large).
    """
    ratio = math.log(p99 / mean)
    if not 0 < ratio < 2.3263**2 / 2:
        raise ValueError(f"p99={p99:g} does not go with mean={mean:g}: it must be above it, and below 14.9 times it")
    sigma = 2.3263 - math.sqrt(2.3263**2 - 2 * ratio)
    mu = math.log(mean) - sigma * sigma / 2
    return lambda rng: max(1, min(limit, round(rng.lognormvariate(mu, sigma))))


def find_lengths(text: str | None, config: Config, judged: bool) -> Lengths:
    """Of `--lengths`: a run directory, a file of records, or `mean=..,p99=..,prompt=..,right=..,critique=..`; what is
    not given is assumed from the configuration's limits.

    Raises:
        UserError: not one of these.
    """
    if text is not None and "=" not in text:
        pool = [sample for record in read_records(Path(text)) for sample in record.samples]
        if not judged:
            pool = [SimSample(s.prompt, s.response) for s in pool]
        return Lengths(f"{len(pool)} samples of {text}", lambda count, seed: random.Random(seed).choices(pool, k=count))
    limit = config.rollout.max_response_tokens
    values = {"mean": limit / 8, "p99": limit / 2, "prompt": config.data.max_prompt_tokens / 8, "right": 0.5}
    values["critique"] = min(CRITIQUE_MEAN, config.genrm.max_tokens / 2)
    given: dict[str, float] = {}
    for part in text.split(",") if text else []:
        name, _, value = part.partition("=")
        try:
            given[name] = float(value)
        except ValueError:
            given[name] = -1.0
        if name not in values or given[name] < 0:
            raise UserError(f"--lengths {text}: {part}: write a number for one of {', '.join(values)}")
    if "mean" in given and "p99" not in given:
        values["p99"] = min(4 * given["mean"], limit)
    values |= given
    try:
        response = log_normal(values["mean"], values["p99"], limit)
        critique = log_normal(values["critique"], 4 * values["critique"], config.genrm.max_tokens)
    except ValueError as error:
        raise UserError(f"--lengths: {error}") from error

    def draw(count: int, seed: int) -> list[SimSample]:
        rng = random.Random(seed)
        return [
            SimSample(
                round(values["prompt"]),
                response(rng),
                critique(rng) if judged and rng.random() < values["right"] else 0,
            )
            for _ in range(count)
        ]

    names = values if judged else ("mean", "p99", "prompt")
    said = ", ".join(f"{name} {values[name]:g}{'' if name in given else ' (assumed)'}" for name in names)
    return Lengths(f"log-normal responses: {said}", draw)


def read_records(path: Path) -> list[Record]:
    """Steps of a run directory (its samples/ and metrics.jsonl) or of a file of records, the first step left out:
    compilation and first allocations fall on it.

    Raises:
        UserError: neither, or no step in it.
    """
    if path.is_dir():
        metrics = {int(record["step"]): record for record in read_metrics(path)}
        steps = [step for step in sample_steps(path) if step in metrics and step > 1]
        records = [Record(_phases(metrics[step]), _samples(path, step)) for step in steps]
    elif path.is_file():
        raw = json.loads(path.read_text(encoding="utf-8"))["steps"]
        records = [Record(step["phases"], [SimSample(*s) for s in step["samples"]]) for step in raw]
    else:
        raise UserError(f"{path}: neither a run directory nor a file of records")
    if not records:
        raise UserError(f"{path}: no step after the first has both metrics and samples")
    return records


def write_records(records: Sequence[Record], path: Path, about: dict[str, str]) -> None:
    """The file that `read_records` reads."""
    steps = [
        {
            "phases": {name: round(seconds, 4) for name, seconds in record.phases.items()},
            "samples": [[s.prompt, s.response, s.critique] for s in record.samples],
        }
        for record in records
    ]
    path.write_text(json.dumps(about | {"steps": steps}, separators=(",", ":")) + "\n", encoding="utf-8")


def _phases(metrics: dict[str, float]) -> dict[str, float]:
    return {n.removeprefix("phase_s/"): v for n, v in metrics.items() if n.startswith("phase_s/")}


def _samples(run_dir: Path, step: int) -> list[SimSample]:
    """Equal solutions to a question share one verdict: only the first of them costs a critique."""
    seen: set[tuple[str, str]] = set()
    samples = []
    for record in read_samples(run_dir, step):
        verdict, key = record["verdict"], (record["question"], record["text"])
        critique = 0 if verdict is None or key in seen else (verdict["completion_tokens"] or 0)
        seen.add(key)
        samples.append(SimSample(record["prompt_tokens"], record["response_tokens"], critique))
    return samples
