"""The user's judge in place of GenRM servers: a function that names the first wrong paragraph of a solution.

For domains where a program can tell, and for experiments with a judge that is never wrong.
"""

from __future__ import annotations

import inspect
import time

from megatron_fapo.data.records import Verdict
from megatron_fapo.genrm.counters import Book
from megatron_fapo.genrm.user_function import JUDGE_FUNCTION, describe_error, load_function
from megatron_fapo.genrm.verdict import Reason, Unscored
from megatron_fapo.observe.stall import WAITS


class FunctionJudge:
    """What the reward loop asks of a GenRMClient, answered by a function."""

    def __init__(self, path: str) -> None:
        """Raises UserError when the function at `path` cannot be used."""
        self._path, self._function = path, load_function(path, JUDGE_FUNCTION)

    async def check(self) -> None:
        """There is no server to look for."""

    async def judge(
        self, question: str, ground_truth: str, solution: str, vote: int = 0, name: str = "", book: Book | None = None
    ) -> Verdict | Unscored:
        """The function's verdict; `judge_function_error` when it raises or returns no integer from -1 up. The function
        is called anew for each `vote`, and is not told its number."""
        del vote, book
        began = time.monotonic()
        try:
            index = self._function(question=question, ground_truth=ground_truth, solution=solution)
            if inspect.isawaitable(index):
                with WAITS.on("genrm.verdict", self._path, name):
                    index = await index
            if isinstance(index, bool) or not isinstance(index, int) or index < -1:
                raise ValueError(f"the judge returned {index!r}: -1 or a 0-based paragraph is wanted")
        except Exception as error:
            return Unscored(Reason.JUDGE_FUNCTION_ERROR, describe_error(error))
        return Verdict(index, "", self._path, time.monotonic() - began, attempts=1, completion_tokens=0)

    def begin_step(self) -> Book:
        """Nothing is kept between samples."""
        return Book()

    def metrics(self, book: Book | None = None) -> dict[str, float]:
        del book
        return {}

    async def close(self) -> None:
        """Nothing is open."""
