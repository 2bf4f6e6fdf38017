"""Right answers to be judged, with the truth in their text, and how long a judge takes for each. Pure.

What a judge says and how long it writes is a function of the seed and the problem; what goes wrong with a request is a
function of the problem, the server, and how often that server has been asked about it. So every system under test meets
the same critiques, and a second request elsewhere meets other luck.

Lengths: log-normal with a mean of 3,000 tokens (FAPO's paper, Table 4) and a 99th percentile of four times that (what
`fapo plan` assumes), at 100 tokens per second and sequence: half of the critiques are there after 23 s. Here a second
is 10.7 ms, so that p50 is 0.25 s; time-outs, pauses and restarts are scaled along.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from statistics import NormalDist

P50_S = 0.25
SIGMA = 0.7018
MEAN_OF_P50 = math.exp(SIGMA * SIGMA / 2)
FLAWED_SHARE = 1 / 3
PARAGRAPHS = 12
TAIL_SHARE = 0.02
"""Of the requests in the slow tail; they take 15 to 25 p50, so that the 99th percentile is 20 p50."""
NONSENSE_SHARE = 0.01
NONSENSE = (
    "I have looked at it from all sides, and it seems fine to me on the whole.",
    "@@@@ 0x1f zzq }{ }{ %% the the the the the the the the",
    "The earliest error is in \\boxed{one of the paragraphs}.",
    "",
)
_LINE = "Then we add the next two numbers to what we have, carry the ten over, and write the result down below them. "
_MARK = re.compile(r"Task (\d+), truth (-?\d+)\.")


@dataclass(frozen=True)
class Problem:
    number: int
    verdict: int
    """The truth: -1 for sound, else the paragraph of the first error."""
    question: str
    ground_truth: str
    solution: str

    @property
    def flawed(self) -> bool:
        return self.verdict != -1


def make_problem(seed: int, number: int, paragraphs: int = PARAGRAPHS) -> Problem:
    """About 4 kB of solution in 12 paragraphs, the length of a DAPO-17k response of 1,100 tokens."""
    verdict = -1
    if chance("flawed", seed, number) < FLAWED_SHARE:
        verdict = int(chance("where", seed, number) * paragraphs)
    body = "\n\n".join(f"Step {step} of {number}. " + _LINE * 3 for step in range(paragraphs - 1))
    question = f"Task {number}, truth {verdict}. What is {number} + 1?"
    return Problem(number, verdict, question, str(number + 1), f"{body}\n\nSo it is \\boxed{{{number + 1}}}.")


def read_mark(prompt: str) -> tuple[int, int]:
    """(number, truth) of the problem that a prompt asks about."""
    found = _MARK.search(prompt)
    if found is None:
        raise ValueError(f"no problem of this benchmark in the prompt: {prompt[:200]!r}")
    return int(found[1]), int(found[2])


def service_s(seed: int, number: int, case: str, request: tuple[int, int], p50_s: float) -> float:
    """Seconds that a judge generates. `request`: (server, how often it was asked about this problem before)."""
    if case == "tail" and chance("slow", seed, number, *request) < TAIL_SHARE:
        return p50_s * (15 + 10 * chance("how slow", seed, number, *request))
    return p50_s * math.exp(SIGMA * NormalDist().inv_cdf(chance("length", seed, number)))


def critique(seed: int, number: int, verdict: int, case: str, request: tuple[int, int]) -> str:
    unlucky = case == "nonsense" and chance("nonsense", seed, number, *request) < NONSENSE_SHARE
    if unlucky or (case == "babbler" and request == (0, 0)):
        return NONSENSE[int(chance("which", seed, number, *request) * len(NONSENSE))]
    said = "is where it goes wrong" if verdict != -1 else "none is wrong"
    return f"{'I check this step, and what it says follows. ' * 8}Paragraph by paragraph, {said}: \\boxed{{{verdict}}}"


def chance(*what: object) -> float:
    """A number in (0, 1) that only depends on `what`."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=7).digest()
    return (int.from_bytes(digest, "big") + 0.5) / 2**56
