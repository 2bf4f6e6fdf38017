"""Labelling at work: the journal that forgets nothing, solutions of external servers, the votes on each solution."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import aiohttp

from megatron_fapo.config.labelling import SamplerConfig
from megatron_fapo.config.root import Config
from megatron_fapo.data.records import Verdict
from megatron_fapo.errors import UserError
from megatron_fapo.genrm.labelling import (
    Draw,
    Item,
    ItemKey,
    State,
    apply,
    changes,
    record_of,
    state,
)
from megatron_fapo.genrm.rules import RuleResult
from megatron_fapo.genrm.transport import Answer, Cut, Failure, FailureKind, ask, list_models
from megatron_fapo.genrm.verdict import Unscored
from megatron_fapo.observe.files import json_line, read_json_lines
from megatron_fapo.rollout.sampling import sample_seed

log = logging.getLogger(__name__)

REPORT_EVERY_S = 30.0
FORGET_EVERY = 4096
"""Votes after which the judge's memory of shared judgements is emptied: it holds whole critiques."""
PROBE_TIMEOUT_S = 5.0
ATTEMPTS, FIRST_BACKOFF_S = 4, 0.5


class Rule(Protocol):
    async def verify(self, solution: str, ground_truth: str) -> RuleResult | Unscored: ...


class Judge(Protocol):
    async def judge(self, question: str, ground_truth: str, solution: str, vote: int = 0) -> Verdict | Unscored: ...

    def begin_step(self) -> object: ...


class Journal:
    """An append-only JSONL file of records. `items` is what they say so far; opening it creates nothing."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Reads what is there. Raises UserError when it was written with another configuration."""
        self._path, self._identity = path, identity
        self._file: Any = None
        self._read()

    def _read(self) -> None:
        self.items: dict[ItemKey, Item] = {}
        self._recorded: dict[str, Any] = {}
        for record in read_json_lines(self._path) if self._path.exists() else []:
            if record["kind"] == "identity":
                self._recorded |= record["values"]
            else:
                apply(self.items, record)
        if differences := changes(self._recorded, self._identity):
            raise UserError(
                "\n  ".join([f"{self._path} was written with another configuration:", *differences])
                + "\nset these values back, or give another --out to start anew"
            )

    def __enter__(self) -> Self:
        """From here on it can be appended to, by this process alone; reads anew what another has added meanwhile."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # A critique may hold half of a surrogate pair, which UTF-8 cannot say.
        self._file = self._path.open("a+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(f"{self._path} is being written by another run: wait for it, or end it") from None
        self._read()
        whole = self._path.read_bytes().rfind(b"\n") + 1
        self._file.truncate(whole)  # what a crash tore would spoil the line appended to it
        if self._recorded != self._identity:
            self.write({"kind": "identity", "values": dict(self._identity)})
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, record: dict[str, Any]) -> Item:
        """Keep a record for good; returns the item as it now stands."""
        self.write(record)
        return apply(self.items, record)

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json_line(record))
        self._file.flush()


class Labeller:
    """Puts solutions to the rule and right ones to the judge, each as soon as it is there."""

    def __init__(self, journal: Journal, draws: Iterable[Draw], rule: Rule, judge: Judge, votes: int) -> None:
        self._journal, self._rule, self._judge, self._votes = journal, rule, judge, votes
        self._prompts = {draw.key: draw.prompt for draw in draws}
        self._counts: Counter[str] = Counter()
        self._reported = time.monotonic()

    async def run(self, started: Sequence[Item], solutions: AsyncIterator[Item]) -> None:
        """Finish `started` and everything that `solutions` brings.

        A request without a vote leaves its item open for the next run. An error of `solutions`, rule or judge ends the
        run as itself; nothing runs on after its end.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for item in started:
                    group.create_task(self._advance(item))
                async for item in solutions:
                    self._add(item.key, item)
                    group.create_task(self._advance(item))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _advance(self, item: Item) -> None:
        prompt = self._prompts[item.key]
        if item.correct is None:
            item = self._add(item.key, await self._rule.verify(item.text, prompt.ground_truth))
        while state(item, self._votes) is State.OPEN:
            # Numbered over all runs: an unreadable critique would come again for the same number, that is its seed.
            number = len(item.votes) + len(item.failures)
            outcome = await self._judge.judge(prompt.question, prompt.ground_truth, item.text, vote=number)
            item = self._add(item.key, outcome)
            if isinstance(outcome, Unscored):
                break

    def _add(self, key: ItemKey, outcome: Item | RuleResult | Verdict | Unscored) -> Item:
        record = record_of(key, outcome)
        item = self._journal.add(record)
        self._counts[record.get("reason", record["kind"])] += 1
        if self._counts["vote"] % FORGET_EVERY == FORGET_EVERY - 1:
            self._judge.begin_step()
        if time.monotonic() - self._reported > REPORT_EVERY_S:
            self._reported = time.monotonic()
            log.info("this run so far: %s", ", ".join(f"{name} {count}" for name, count in self._counts.items()))
        return item


async def sample_from_urls(
    name: str, sampler: SamplerConfig, draws: Sequence[Draw], config: Config
) -> AsyncGenerator[Item]:
    """Solutions of running servers as they finish. A draw that no server answers is left out, for the next run.

    Raises UserError when a server does not answer, or does not serve the model.
    """
    key = None if sampler.api_key_env is None else os.environ[sampler.api_key_env]
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    places = asyncio.Semaphore(len(sampler.urls) * config.rollout.max_num_seqs)
    urls = [url.rstrip("/") for url in sampler.urls]

    async def one(session: aiohttp.ClientSession, number: int, draw: Draw) -> Item | None:
        sampling = config.rollout.sampling
        body = {
            "model": sampler.model,
            "messages": list(draw.prompt.messages),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": config.rollout.max_response_tokens,
            "seed": sample_seed(config.seed, draw.sample_key),
        } | ({} if sampling.top_k == -1 else {"top_k": sampling.top_k})
        async with places:
            for attempt in range(ATTEMPTS):
                url = urls[(number + attempt) % len(urls)]
                outcome = await ask(session, url, body, Cut(sampler.request_timeout_s))
                if isinstance(outcome, Answer) and outcome.finish_reason in ("stop", "length"):
                    text = outcome.critique.encode(errors="replace").decode()
                    return Item(draw.key, text, outcome.completion_tokens)
                if isinstance(outcome, Failure):
                    if outcome.kind in (FailureKind.HTTP_4XX, FailureKind.CONTEXT):
                        break
                    await asyncio.sleep(outcome.busy_for_s + FIRST_BACKOFF_S * 2**attempt)
        log.warning("sampler %s gave no solution for %s: %s", name, draw.key, outcome)
        return None

    connector = aiohttp.TCPConnector(limit=0)  # `places` bounds the requests
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
        for url in urls if draws else []:
            models = await list_models(session, url, PROBE_TIMEOUT_S)
            if isinstance(models, str) or sampler.model not in models:
                listed = models if isinstance(models, str) else f"it serves {', '.join(models) or 'nothing'}"
                raise UserError(f"labelling.samplers.{name}: {url} does not serve {sampler.model!r}: {listed}")
        tasks = [asyncio.create_task(one(session, number, draw)) for number, draw in enumerate(draws)]
        try:
            for finished in asyncio.as_completed(tasks):
                if (item := await finished) is not None:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
