"""What the GenRM is asked.

Two forms of one user turn: `tagged` (the solution split into indexed paragraphs, as the GenRM was trained) and `raw`
(the form of the original's RL runs). Everything between the fixed parts is foreign text, most of it written by a policy
that is rewarded for a kind verdict, so it is neutralised: see `neutralise` for exactly what changes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_fapo.data.paragraphs import split_paragraphs

CHARS_PER_TOKEN = 3.0
"""Of mathematics, roughly. For estimates, and for whether max_tokens is sent: the server's own count says what fits."""

_TASK = (
    "Your task is to review and critique the solution {unit} by {unit}. Once you identify an error in a {unit}, return "
    "the index of the {unit} where the earliest error occurs. Otherwise, return the index of -1 (which typically "
    "denotes 'not found').\n\nPlease reason step by step, put your final answer (i.e., the index) in \\boxed{{}}."
)
_OPENING = (
    "The following is a math problem with its ground truth answer, along with an AI solution (split into {split}):"
)
_FORMS = {
    "tagged": (
        _OPENING.format(split="paragraphs, enclosed with tags and indexed from 0"),
        _TASK.format(unit="paragraph"),
    ),
    "raw": (_OPENING.format(split="steps"), _TASK.format(unit="step")),
}

# Each alternative is the one character that is replaced (first, so that the search skips all others), then when.
# Repetitions are bounded, so that no policy text makes it slow. `<|x-1|<2` is ordinary mathematics and must not match.
_POSING = re.compile(
    r"""
      <(?=\s{0,3}/?\s{0,3}(?i:paragraph))                                          # the prompt's own tags
    | \[(?=\s{0,3}(?i:math\s{1,3}problem|ground\s{1,3}truth|ai\s{1,3}solution)\s{0,3}\])  # its section headers
    | <(?=\|[A-Za-z][A-Za-z0-9_]{2,40}\|>)                                         # <|im_end|>, <|eot_id|>, ...
    | <(?=｜[^｜<>]{1,40}｜>)                                                       # the same with full-width bars
    | <(?=/?(?:s|bos|eos|pad|unk|think|start_of_turn|end_of_turn|tool_call|tool_response)>)
    | <(?=</?SYS>>)
    | \[(?=/?(?:INST|SYSTEM_PROMPT)\])
    | /(?<!\S/)(?=(?:no_)?think(?!\w))                                             # soft switches of hybrid models
    """,
    re.VERBOSE,
)
_ESCAPES = {"<": "&lt;", "[": "&#91;", "/": "&#47;"}


def neutralise(text: str) -> str:
    """`text`, unable to pose as a part of the prompt.

    The first character of each of these becomes an HTML entity (`&lt;`, `&#91;`, `&#47;`); nothing else changes:
    paragraph tags, the three section headers in brackets, chat and reasoning markers that tokenizers read as special
    tokens, and the soft switches `/think` and `/no_think`. Instructions in plain words cannot be recognised and stay.
    """
    return _POSING.sub(lambda match: _ESCAPES[match.group()], text)


def judge_messages(question: str, ground_truth: str, solution: str | Sequence[str], form: str) -> list[dict[str, str]]:
    """The chat messages that ask for a verdict, in `form` (`tagged` or `raw`).

    A `solution` that comes as its paragraphs keeps them as they are counted, those with empty lines within and those
    without text too. Raises ValueError for an unknown form and for a solution without any text, of which no verdict can
    be given.
    """
    if form not in _FORMS:
        raise ValueError(f"unknown prompt form {form!r}: use one of {', '.join(_FORMS)}")
    opening, task = _FORMS[form]
    body = neutralise(solution if isinstance(solution, str) else "\n\n".join(solution))
    if not body.strip():
        raise ValueError("an empty solution cannot be judged: only right answers go to the GenRM")
    if form == "tagged":
        paragraphs = (
            split_paragraphs(body) if isinstance(solution, str) else [neutralise(part).strip() for part in solution]
        )
        body = "\n\n".join(
            f"<paragraph_{index}>\n{paragraph}\n</paragraph_{index}>" for index, paragraph in enumerate(paragraphs)
        )
    sections = (
        opening,
        f"[Math Problem]\n\n{neutralise(question)}",
        f"[Ground Truth]\n\n{neutralise(ground_truth)}",
        f"[AI Solution]\n\n{body}",
        task,
    )
    return [{"role": "user", "content": "\n\n".join(sections)}]
