"""Reading a verdict out of a critique, and the reasons for which a sample stays unscored.

Invariant: a failure is never a verdict. Only a complete critique whose last box holds an integer in range is one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from megatron_fapo.data.records import JudgeRequest
from megatron_fapo.genrm.rules import last_boxed


class Reason(StrEnum):
    """Why a sample is unscored; the words of `Score.unscored_reason` and of the metrics."""

    GENRM_DEADLINE = "genrm_deadline"
    """No verdict within `genrm.deadline_s` of the first request."""
    GENRM_UNPARSABLE = "genrm_unparsable"
    """Two complete critiques without a readable index."""
    GENRM_TRUNCATED = "genrm_truncated"
    """The critique was cut at `genrm.max_tokens`, twice."""
    GENRM_CONTEXT = "genrm_context"
    """Prompt and critique do not fit the server's context."""
    GENRM_UNREACHABLE = "genrm_unreachable"
    """No server gave an answer: every request failed, or no server was usable for `genrm.deadline_s`."""
    GENRM_REFUSED = "genrm_refused"
    """Every request was refused as invalid (HTTP 4xx)."""
    VERIFIER_TIMEOUT = "verifier_timeout"
    """The rule or the user's function took longer than `reward.verifier_timeout_s`."""
    VERIFIER_CRASH = "verifier_crash"
    """The worker process died, or the rule itself raised."""
    JUDGE_FUNCTION_ERROR = "judge_function_error"
    """The user's judge raised, or returned something that is not an index."""
    COMPUTE_SCORE_ERROR = "compute_score_error"
    """The user's function raised, or returned something that is not a score."""


@dataclass(frozen=True)
class Unscored:
    """The outcome that is no outcome."""

    reason: Reason
    detail: str
    """One line for the person who asks why."""
    history: tuple[JudgeRequest, ...] = ()
    """All requests, in the order in which they ended."""


# int() would also take underscores, other scripts' digits and thousands of them.
_INTEGER = re.compile(r"\s*([+-]?[0-9]{1,9})\s*")


def parse_verdict(critique: str, finish_reason: str | None, n_paragraphs: int | None) -> int | Reason:
    """The index that a critique ends on: -1 for no error, else the 0-based paragraph of the earliest error.

    Read from the last `\\boxed{}`. The index must be below `n_paragraphs` (tagged form); None (raw form) allows any.
    GENRM_TRUNCATED when the critique was cut, GENRM_UNPARSABLE for everything else that is not a verdict, an aborted
    request (any finish_reason other than `stop`) included.
    """
    if finish_reason == "length":
        return Reason.GENRM_TRUNCATED
    match = _INTEGER.fullmatch(last_boxed(critique) or "")
    if finish_reason != "stop" or match is None:
        return Reason.GENRM_UNPARSABLE
    index = int(match.group(1))
    in_range = index == -1 or (index >= 0 and (n_paragraphs is None or index < n_paragraphs))
    return index if in_range else Reason.GENRM_UNPARSABLE
