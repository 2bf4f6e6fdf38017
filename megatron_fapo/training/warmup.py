"""Supervised warm-up: the policy's own code with cross-entropy in place of the policy loss.

In: JSONL rows {"messages": [{role, content}, ...], "response": text}. Out: an HF checkpoint of the trained model.
Used to give tiny policies and tiny GenRMs something to start from; it trains any model that the policy supports.

`training.steps` updates of `training.prompts_per_mini_batch` rows each, in a new order every epoch.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_fapo.config.root import Config
from megatron_fapo.errors import UserError
from megatron_fapo.observe.log import setup_logging
from megatron_fapo.observe.loggers import Loggers
from megatron_fapo.observe.metrics import MetricsWriter
from megatron_fapo.policy.batch import TrainSample
from megatron_fapo.policy.worker import SUPERVISED
from megatron_fapo.training.cluster import launch

log = logging.getLogger(__name__)

_LISTED = 20


def read_demonstrations(path: Path, tokenizer: Any, max_tokens: int) -> list[TrainSample]:
    """Rows as training samples: the chat template of the prompt, then the response and the end token.

    Raises:
        UserError: the file is missing, rows are malformed or too long; with line numbers, all at once.
    """
    if not path.is_file():
        raise UserError(f"{path} not found: --data takes a JSONL file of {{messages, response}} rows")
    samples, problems = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            messages, response = row["messages"], row["response"]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
            end = [tokenizer.eos_token_id]
            sample = TrainSample(tuple(prompt), tuple(tokenizer.encode(response, add_special_tokens=False) + end))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            problems.append(f"{path}:{number}: not a {{messages, response}} row: {error!r}")
            continue
        if sample.tokens > max_tokens:
            problems.append(f"{path}:{number}: {sample.tokens} tokens, over {max_tokens}")
        samples.append(sample)
    if problems or not samples:
        shown = problems[:_LISTED] + ([f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else [])
        raise UserError("\n".join(shown) or f"{path} has no rows")
    return samples


def batches(samples: list[TrainSample], size: int, seed: int) -> Iterator[list[TrainSample]]:
    """Endless batches; every sample once per epoch, up to a remainder smaller than a batch."""
    epoch = 0
    while True:
        order = list(range(len(samples)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        for start in range(0, max(len(order) - size, 0) + 1, size):
            yield [samples[i] for i in order[start : start + size]]
        epoch += 1


def warmup_command(config: Config, *, data: Path, out: Path) -> int:
    """`fapo warmup`: returns the exit code."""
    return asyncio.run(_warmup(config, data, out))


async def _warmup(config: Config, data: Path, out: Path) -> int:
    from transformers import AutoTokenizer

    run_dir = Path(config.run_dir)
    setup_logging(run_dir, "driver", terminal=True)
    tokenizer = AutoTokenizer.from_pretrained(config.policy.model_path)
    limit = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    source = batches(read_demonstrations(data, tokenizer, limit), config.training.prompts_per_mini_batch, config.seed)
    steps = config.training.steps
    with MetricsWriter(run_dir) as writer, Loggers(config) as loggers:
        writer.followers.append(loggers.put)
        async with launch(config, rollout=False) as cluster:
            assert cluster.policy is not None
            for step in range(1, steps + 1):
                metrics = (await cluster.policy.train(next(source), loss=SUPERVISED)).metrics
                writer.write(step, metrics)
                if step % max(steps // 10, 1) == 0:
                    log.info("warm-up %d/%d  loss %.4f", step, steps, metrics["policy/supervised_loss"])
            await cluster.policy.export(out.resolve())
    log.info("written: %s", out)
    return 0
