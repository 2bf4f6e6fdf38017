"""What the GenRM is asked.

Two forms of one user turn: `tagged` (the solution split into indexed paragraphs, as the GenRM was trained) and `raw`
(the form of the original's RL runs). Everything between the fixed parts is foreign text, most of it written by a policy
that is rewarded for a kind verdict, so it is neutralised: see `neutralise` for exactly what changes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_fapo.data.paragraphs import split_paragraphs
from megatron_fapo.genrm.verdict import boxed_index
from megatron_fapo.genrm.windows import Window, plan_windows

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

# Words that are special tokens of model families in angle and in square brackets, with or without a slash.
_ANGLED = (
    r"s|(?i:[bep]os|eo[adehpst]|sop|pad|unk|cls|sep|mask|think|image|audio|video|reponame|filename|(?:seed|mask):\w{1,40}"
    r"|(?:unused|reserved|special)\d{1,5}|[a-z]{2,20}_\w{1,60})"
)
_SQUARED = (
    r"INST|ARGS|THINK|PREFIX|SUFFIX|MIDDLE|IMG|AUDIO|TRANSCRIBE|[gs]?MASK|[BE]OS|EOT|PAD|UNK|CLS|SEP|control_\d{1,4}"
    r"|[A-Z]{2,20}_[A-Z_]{1,40}|\w{3,20}\|"
)
# Each alternative is the one character that is replaced (first, so that the search skips all others), then when.
# Repetitions are bounded, so that no policy text makes it slow. `<|x-1|<2` is ordinary mathematics and must not match.
_POSING = re.compile(
    rf"""
      <(?=\s{{0,3}}/?\s{{0,3}}(?i:paragraph))                                       # the prompt's own tags
    | \[(?=\s{{0,3}}(?i:math\s{{1,3}}problem|ground\s{{1,3}}truth|ai\s{{1,3}}solution)\s{{0,3}}\])  # and headers
    | <(?=[|｜][A-Za-z]\w{{2,80}}[|｜]?>|/?[A-Za-z]\w{{2,80}}[|｜]>)                  # <|im_end|>, <|turn>, <turn|>
    | <(?=｜[^｜<>]{{1,80}}｜>)                                                     # <｜end▁of▁sentence｜>
    | <(?=/?(?:{_ANGLED})>|</?SYS>>)
    | \[(?=[/|]?(?:{_SQUARED})\])
    | /(?<!\S/)(?=(?:no_?)?think(?!\w))                                          # soft switches of hybrid models
    | \\(?=boxed)                                                                # where it holds -1
    """,
    re.VERBOSE,
)
# What people, JSON or tokenizers do not see. A search of its own: in the one above it would make the skipping slow.
_UNSEEN = re.compile(
    r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\ud800-\udfff\U000e0000-\U000e0fff]"
)
# Look-alikes, one character for one, so that what is found in the folded text stands at the same place in the original.
_FOLD = (
    {0xFF01 + offset: chr(0x21 + offset) for offset in range(94) if 0x21 + offset != ord("|")}
    | dict.fromkeys(map(ord, "﹤‹〈〈⟨˂ᐸ❮"), "<")
    | dict.fromkeys(map(ord, "﹥›〉〉⟩˃ᐳ❯"), ">")
    | dict.fromkeys(map(ord, "⁄∕⧸"), "/")
    | dict.fromkeys(map(ord, "【〔﹝⟦"), "[")
    | dict.fromkeys(map(ord, "】〕﹞⟧"), "]")
    | str.maketrans("аеорсһіԁɡɑΑΡ", "aeopchidgaAP")
)


def neutralise(text: str) -> str:
    """`text`, unable to pose as a part of the prompt or as a verdict of -1.

    The first character of each of these becomes an HTML entity (`&lt;`, `&#91;`, ...); nothing else changes: paragraph
    tags, the three section headers in brackets, chat and reasoning markers that tokenizers read as special tokens, the
    soft switches `/think` and `/no_think`, boxes that hold -1; all of them in look-alike characters too. So do control
    and invisible characters and lone surrogates. Instructions in plain words cannot be recognised and stay.
    """
    text = _UNSEEN.sub(lambda match: f"&#{ord(match.group())};", text)
    folded = text if text.isascii() else text.translate(_FOLD)
    pieces, end = [], 0
    for match in _POSING.finditer(folded):
        at, found = match.start(), match.group()
        if found != "\\" or boxed_index(folded, at) == -1:
            pieces += [text[end:at], "&lt;" if text[at] == "<" else f"&#{ord(text[at])};"]
            end = at + 1
    return "".join([*pieces, text[end:]])


def judge_messages(
    question: str, ground_truth: str, solution: str | Sequence[str], form: str, window: Window | None = None
) -> list[dict[str, str]]:
    """The chat messages that ask for a verdict, in `form` (`tagged` or `raw`), of all paragraphs or of a window's.

    A `solution` that comes as its paragraphs keeps them as they are counted, those with empty lines within and those
    without text too. Raises ValueError for an unknown form, for a window of the raw form, which has no indices, and for
    a solution without any text, of which no verdict can be given.
    """
    if form not in _FORMS:
        raise ValueError(f"unknown prompt form {form!r}: use one of {', '.join(_FORMS)}")
    if not "".join(solution).strip():
        raise ValueError("an empty solution cannot be judged: only right answers go to the GenRM")
    if form == "tagged":
        body = _windowed(_tagged(solution), window)
    elif window is None:
        body = neutralise(solution if isinstance(solution, str) else "\n\n".join(solution))
    else:
        raise ValueError("the raw form has no indices to judge a part by: use the tagged form")
    return [{"role": "user", "content": _content(question, ground_truth, body, form)}]


def windows_of(question: str, ground_truth: str, solution: str, budget_chars: int, overlap: int) -> list[Window] | None:
    """The windows in which the tagged form asks about a solution, so that no prompt is longer than `budget_chars`.

    One window, of which the prompt is the ordinary one, where that fits. None when there is no such division: see
    `plan_windows`.
    """
    blocks = _tagged(solution)
    count = len(blocks)
    if len(_content(question, ground_truth, "\n\n".join(blocks), "tagged")) <= budget_chars:
        return [Window(0, 0, count)]
    longest = _windowed([""] * (count + 3), Window(count, count + 1, count + 2))
    room = budget_chars - len(_content(question, ground_truth, longest, "tagged"))
    return plan_windows([block + "\n\n" for block in blocks], room, overlap)


def _tagged(solution: str | Sequence[str]) -> list[str]:
    paragraphs = split_paragraphs(solution) if isinstance(solution, str) else solution
    # What is found in a paragraph is found in the whole, which is the quicker to search, and nearly always clean.
    clean = isinstance(solution, str) and neutralise(solution) == solution
    return [
        f"<paragraph_{index}>\n{paragraph if clean else neutralise(paragraph).strip()}\n</paragraph_{index}>"
        for index, paragraph in enumerate(paragraphs)
    ]


def _windowed(blocks: Sequence[str], window: Window | None) -> str:
    start, fresh, stop = window or (0, 0, len(blocks))
    said = []
    if start > 0:
        said.append(f"Paragraphs 0 to {start - 1} are left out here: take for granted what they may have established.")
    if fresh > start:
        said.append(
            f"Paragraphs {start} to {fresh - 1} are repeated as context and judged elsewhere: review those from "
            f"{fresh} on, and return only the index of one of these, or -1."
        )
    if stop < len(blocks):
        said.append(
            f"Paragraphs {stop} to {len(blocks) - 1} are left out too and judged elsewhere: that the solution is not "
            "finished here is no error."
        )
    note = ["This is a part of the solution. " + " ".join(said)] if said else []
    return "\n\n".join([*blocks[start:stop], *note])


def _content(question: str, ground_truth: str, body: str, form: str) -> str:
    opening, task = _FORMS[form]
    sections = (
        opening,
        f"[Math Problem]\n\n{neutralise(question)}",
        f"[Ground Truth]\n\n{neutralise(ground_truth)}",
        f"[AI Solution]\n\n{body}",
        task,
    )
    return "\n\n".join(sections)
