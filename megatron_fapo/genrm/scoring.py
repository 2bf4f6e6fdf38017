"""The scores of one step: rule first, the GenRM only for right answers, then the overlong term.

Steps whose rollouts run at once have a `Scoring` each, with a lambda, counts and shared judgements of its own. The
verifier, the servers and their queue are the reward loop's, and everybody's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_fapo.algorithm.reward import critic_reward, fapo_reward, overlong_penalty, step_ratio_reward
from megatron_fapo.config.reward import RewardConfig
from megatron_fapo.data.paragraphs import split_paragraphs
from megatron_fapo.data.records import JudgeRequest, Sample, SampleKey, Score, ScoredSample
from megatron_fapo.genrm.client import GenRMClient
from megatron_fapo.genrm.counters import Counters, Totals
from megatron_fapo.genrm.gateway import Gateway
from megatron_fapo.genrm.judge_function import FunctionJudge
from megatron_fapo.genrm.rules import OTHER_RULE, RuleResult
from megatron_fapo.genrm.verdict import Unscored, parse_verdict
from megatron_fapo.genrm.verifier import Verifier
from megatron_fapo.observe.stall import WAITS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Means:
    """What all steps score with."""

    config: RewardConfig
    max_response_tokens: int
    max_in_flight: int
    verifier: Verifier
    judges: GenRMClient | FunctionJudge | Gateway | None
    """None: no GenRM is asked."""
    totals: Totals = field(default_factory=Totals)
    pending: dict[str, dict[object, tuple[Sample, float]]] = field(default_factory=dict)
    """Stage -> samples in it, in the order of arrival, and since when."""


class Scoring:
    """Samples in, scores out."""

    def __init__(self, means: Means, step: int) -> None:
        self._means, self._config, self._verifier = means, means.config, means.verifier
        self._client = None if isinstance(means.judges, Gateway) else means.judges
        self._gateway = means.judges if isinstance(means.judges, Gateway) else None
        self._book = None if means.judges is None else means.judges.begin_step()
        self._counters = Counters(means.totals)
        self._penalty = means.config.flawed_penalty_at(step)

    async def score(self, sample: Sample, *, judge: bool = True, judging: asyncio.Event | None = None) -> Score:
        """The score of one sample. `judge=False` leaves the GenRM out: right answers count as sound. The GenRM is not
        asked before `judging` is set.

        With a user's `compute_score`, its score takes the place of rule and GenRM. The critic's critiques are scored by
        their label alone. The overlong term is added to all.
        """
        if self._config.task == "critic":
            score = self._score_critique(sample)
        elif self._config.compute_score is not None:
            score = await self._score_by_function(sample, judging)
        else:
            score = await self._score_by_rule(sample, judge, judging)
        self._counters.add("scored" if score.unscored_reason is None else "unscored")
        if score.unscored_reason is not None:
            self._counters.add(f"unscored/{score.unscored_reason}")
            log.debug("%s is unscored: %s", sample.key, score.extra.get("unscored_detail"))
        return score

    async def score_stream(
        self,
        samples: AsyncIterator[Sample],
        *,
        judge: bool = True,
        turn: Callable[[], Awaitable[None]] | None = None,
        group_size: int | None = None,
    ) -> AsyncGenerator[ScoredSample]:
        """Scores every sample once, from the moment it arrives, and yields each as soon as it is scored.

        At most `max_in_flight` samples are taken and not yet handed on; then `samples` has to wait. An error of
        `samples` or of the scoring itself (not of a sample: that is unscored) ends the stream. Nothing runs on after
        its end; whoever stops early wraps it in contextlib.aclosing.

        With `turn`, for servers that sleep while others generate, the GenRM is asked when `samples` has ended and
        `turn` has returned. All samples are taken then: right answers are handed on after the last has come.

        With `group_size`, the samples of a prompt, the metrics tell when groups were complete.
        """
        finished: asyncio.Queue[asyncio.Task[ScoredSample | None]] = asyncio.Queue()
        running: set[asyncio.Task[ScoredSample | None]] = set()
        places = asyncio.Semaphore(self._means.max_in_flight)
        judging = None if turn is None else asyncio.Event()
        groups, began = Counter[tuple[str, int]](), time.monotonic()

        def begin(work: Coroutine[Any, Any, ScoredSample | None]) -> None:
            task = asyncio.create_task(work, name="reward loop")
            running.add(task)
            task.add_done_callback(finished.put_nowait)

        async def score_one(sample: Sample) -> ScoredSample:
            return ScoredSample(sample, await self.score(sample, judge=judge, judging=judging))

        async def take_all() -> None:
            keys: set[SampleKey] = set()
            await places.acquire()
            async for sample in samples:
                if sample.key in keys:
                    raise ValueError(f"sample {sample.key} came twice")
                keys.add(sample.key)
                begin(score_one(sample))
                if judging is None:
                    await places.acquire()
            if turn is not None and judging is not None:
                await turn()
                judging.set()

        begin(take_all())
        try:
            while running:
                task = await finished.get()
                running.discard(task)
                scored = task.result()
                if scored is not None:
                    places.release()
                    group = scored.sample.key[:2]
                    groups[group] += 1
                    if groups[group] == group_size:
                        self._counters.add("groups_complete")
                        self._counters.observe("group", time.monotonic() - began)
                    yield scored
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def metrics(self) -> dict[str, float]:
        """`scoring/...` and `genrm/...` of the step so far; docs/genrm.md lists them."""
        values = dict.fromkeys(("scoring/scored", "scoring/unscored"), 0.0) | self._counters.metrics("scoring")
        values["scoring/flawed_penalty"] = self._penalty
        if compared := self._counters.counts["rules_compared"]:
            values["scoring/rule_agreement"] = 1 - self._counters.counts["rules_disagree"] / compared
        values["scoring/in_flight"] = float(sum(map(len, self._means.pending.values())))
        values["scoring/workers_replaced"] = float(self._verifier.replaced)
        return values | ({} if self._means.judges is None else self._means.judges.metrics(self._book))

    async def _score_by_rule(self, sample: Sample, judge: bool, judging: asyncio.Event | None) -> Score:
        timings: dict[str, Any] = {}
        with self._stage("rule", sample, timings):
            rule = await self._verifier.verify(sample.text, sample.prompt.ground_truth)
        if isinstance(rule, Unscored):
            return _unscored(rule, None, None, timings)
        self._compare(rule, timings)
        verdict = None
        if rule.correct and judge and self._client is not None:
            if judging is not None:
                await judging.wait()
            with self._stage("genrm", sample, timings):
                prompt = sample.prompt
                outcome = await self._client.judge(
                    prompt.question, prompt.ground_truth, sample.text, name=str(sample.key), book=self._book
                )
            if isinstance(outcome, Unscored):
                return _unscored(outcome, rule.correct, rule.prediction, timings)
            verdict = outcome
        if self._config.shape == "step_ratio":
            first_wrong = -1 if verdict is None else verdict.index
            reward = step_ratio_reward(rule.correct, first_wrong, len(split_paragraphs(sample.text)))
        else:
            reward = fapo_reward(rule.correct, verdict is not None and verdict.flawed, self._penalty)
        overlong, history = self._overlong(sample), () if verdict is None else verdict.history
        return Score(reward + overlong, rule.correct, rule.prediction, verdict, overlong, None, timings, history)

    def _compare(self, rule: RuleResult, extra: dict[str, Any]) -> None:
        if rule.other is not None:
            self._counters.add("rules_compared")
        if rule.other not in (None, rule.correct):
            alone = self._config.verifier if rule.correct else OTHER_RULE[self._config.verifier]
            self._counters.add("rules_disagree")
            self._counters.add(f"right_by_{alone}_alone")
            extra[f"right_by_{alone}_alone"] = True

    def _score_critique(self, sample: Sample) -> Score:
        """Read as a verdict is read when the critic serves: a critique that is cut or ends on no index is a wrong one.
        A row without a usable label would have been refused with its dataset."""
        label, total = int(sample.prompt.ground_truth), int(sample.prompt.extra_info["total_steps"])
        outcome = parse_verdict(sample.text, sample.finish_reason, total)
        predicted = outcome if isinstance(outcome, int) else None
        right = predicted is not None and (predicted == -1) == (label == -1)
        reward, overlong = critic_reward(predicted, label, total, self._config.critic_process), self._overlong(sample)
        prediction = None if predicted is None else str(predicted)
        return Score(reward + overlong, right, prediction, None, overlong, extra={"total_steps": total})

    async def _score_by_function(self, sample: Sample, judging: asyncio.Event | None) -> Score:
        timings: dict[str, Any] = {}
        if judging is not None and self._gateway is not None:
            await judging.wait()
        history: tuple[JudgeRequest, ...] = ()
        with self._stage("compute_score", sample, timings):
            if self._gateway is None:
                user = await self._verifier.compute_score(sample)
            else:
                async with self._gateway.visit(str(sample.key), self._book) as visit:
                    user = await self._verifier.compute_score(sample, visit)
                user, history = visit.failed or user, tuple(visit.history)
        if isinstance(user, Unscored):
            return _unscored(replace(user, history=history), None, None, timings)
        overlong, extra = self._overlong(sample), timings | user.extra
        return Score(user.score + overlong, user.correct, user.prediction, None, overlong, None, extra, history)

    def _overlong(self, sample: Sample) -> float:
        return overlong_penalty(len(sample.token_ids), self._means.max_response_tokens, self._config.overlong)

    @contextmanager
    def _stage(self, stage: str, sample: Sample, timings: dict[str, Any]) -> Iterator[None]:
        """Books the seconds of a stage, queueing included, for the sample and for the metrics."""
        pending, token, started = self._means.pending.setdefault(stage, {}), object(), time.monotonic()
        pending[token] = sample, started
        try:
            if stage == "genrm":  # the client says more: which server, how often
                yield
            else:
                with WAITS.on(f"scoring.{stage}", "the verifier's workers", str(sample.key)):
                    yield
        finally:
            del pending[token]
        timings[f"{stage}_s"] = time.monotonic() - started
        self._counters.observe(stage, timings[f"{stage}_s"])


def _unscored(why: Unscored, correct: bool | None, prediction: str | None, timings: dict[str, Any]) -> Score:
    extra = timings | {"unscored_detail": why.detail}
    return Score(None, correct, prediction, unscored_reason=why.reason.value, extra=extra, judging=why.history)
