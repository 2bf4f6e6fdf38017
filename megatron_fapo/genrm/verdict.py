"""Reading a verdict out of a critique, and the reasons for which a sample stays unscored.

Invariant: a failure is never a verdict. Only a complete critique whose last box holds an index in range is one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from megatron_fapo.data.records import JudgeRequest
from megatron_fapo.genrm.windows import Window


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


_BOXED = "\\boxed"
_BOX = re.compile(r"\\boxed\s{0,3}\{")
_BRACE = re.compile(r"[{}]")
_MOST_BOX_CHARS = 100
_DRESSING = re.compile(
    r"\\(?:text(?:bf|rm|it|tt)?|math(?:rm|bf|it|sf|tt)|boldsymbol|bf|rm|boxed)(?![A-Za-z])|\\[\[\](),;:! ]|[{}$~]"
)
_FULL_WIDTH_DIGITS = str.maketrans("０１２３４５６７８９", "0123456789")
# A minus after a word must not be its hyphen: `paragraph-1` is paragraph 1.
_INDEX = re.compile(
    r"""\s*(?:
        (?P<sound> (?:index(?:\s+|\s*[:=]\s*)(?=\S1))? [-−－﹣–‑]\s*1)
      | <paragraph_?(?P<tag>0|[1-9][0-9]{0,8})>
      | (?:(?:paragraph|step|index)[\s_:=\#]*)? \+?(?P<number>0|[1-9][0-9]{0,8})
    )\s*\.?\s*""",
    re.VERBOSE | re.IGNORECASE | re.ASCII,
)


def boxed_index(text: str, start: int) -> int | None:
    """The index that the `\\boxed{}` at `start` holds: -1, or one from 0 on; None when it holds nothing of the kind.

    Read are a number, or `paragraph`, `step` or `index` and a number, in any dressing of LaTeX and with a full stop or
    without; any minus sign and full-width digits count. Not read are decimals, ranges, lists, sums, words for `none`.
    """
    end = _closing_brace(text, start)
    if end is None:
        return None
    box = _DRESSING.sub(" ", text[start:end]).replace("\\_", "_").translate(_FULL_WIDTH_DIGITS)
    match = _INDEX.fullmatch(box)
    if match is None:
        return None
    return -1 if match["sound"] else int(match["tag"] or match["number"])


def parse_verdict(critique: str, finish_reason: str | None, judged: int | Window | None) -> int | Reason:
    """The index that a critique ends on: -1 for no error, else the 0-based paragraph of the earliest error.

    Read from the last `\\boxed{}` after the reasoning (`</think>`), of boxes in boxes the outermost: see `boxed_index`.
    The index must be below `judged`, the number of paragraphs, or of the paragraphs to be judged in a window; None (raw
    form) allows any. GENRM_TRUNCATED when the critique was cut, GENRM_UNPARSABLE for everything else that is not a
    verdict, an aborted request (any finish_reason other than `stop`) included.
    """
    if finish_reason == "length":
        return Reason.GENRM_TRUNCATED
    said = critique.rpartition("</think>")[2]
    start = said.rfind(_BOXED)
    if finish_reason != "stop" or start < 0 or "<think>" in said:
        return Reason.GENRM_UNPARSABLE
    while (outer := said.rfind(_BOXED, 0, start)) >= 0 and (_closing_brace(said, outer) or 0) > start:
        start = outer
    index = boxed_index(said, start)
    if index is None:
        return Reason.GENRM_UNPARSABLE
    first, stop = (judged.fresh, judged.stop) if isinstance(judged, Window) else (0, judged)
    in_range = index == -1 or (index >= first and (stop is None or index < stop))
    return index if in_range else Reason.GENRM_UNPARSABLE


def _closing_brace(text: str, start: int) -> int | None:
    """Where the box at `start` closes, if it opens a brace and is not longer than any verdict."""
    opening = _BOX.match(text, start)
    if opening is None:
        return None
    depth = 1
    for brace in _BRACE.finditer(text, opening.end(), opening.end() + _MOST_BOX_CHARS):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return brace.start()
    return None
