"""Asks the GenRM pool for verdicts: votes, windows, deadlines, and no failure that counts as a verdict.

    judge -> shared with identical ones -> votes -> critique -> asked of servers (asking.py) -> read (verdict.py)
                                                    `-> too long for the context: windows, one critique each

A critique that is cut is asked for once more with twice the room, one that cannot be read twice more, with other seeds.
The clock of `genrm.deadline_s` starts when a verdict's first request is sent: queueing behind other verdicts is not the
judge's fault. It stands still while no server answers anybody. When that lasts for `genrm.pool_empty_timeout_s`, who
waits gets a PoolEmptyError: scoring cannot go on, and nothing is scored by default.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_fapo.config.genrm import GenRMConfig
from megatron_fapo.data.paragraphs import split_paragraphs
from megatron_fapo.data.records import Verdict
from megatron_fapo.genrm.asking import Asker, Case, Critique
from megatron_fapo.genrm.ballot import Ballot
from megatron_fapo.genrm.counters import Book, Counters
from megatron_fapo.genrm.front import PoolFront
from megatron_fapo.genrm.prompts import CHARS_PER_TOKEN, judge_messages, windows_of
from megatron_fapo.genrm.transport import Failure, FailureKind
from megatron_fapo.genrm.verdict import Reason, Unscored, parse_verdict
from megatron_fapo.genrm.windows import Window, combine
from megatron_fapo.observe.stall import WAITS

log = logging.getLogger(__name__)

TRIES = 3
"""Critiques for one that can be read. If 1 % are nonsense, two tries leave one verdict in 10,000 without."""
MOST_JUDGEMENTS = 8192
"""Under way at once; whoever wants more waits."""
_WINDOW_HALVINGS = 3
"""Windows are planned by characters; where a server's own count says that they do not fit, they are planned smaller."""


@dataclass(frozen=True)
class _Question:
    """What is judged."""

    key: str
    question: str
    ground_truth: str
    solution: str
    paragraphs: list[str]


@dataclass(frozen=True)
class _Finding:
    """What one critique says."""

    index: int
    critique: str
    server: str


@dataclass
class _Shared:
    task: asyncio.Task[Verdict | Unscored]
    waiting: int = 0


