"""`fapo genrm label`: critic rows out of prompts, with the processes that takes.

Plan, estimate, ask; then one sampler after the other, its engines beside the teacher; then the rows. Whatever ends it,
the journal beside the output has all that was finished, and the same command goes on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_fapo.config.root import Config, samplers
from megatron_fapo.data.datasets import SUFFIXES, load_prompts, write_prompts
from megatron_fapo.errors import UserError
from megatron_fapo.genrm.client import GenRMClient
from megatron_fapo.genrm.judge_function import FunctionJudge
from megatron_fapo.genrm.label import Journal, Labeller, sample_from_urls
from megatron_fapo.genrm.labelling import (
    Draw,
    Item,
    describe,
    draws_of,
    estimate,
    identity,
    make_rows,
    summary,
    to_do,
)
from megatron_fapo.genrm.verifier import Verifier
from megatron_fapo.observe.log import setup_logging
from megatron_fapo.rollout.pool import RolloutPool
from megatron_fapo.training.cluster import launch
from megatron_fapo.training.signals import StopRequest, StopRequestedError

log = logging.getLogger(__name__)


class _NoTokenizer:
    """For samplers behind URLs: their servers tokenise."""

    def apply_chat_template(self, *_: Any, **__: Any) -> list[int]:
        return []


def label_command(config: Config, *, out: Path, yes: bool, dry_run: bool) -> int:
    """Returns the exit code. Raises UserError for an `out` that is not ours, and for a journal of other settings."""
    began = time.monotonic()
    path = out.with_name(out.name + ".journal.jsonl")
    if out.suffix not in SUFFIXES:
        raise UserError(f"--out {out}: rows are written as {' or '.join(SUFFIXES)}")
    if out.exists() and not path.exists():
        raise UserError(f"--out {out} exists and has no journal beside it: it would be lost; choose another name")
    setup_logging(Path(config.run_dir), "driver", terminal=True)
    draws = _load_draws(config)
    everything = [draw for of_one in draws.values() for draw in of_one]
    journal = Journal(path, identity(config))
    cost = estimate(config, everything, journal.items)
    print(f"{len(everything):,} solutions wanted, {len(everything) - cost.to_sample:,} in {path}")
    print(describe(config, cost), flush=True)
    if dry_run:
        return 0
    if cost.to_sample or cost.to_judge:
        if sys.stdin.isatty() and not yes and input("go on? [y/N] ").strip().lower() not in ("y", "yes"):
            return 0
        with journal:
            stopped = asyncio.run(_label(config, draws, journal))
        if stopped is not None:
            log.info("stopped on request; the same command goes on from %s", path)
            return stopped
    rows, dropped = make_rows(config, everything, journal.items)
    flawed = sum(row["reward_model"]["ground_truth"] >= 0 for row in rows)
    figures = summary(config, everything, journal.items)
    figures |= {"rows": len(rows), "sound": len(rows) - flawed, "flawed": flawed}
    figures |= {f"dropped/{reason}": count for reason, count in sorted(dropped.items())}
    print("\n".join(f"{name:<28} {value:,.{3 if value % 1 else 0}f}" for name, value in figures.items()))
    print(f"{'time':<28} {timedelta(seconds=round(time.monotonic() - began))}")
    if not rows:
        log.error("no row came out; %s keeps what was done", path)
        return 1
    beside = out.with_name(f"{out.stem}.partial{out.suffix}")
    write_prompts(beside, rows)
    beside.replace(out)
    if figures["unfinished"] or figures["sampled"] < figures["wanted"]:
        log.warning("not all is finished (see above): the same command tries again what is missing")
    print(out)
    return 0


def _load_draws(config: Config) -> dict[str, list[Draw]]:
    """The wanted solutions of each sampler. Repeated rows are one prompt: how often is the samplers' parameter."""
    from transformers import AutoTokenizer

    data, draws = config.data.model_copy(update={"merge_repeats": True}), {}
    for name, sampler in samplers(config).items():
        local = sampler.model_path is not None
        tokenizer = AutoTokenizer.from_pretrained(sampler.model_path) if local else _NoTokenizer()
        loaded = load_prompts(data.train, tokenizer, data)
        for note in loaded.left_out():
            log.warning("%s: %s", name, note)
        draws[name] = draws_of(name, loaded.prompts, sampler.samples_per_prompt or config.rollout.samples_per_prompt)
    return draws


async def _label(config: Config, draws: dict[str, list[Draw]], journal: Journal) -> int | None:
    """One sampler after the other; the exit code when a stop was asked for."""
    with StopRequest() as stop:
        try:
            for name, of_one in draws.items():
                missing, started = to_do(of_one, journal.items, config.labelling.votes)
                if missing or started:
                    log.info("%s: %d solutions to sample, %d to judge further", name, len(missing), len(started))
                    await stop.race(_label_sampler(config, name, of_one, missing, started, journal))
        except StopRequestedError:
            return stop.exit_code
    return None


async def _label_sampler(
    config: Config, name: str, draws: list[Draw], missing: list[Draw], started: list[Item], journal: Journal
) -> None:
    sampler = samplers(config)[name]
    ours = sampler.model_path is not None and bool(missing)
    if ours:
        policy = config.policy.model_copy(update={"model_path": sampler.model_path})
        config = config.model_copy(update={"policy": policy})
    async with contextlib.AsyncExitStack() as stack:
        engines, urls, function = None, config.genrm.urls, config.genrm.judge_function
        if ours or (function is None and config.genrm.servers > 0):
            cluster = await stack.enter_async_context(launch(config, policy=False, rollout=ours, judges_only=True))
            engines, urls = cluster.rollout, cluster.genrm_urls
        judge = GenRMClient(urls, config.genrm) if function is None else FunctionJudge(function)
        verifier = Verifier(config.reward)
        for part in (judge, verifier):
            stack.push_async_callback(part.close)
        await asyncio.gather(judge.check(), verifier.start())
        if engines is not None:
            solutions = _sample(engines, missing, config)
        else:
            solutions = sample_from_urls(name, sampler, missing, config)
        stream = await stack.enter_async_context(contextlib.aclosing(solutions))
        await Labeller(journal, draws, verifier, judge, config.labelling.votes).run(started, stream)


async def _sample(pool: RolloutPool, draws: Sequence[Draw], config: Config) -> AsyncGenerator[Item]:
    """Solutions of our engines. Only their text is kept: with log-probabilities, those that wait for a judge would
    fill the memory."""
    by_key = {draw.sample_key: draw.key for draw in draws}
    samples = pool.generate(
        [draw.prompt for draw in draws],
        [draw.key.sample_index for draw in draws],
        n=1,
        sampling=config.rollout.sampling,
        max_tokens=config.rollout.max_response_tokens,
    )
    async with contextlib.aclosing(samples):
        async for sample in samples:
            yield Item(by_key[sample.key], sample.text, len(sample.token_ids))
