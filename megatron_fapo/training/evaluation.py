"""Evaluation: samples of held-out prompts, scored as in training, summarised as avg@k, pass@k and maj@k of a policy, or
as how well a critic judges.

In: a running cluster and the evaluation sets. Out: metrics `eval/<set>/...`. `fapo evaluate` is the same without a
policy: the engines serve the checkpoint itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_fapo.algorithm.metrics import critic_evaluation_metrics, evaluation_metrics
from megatron_fapo.config.rollout import SamplingConfig
from megatron_fapo.config.root import Config
from megatron_fapo.data.datasets import load_prompts
from megatron_fapo.data.records import Group, Prompt
from megatron_fapo.genrm.rules import normalize_final_answer
from megatron_fapo.genrm.scoring import Scoring
from megatron_fapo.observe.comparison import as_text
from megatron_fapo.observe.files import write_atomically
from megatron_fapo.observe.log import setup_logging
from megatron_fapo.observe.report import EVALUATION, evaluation_table, write_report
from megatron_fapo.observe.samples import write_evaluation_samples
from megatron_fapo.processes import ProcessDiedError
from megatron_fapo.training.cluster import Cluster, launch
from megatron_fapo.training.failure import forget_failure, report_failure
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
    assert cluster.reward is not None
    metrics, scoring = dict[str, float](), cluster.reward.begin_step()  # rollouts that run meanwhile have their own
    for name, prompts in sets.items():
        metrics |= set_metrics(config, name, await sample_set(config, cluster, scoring, name, prompts))
    return metrics


async def sample_set(
    config: Config, cluster: Cluster, scoring: Scoring, name: str, prompts: tuple[Prompt, ...]
) -> list[Group]:
    """The scored samples of one set."""
    assert cluster.rollout is not None
    cfg = config.training.evaluation
    stream = cluster.rollout.generate(
        prompts,
        [0] * len(prompts),
        n=cfg.samples.get(name, cfg.samples_per_prompt),
        sampling=SamplingConfig(temperature=cfg.temperature, top_p=cfg.top_p),
        max_tokens=config.rollout.max_response_tokens,
    )
    asked = config.genrm.judge_eval or config.reward.compute_score is not None
    turn = cluster.judges_turn(keep_weights=True) if asked else None
    judged = scoring.score_stream(stream, judge=config.genrm.judge_eval, turn=turn)
    async with contextlib.aclosing(judged) as scored:
        groups = make_groups([(prompt, 0) for prompt in prompts], [each async for each in scored])
    if turn is not None:
        await cluster.enter("rollout")
    return groups


def set_metrics(config: Config, name: str, groups: list[Group]) -> dict[str, float]:
    """`eval/<name>/...` of a set's samples. Too many unscored samples are said, since they stop no evaluation."""
    is_critic = config.reward.task == "critic"
    metrics = critic_evaluation_metrics(groups) if is_critic else evaluation_metrics(groups, _vote_key)
    if metrics.get("score/unscored_share", 0.0) > config.reward.max_unscored_share:
        text = "%s: %d of %d samples are unscored; its flawed-positive ratio is that of the others"
        log.warning(text, name, metrics["score/unscored"], metrics["score/samples"])
    return {f"eval/{name}/{key}": value for key, value in metrics.items()}


def _vote_key(prediction: str) -> str:
    # The normaliser takes quadratic time, and this is the driver, not a worker that could be killed.
    return normalize_final_answer(prediction) if len(prediction) <= 200 else prediction


def evaluate_command(config: Config) -> int:
    """`fapo evaluate`: prints the metrics; writes run_dir/evaluation.json, report.html and samples/eval_<set>.jsonl."""
    run_dir = Path(config.run_dir)
    setup_logging(run_dir, "driver", terminal=True)
    forget_failure(run_dir)
    try:
        result = asyncio.run(_evaluate(config))
    except ProcessDiedError as error:
        return report_failure(run_dir, error, 0)
    write_atomically(run_dir / EVALUATION, json.dumps(result, indent=2) + "\n")
    write_report([run_dir], run_dir / "report.html")
    print(as_text(evaluation_table([run_dir])))
    print(run_dir / "report.html")
    return 0


async def _evaluate(config: Config) -> dict[str, Any]:
    from transformers import AutoTokenizer

    began = time.monotonic()
    run_dir = Path(config.run_dir)
    if not config.genrm.judge_eval:  # nobody is going to ask it
        config = config.model_copy(update={"genrm": config.genrm.model_copy(update={"enabled": False})})
    sets = load_evaluation_sets(config, AutoTokenizer.from_pretrained(config.policy.model_path))
    metrics: dict[str, float] = {}
    facts: dict[str, Any] = {}
    async with launch(config, policy=False) as cluster:
        assert cluster.reward is not None
        scoring = cluster.reward.begin_step()
        started = time.monotonic()
        for name, prompts in sets.items():
            since = time.monotonic()
            groups = await sample_set(config, cluster, scoring, name, prompts)
            samples = [sample for group in groups for sample in group.samples]
            write_evaluation_samples(run_dir, name, samples)
            cluster.require_servers()
            metrics |= set_metrics(config, name, groups)
            counts = {"prompts": len(prompts), "samples": len(samples)}
            facts[name] = {"data": config.data.eval[name], **counts, "seconds": time.monotonic() - since}
        metrics |= scoring.metrics()
    return {
        "model": config.policy.model_path,
        "task": config.reward.task,
        "sets": facts,
        "seconds": {"start": started - began, "total": time.monotonic() - began},
        "metrics": metrics,
        "config": config.model_dump(mode="json"),
    }
