"""The records that walk through a step, in one direction.

    Prompt -> Sample -> Score -> Group

Every record is frozen: a stage makes the next record and never rewrites an earlier one. A sample is identified by
(prompt_id, epoch, sample_index) for its whole life, in logs, dumps, traces and resumes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class SampleKey(NamedTuple):
    """Identity of one sample: stable over retries, dumps and resumes."""

    prompt_id: str
    epoch: int
    sample_index: int


@dataclass(frozen=True)
class Prompt:
    """One row of a prompt dataset, tokenised."""

    prompt_id: str
    """Unique within its dataset: `<data_source>/<index>`."""
    data_source: str
    messages: tuple[dict[str, str], ...]
    """Chat messages ({role, content}) as the dataset has them."""
    ground_truth: str
    question: str
    """The bare problem text, as the GenRM reads it (no answer-format instruction)."""
    token_ids: tuple[int, ...] = ()
    """The chat template applied to `messages`, with the generation prompt."""
    extra_info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One response of the policy to one prompt."""

    key: SampleKey
    prompt: Prompt
    token_ids: tuple[int, ...]
    """Response tokens, the end token included when the response was not cut."""
    logprobs: tuple[float, ...]
    """Behaviour log-probability of each response token, at the sampling temperature, as the engine computed it."""
    text: str
    """The response decoded without special tokens."""
    finish_reason: str
    """`stop` (end token) or `length` (cut at the response limit)."""
    weight_version: int
    """Version of the policy weights that produced the first token, and the others up to the first of later_versions."""
    later_versions: tuple[tuple[int, int], ...] = ()
    """(token, version) of each refit in flight (`weight_sync.in_flight`): that token and those after it come from the
    later weights, which have read all that stands before."""

    @property
    def versions(self) -> tuple[tuple[int, int], ...]:
        """(token, version) of all versions: each from that token on, the first from 0."""
        return ((0, self.weight_version), *self.later_versions)


@dataclass(frozen=True)
class JudgeRequest:
    """One request that was made for a verdict: what a person asks who doubts a score."""

    server: str
    """Base URL."""
    outcome: str
    """`-1` or another index that was read; else why there is none: `truncated`, `unparsable`, a failure's kind, or
    `cancelled` when another answered first."""
    began_s: float
    """Since the judgement began; the time before is queueing."""
    took_s: float
    completion_tokens: int = 0
    seed: int = 0
    vote: int = 0
    window: int = 0
    """Of a solution that is judged in parts."""
    hedge: bool = False
    """A second request beside one that was slow."""
    text: str = ""
    """The critique, unless it is the verdict's own; of a failure, what was wrong."""


@dataclass(frozen=True)
class Verdict:
    """What the GenRM says of one solution."""

    index: int
    """-1: no error found; otherwise the 0-based paragraph of the earliest error."""
    critique: str
    server: str
    """Base URL of the server that answered."""
    latency_s: float
    attempts: int
    """Requests made for this verdict, the one that answered included."""
    completion_tokens: int
    agreement: float = 1.0
    """Share of the votes that say what the verdict says, sound or flawed."""
    history: tuple[JudgeRequest, ...] = ()
    """All requests, in the order in which they ended."""

    @property
    def flawed(self) -> bool:
        return self.index != -1


@dataclass(frozen=True)
class Score:
    """The outcome of scoring one sample: a number, or unscored with a reason. Never both, never neither."""

    reward: float | None
    """R_FAPO plus the overlong term; None when unscored."""
    correct: bool | None
    """What the rule says of the final answer; None when the rule verifier itself failed."""
    prediction: str | None
    """The final answer as the rule extracted it."""
    verdict: Verdict | None = None
    """Present only when the rule said right and the GenRM was asked and answered."""
    overlong: float = 0.0
    """The overlong term, in [-penalty_factor, 0]; already inside `reward`."""
    unscored_reason: str | None = None
    """One of genrm/verdict.py's and genrm/verifier.py's reason words, such as `genrm_deadline`."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further keys that a user's `compute_score` returned."""
    judging: tuple[JudgeRequest, ...] = ()
    """Every request that was made to judge it, whether a verdict came of them or not."""

    def __post_init__(self) -> None:
        if (self.reward is None) == (self.unscored_reason is None):
            raise ValueError("a score has either a reward or an unscored_reason, never both and never neither")

    @property
    def flawed(self) -> bool:
        """True for a flawed positive: right answer, and the GenRM found an error."""
        return bool(self.correct) and self.verdict is not None and self.verdict.flawed


@dataclass(frozen=True)
class ScoredSample:
    sample: Sample
    score: Score


@dataclass(frozen=True)
class Group:
    """The n samples of one prompt, in order of sample_index."""

    prompt: Prompt
    epoch: int
    samples: tuple[ScoredSample, ...]