class GenRMClient(PoolFront):
    """Verdicts from any set of OpenAI-compatible base URLs (`http://host:port/v1`). Belongs to one event loop."""

    def __init__(self, urls: Sequence[str], config: GenRMConfig) -> None:
        super().__init__(urls, config)
        self._asker = Asker(config, self._members, self._dispatcher, self._latencies)
        self._places = asyncio.Semaphore(MOST_JUDGEMENTS)
        self._judging: set[asyncio.Task[Verdict | Unscored]] = set()

    async def judge(
        self, question: str, ground_truth: str, solution: str, vote: int = 0, name: str = "", book: Book | None = None
    ) -> Verdict | Unscored:
        """The verdict of one right answer. Identical judgements within a step share one; failures are not kept.

        Judgements that differ in `vote` alone are different ones, with seeds of their own. `name` is the sample's, for
        whoever asks what the driver waits for. `book` is the step's, the last that began if none is given.

        Raises:
            PoolEmptyError: no server has answered anybody for genrm.pool_empty_timeout_s.
        """
        again = (str(vote),) if vote else ()
        key = _content_key(self._config.prompt_form, question, ground_truth, solution, *again)
        book = book or self.book
        if key not in book.shared:
            asked = _Question(key, question, ground_truth, solution, split_paragraphs(solution))
            task = asyncio.create_task(self._judge(asked, name, book.counters), name="genrm judgement")
            book.shared[key] = _Shared(task)
            self._judging.add(task)
            task.add_done_callback(self._judging.discard)
        else:
            book.counters.add("shared")
        shared: _Shared = book.shared[key]
        shared.waiting += 1
        kept = False
        try:
            outcome = await asyncio.shield(shared.task)
            kept = isinstance(outcome, Verdict)
            return outcome
        finally:
            shared.waiting -= 1
            abandoned = shared.waiting == 0 and not shared.task.done()
            if (abandoned or (shared.task.done() and not kept)) and book.shared.get(key) is shared:
                del book.shared[key]
            if abandoned:
                shared.task.cancel()
                await asyncio.wait([shared.task])

    def begin_step(self) -> Book:
        """Starts metrics anew, and judges identical samples anew; steps that still run go on in their own books."""
        book = super().begin_step()
        book.answered = {server.url: server.answered_tokens for server in self._pool.present()}
        return book

    def metrics(self, book: Book | None = None) -> dict[str, float]:
        book = book or self.book
        counts, values = book.counters.counts, super().metrics(book)
        values["genrm/completion_tokens_mean"] = counts["completion_tokens"] / max(1, counts["answered"])
        servers = self._pool.present()
        answered = [s.answered_tokens - book.answered.get(s.url, 0) for s in servers if s.down_since is None]
        if any(answered):
            values["genrm/load_imbalance"] = max(answered) * len(answered) / sum(answered)
        return values

    async def close(self) -> None:
        """Cancels what is under way and closes every connection."""
        await _cancel(self._judging.copy())
        await super().close()

    async def _judge(self, asked: _Question, name: str, counters: Counters) -> Verdict | Unscored:
        async with self._places:
            counters.add("called")
            began = time.monotonic()
            with WAITS.on("genrm.verdict", "a GenRM server with room", name) as wait:
                outcome: Verdict | Unscored
                try:
                    async with self._deadlines.one() as deadline:
                        case = Case(deadline, wait, name, began, counters)
                        outcome = await self._by_votes(case, asked)
                except TimeoutError:
                    last = [f"{each.outcome}: {each.text[-200:]}" for each in case.history[-3:]]
                    what = "; ".join([f"no verdict within {self._config.deadline_s:g} s", *last])
                    outcome = Unscored(Reason.GENRM_DEADLINE, what)
            if isinstance(outcome, Verdict):
                counters.add("answered")
                counters.observe("latency", outcome.latency_s)
            else:
                counters.add("unscored")
                outcome = replace(outcome, history=tuple(case.history))
                log.debug("unscored: %s: %s", outcome.reason, outcome.detail)
            return outcome

    async def _by_votes(self, case: Case, asked: _Question) -> Verdict | Unscored:
        ballot: Ballot[_Finding] = Ballot(self._config.votes)
        begun, failed = 0, Unscored(Reason.GENRM_UNPARSABLE, "")
        voting: set[asyncio.Task[_Finding | Unscored]] = set()
        try:
            while (wanted := ballot.wanted()) or voting:
                if not wanted:
                    break
                for number in range(begun, begun + wanted - len(voting)):
                    voting.add(asyncio.create_task(self._vote(case, asked, number), name="genrm vote"))
                    begun += 1
                done, voting = await asyncio.wait(voting, return_when=asyncio.FIRST_COMPLETED)
                for each in done:
                    outcome = each.result()
                    if isinstance(outcome, Unscored):
                        failed = outcome
                        ballot.fail()
                    else:
                        ballot.add(outcome.index, outcome)
        finally:
            await _cancel(voting)
        decision = ballot.decision()
        if decision is None:
            return failed
        index, finding = decision
        if self._config.votes > 1:
            case.counters.add("votes", ballot.cast)
            case.counters.share("agreement", ballot.agreement())
        return Verdict(
            index,
            finding.critique,
            finding.server,
            time.monotonic() - case.began - case.history[0].began_s,
            case.requests,
            sum(each.completion_tokens for each in case.history),
            ballot.agreement(),
            tuple(replace(each, text="") if each.text == finding.critique else each for each in case.history),
        )

    async def _vote(self, case: Case, asked: _Question, vote: int) -> _Finding | Unscored:
        """One critique of the whole solution, or one of each of its windows."""
        whole = judge_messages(asked.question, asked.ground_truth, asked.solution, self._config.prompt_form)
        tagged = self._config.prompt_form == "tagged"
        finding = await self._critique(case, asked, whole, len(asked.paragraphs) if tagged else None, vote)
        context = self._members.smallest_context()
        if not _too_long(finding) or context is None or self._config.long_solutions != "window":
            return finding
        if not tagged:
            return Unscored(Reason.GENRM_CONTEXT, "too long, and the raw form has no indices to judge it in parts by")
        budget = max(context - self._config.max_tokens, context // 2) * CHARS_PER_TOKEN
        budget = min(budget, len(whole[0]["content"]) - 1)  # one window would be the whole again
        for _ in range(_WINDOW_HALVINGS):
            overlap = self._config.window_overlap
            windows = windows_of(asked.question, asked.ground_truth, asked.solution, int(budget), overlap)
            if windows is None:
                return Unscored(Reason.GENRM_CONTEXT, f"prompts of {budget:.0f} characters cannot hold its paragraphs")
            case.counters.add("windows", len(windows))
            finding = await self._in_windows(case, asked, windows, vote)
            if not _too_long(finding):
                break
            budget /= 2
        return finding

    async def _in_windows(
        self, case: Case, asked: _Question, windows: Sequence[Window], vote: int
    ) -> _Finding | Unscored:
        """All windows at once, until what they say decides."""
        tasks = []
        for window in windows:
            messages = judge_messages(asked.question, asked.ground_truth, asked.paragraphs, "tagged", window)
            work = self._critique(case, asked, messages, window, vote)
            tasks.append(asyncio.create_task(work, name="genrm window"))
        try:
            findings: list[_Finding] = []
            for task in tasks:
                finding = await task
                if isinstance(finding, Unscored):
                    return finding
                findings.append(finding)
                said = [each.index for each in findings] + [None] * (len(windows) - len(findings))
                if (index := combine(windows, said)) is not None:
                    return replace(finding, index=index)
            raise AssertionError("windows that are all sound are sound together")
        finally:
            await _cancel(tasks)

    async def _critique(
        self, case: Case, asked: _Question, messages: list[dict[str, str]], of: int | Window | None, vote: int
    ) -> _Finding | Unscored:
        """One critique that can be read, in TRIES tries. `of`: which indices it may name."""
        start = of.start if isinstance(of, Window) else 0
        seed = _seed(asked.key, vote, start)
        again = asked.key if self._config.votes > 1 and not start else None
        critique, max_tokens = Critique(messages, seed, vote, start, again), self._config.max_tokens
        for tries_left in reversed(range(TRIES)):
            outcome = await self._asker.ask(case, critique, max_tokens)
            if isinstance(outcome, Failure):
                return self._given_up(outcome, critique)
            answer = outcome.answer
            index = parse_verdict(answer.critique, answer.finish_reason, of)
            case.says(outcome.booked, str(index).removeprefix("genrm_"))
            if isinstance(index, int):
                return _Finding(index, answer.critique, outcome.server)
            case.counters.add(index.removeprefix("genrm_"))
            unread = Unscored(index, f"critique ends: {answer.critique[-200:]!r}")
            cut = index is Reason.GENRM_TRUNCATED
            # Greedy, the same critique would come again; only one that was cut may end in a larger room.
            vain = max_tokens > self._config.max_tokens if cut else self._config.temperature == 0
            if vain or not tries_left or critique.attempts >= self._config.max_attempts:
                break
            critique.seed += 1
            if cut:
                max_tokens *= 2
        return unread

    def _given_up(self, failure: Failure, critique: Critique) -> Unscored:
        if failure.kind is FailureKind.CONTEXT:
            return Unscored(Reason.GENRM_CONTEXT, failure.detail)
        refused = all(each.kind is FailureKind.HTTP_4XX for each in critique.failures)
        last = [f"{each.kind}: {each.detail}" for each in critique.failures[-3:]]
        what = "; ".join([f"no answer in {critique.requests} requests", *last])
        return Unscored(Reason.GENRM_REFUSED if refused else Reason.GENRM_UNREACHABLE, what)


def _too_long(finding: _Finding | Unscored) -> bool:
    return isinstance(finding, Unscored) and finding.reason is Reason.GENRM_CONTEXT


async def _cancel(tasks: Sequence[asyncio.Task[Any]] | set[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _seed(key: str, vote: int, window: int) -> int:
    """From the content: a resumed run asks the same again. A retry asks with the next one."""
    if vote or window:
        key = _content_key(key, str(vote), str(window))
    return int(key[:7], 16)


def _content_key(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode("utf-8", errors="surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()
