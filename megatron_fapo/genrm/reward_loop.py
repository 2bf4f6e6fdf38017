"""What scores the samples of a run: the verifier's workers and the way to the GenRM's servers, for every step.

A score is a number, or unscored with a reason; a failure is never a number. Everything here is asyncio in one process:
waiting costs nothing, and what computes does so in the verifier's workers and the GenRM's servers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence

from megatron_fapo.config.genrm import GenRMConfig
from megatron_fapo.config.reward import RewardConfig
from megatron_fapo.data.records import Sample, Score, ScoredSample
from megatron_fapo.genrm.client import GenRMClient
from megatron_fapo.genrm.gateway import Gateway
from megatron_fapo.genrm.judge_function import FunctionJudge
from megatron_fapo.genrm.scoring import Means, Scoring
from megatron_fapo.genrm.user_function import ROUTER, offers
from megatron_fapo.genrm.verifier import Verifier
from megatron_fapo.observe.prometheus import LIVE, Live

log = logging.getLogger(__name__)


class RewardLoop:
    """Samples in, scores out. Belongs to one event loop; use it as an async context manager."""

    def __init__(
        self,
        reward: RewardConfig,
        genrm: GenRMConfig,
        urls: Sequence[str],
        max_response_tokens: int,
        max_in_flight: int = 4096,
        warn_after_s: float = 60.0,
    ) -> None:
        """`urls` are all servers of the pool, ours and external; unused when the GenRM is off, or a function scores
        without asking for them.

        Raises UserError when `reward.compute_score` cannot be used.
        """
        self._warn_after_s = warn_after_s
        offered = offers(genrm, servers=bool(urls or genrm.rendezvous))
        self._verifier = Verifier(reward, offered, genrm.model_path)
        self._gateway = Gateway(urls, genrm) if ROUTER in self._verifier.given else None
        self._judges: GenRMClient | FunctionJudge | Gateway | None = self._gateway
        if genrm.enabled and reward.compute_score is None and reward.task == "policy":
            path = genrm.judge_function
            self._judges = GenRMClient(urls, genrm) if path is None else FunctionJudge(path)
        self._means = Means(reward, max_response_tokens, max_in_flight, self._verifier, self._judges)
        self._newest = Scoring(self._means, 1)
        self._warner: asyncio.Task[None] | None = None

    async def __aenter__(self) -> RewardLoop:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Starts the verifier's workers and checks every server; see VerifierUnavailable and GenRMUnavailable."""
        try:
            if self._judges is not None:
                await self._judges.check()
            if self._means.config.task == "policy":
                await self._verifier.start()
        except BaseException:
            await self.close()
            raise
        self._warner = asyncio.create_task(self._warn(), name="reward loop warner")
        LIVE.offer(self.live)

    def set_servers(self, urls: Sequence[str]) -> None:
        """The pool's servers, a judge service's excepted, are at these base URLs now."""
        if isinstance(self._judges, GenRMClient | Gateway):
            self._judges.set_servers(urls)

    def begin_step(self, step: int = 1) -> Scoring:
        """Scoring with the step's lambda and with metrics and shared judgements of its own; others under way go on."""
        self._newest = Scoring(self._means, step)
        return self._newest

    async def score(self, sample: Sample, *, judge: bool = True, judging: asyncio.Event | None = None) -> Score:
        """As of the step that began last (Scoring.score)."""
        return await self._newest.score(sample, judge=judge, judging=judging)

    def score_stream(
        self,
        samples: AsyncIterator[Sample],
        *,
        judge: bool = True,
        turn: Callable[[], Awaitable[None]] | None = None,
        group_size: int | None = None,
    ) -> AsyncGenerator[ScoredSample]:
        """As of the step that began last (Scoring.score_stream)."""
        return self._newest.score_stream(samples, judge=judge, turn=turn, group_size=group_size)

    def metrics(self) -> dict[str, float]:
        """Of the step that began last (Scoring.metrics)."""
        return self._newest.metrics()

    def live(self) -> Live:
        """What is going on, for whoever looks on."""
        counters = {"scoring": self._means.totals}
        if isinstance(self._judges, GenRMClient | Gateway):
            counters["genrm"] = self._judges.totals
            servers = {
                server.url: {"requests": server.requests, "tokens": server.tokens, "alive": server.down_since is None}
                for server in self._judges.servers()
            }
            return Live(self.metrics(), counters, servers)
        return Live(self.metrics(), counters, {})

    async def close(self) -> None:
        """Ends requests, connections and worker processes."""
        LIVE.withdraw(self.live)
        if self._warner is not None:
            self._warner.cancel()
            await asyncio.gather(self._warner, return_exceptions=True)
        if self._judges is not None:
            await self._judges.close()
        await self._verifier.close()

    async def _warn(self) -> None:
        warned_at = dict.fromkeys(("rule", "genrm", "compute_score"), 0.0)
        while True:
            await asyncio.sleep(self._warn_after_s / 4)
            now = time.monotonic()
            for stage, pending in self._means.pending.items():
                oldest, since = next(iter(pending.values()), (None, now))  # dicts keep the order of arrival
                if oldest is not None and now - max(since, warned_at[stage]) >= self._warn_after_s:
                    warned_at[stage] = now
                    text = "waiting on %s for %.0f s: %d samples, the oldest is %s"
                    log.warning(text, stage, now - since, len(pending), oldest.key)
