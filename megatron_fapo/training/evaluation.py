"""Evaluation: samples of held-out prompts, scored as in training, summarised as avg@k, pass@k and maj@k.

In: a running cluster and the evaluation sets. Out: metrics `eval/<set>/...`. `fapo evaluate` is the same without a
policy: the engines serve the checkpoint itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_fapo.algorithm.metrics import evaluation_metrics
from megatron_fapo.config.rollout import SamplingConfig
from megatron_fapo.config.root import Config
from megatron_fapo.data.datasets import load_prompts
from megatron_fapo.data.records import Prompt
from megatron_fapo.observe.files import write_atomically
from megatron_fapo.observe.log import setup_logging
from megatron_fapo.training.cluster import Cluster, launch
from megatron_fapo.training.step import make_groups

log = logging.getLogger(__name__)

EvaluationSets = Mapping[str, tuple[Prompt, ...]]


def load_evaluation_sets(config: Config, tokenizer: Any) -> EvaluationSets:
    """The sets of data.eval by name."""
    sets = {}
    for name, path in config.data.eval.items():
        task, limit = config.reward.task, config.data.eval_limit
        loaded = load_prompts([path], tokenizer, config.data, task=task, split="test", limit=limit)
        for note in loaded.left_out():
            log.warning("data.eval.%s: %s", name, note)
        sets[name] = loaded.prompts
    return sets


async def evaluate(config: Config, cluster: Cluster, sets: EvaluationSets) -> dict[str, float]:
    """Metrics of every set. Sampled answers depend on the run's seed alone, so two evaluations compare."""
    assert cluster.rollout is not None
    assert cluster.reward is not None
    cfg = config.training.evaluation
    sampling = SamplingConfig(temperature=cfg.temperature, top_p=cfg.top_p)
    metrics: dict[str, float] = {}
    for name, prompts in sets.items():
        stream = cluster.rollout.generate(
            prompts,
            [0] * len(prompts),
            n=cfg.samples.get(name, cfg.samples_per_prompt),
            sampling=sampling,
            max_tokens=config.rollout.max_response_tokens,
        )
        judged = cluster.reward.score_stream(stream, judge=config.genrm.judge_eval)
        async with contextlib.aclosing(judged) as scored:
            groups = make_groups([(prompt, 0) for prompt in prompts], [each async for each in scored])
        metrics |= {f"eval/{name}/{key}": value for key, value in evaluation_metrics(groups).items()}
    return metrics


def evaluate_command(config: Config) -> int:
    """`fapo evaluate`: prints the metrics and writes run_dir/evaluation.json."""
    metrics = asyncio.run(_evaluate(config))
    path = Path(config.run_dir) / "evaluation.json"
    write_atomically(path, json.dumps(metrics, indent=2) + "\n")
    width = max(map(len, metrics))
    print("\n".join(f"{name:<{width}}  {value:.4f}" for name, value in sorted(metrics.items())))
    print(path)
    return 0


async def _evaluate(config: Config) -> dict[str, float]:
    from transformers import AutoTokenizer

    setup_logging(Path(config.run_dir), "driver", terminal=True)
    if not config.genrm.judge_eval:  # nobody is going to ask it
        config = config.model_copy(update={"genrm": config.genrm.model_copy(update={"enabled": False})})
    sets = load_evaluation_sets(config, AutoTokenizer.from_pretrained(config.policy.model_path))
    async with launch(config, policy=False) as cluster:
        assert cluster.reward is not None
        cluster.reward.begin_step()
        return await evaluate(config, cluster, sets)
