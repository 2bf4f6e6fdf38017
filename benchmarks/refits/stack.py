"""The run's own cluster for a benchmark of refits: policy ranks and engines as `fapo train` starts them, without
optimizer, reward loop and judges, and with what the benchmark asks of them besides."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from benchmarks.refits.floors import FloorPolicy
from benchmarks.refits.models import RandomCheckpoint, is_hole
from benchmarks.refits.reference import ReferenceEngine
from megatron_fapo.config.load import load_config
from megatron_fapo.config.root import Config
from megatron_fapo.data.records import Prompt
from megatron_fapo.policy import hf_weights
from megatron_fapo.training.cluster import Cluster, launch

PROMPT_TOKENS, RESPONSE_TOKENS, TEXT_TOKENS = 32, 32, 448
NO_OPTIMIZER = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[], state={})), None
"""In place of mcore's, whose state a refit does not touch: 12 bytes a parameter that a card may not have."""


@dataclass(frozen=True)
class Case:
    """Where the weights are and where they go."""

    tensor: int
    pipeline: int
    rollout_tensor: int
    colocated: bool
    replicas: int = 1

    @property
    def gpus(self) -> int:
        return self.tensor * self.pipeline + (0 if self.colocated else self.rollout_tensor * self.replicas)


class BenchPolicy(FloorPolicy):
    """A policy rank whose weights are a function of a number."""

    def join(self, *args: Any) -> dict[str, Any]:
        with mock.patch("megatron_fapo.policy.optimizer.make_optimizer", return_value=NO_OPTIMIZER):
            if is_hole(args[1].model_path):
                hf_weights.HFCheckpoint = RandomCheckpoint  # type: ignore[assignment,misc]
            return super().join(*args)

    def set_weights(self, number: int) -> None:
        """The checkpoint's weights, all made smaller by `number` 64ths."""
        worker = self._up
        hf_weights.load_hf(worker.chunks, worker.shape, worker.cfg.model_path)
        for parameter in itertools.chain.from_iterable(chunk.parameters() for chunk in worker.chunks):
            parameter.data.mul_(1 - number / 64)


class BenchEngine(ReferenceEngine):
    """An engine that can also say how likely it finds a text."""

    async def score(self, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of every token but the first, of each text."""
        from vllm import SamplingParams, TokensPrompt

        async def one(number: int, tokens: Sequence[int]) -> list[float]:
            params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
            prompt = TokensPrompt(prompt_token_ids=list(tokens))
            async for output in self._llm.generate(prompt, params, f"score-{number}"):
                found = output.prompt_logprobs
            return [found[i][token].logprob for i, token in enumerate(tokens) if i]

        return [await one(i, tokens) for i, tokens in enumerate(texts)]


def make_config(case: Case, model: Path, run_dir: Path, device: str, backend: str, more: Sequence[str]) -> Config:
    """The configuration of a case."""
    values: dict[str, Any] = {
        "run_dir": run_dir,
        "device": device,
        "data.max_prompt_tokens": TEXT_TOKENS,
        "policy.model_path": model,
        "policy.parallel.tensor": case.tensor,
        "policy.parallel.pipeline": case.pipeline,
        "policy.offload": str(case.colocated).lower(),
        "rollout.colocated": str(case.colocated).lower(),
        "rollout.tensor_parallel": case.rollout_tensor,
        "rollout.replicas": case.replicas,
        "rollout.max_response_tokens": RESPONSE_TOKENS,
        "rollout.max_num_seqs": 32,
        "rollout.sampling.temperature": 1.0,
        "genrm.enabled": "false",
    }
    if device == "gpu":
        values["rollout.vllm.kv_cache_memory_bytes"] = 2**30  # what is measured lies in the rest
        values["rollout.vllm.weight_transfer_config.backend"] = backend
        if is_hole(model):
            values["rollout.vllm.load_format"] = "dummy"
    return load_config([], [*(f"{key}={value}" for key, value in values.items()), *more]).config


def of_export(config: Config, directory: Path) -> Config:
    """The configuration of engines alone that load an HF checkpoint."""
    raw = config.model_dump()
    raw["policy"] |= {"model_path": str(directory), "offload": False}
    raw["rollout"] |= {"colocated": False}
    raw["rollout"]["vllm"].pop("load_format", None)
    return Config.model_validate(raw)


@contextlib.asynccontextmanager
async def start(config: Config, *, policy: bool = True) -> AsyncIterator[Cluster]:
    """The cluster of a configuration; without `policy`, its engines alone."""
    with mock.patch.multiple("megatron_fapo.training.cluster", PolicyActor=BenchPolicy, RolloutEngine=BenchEngine):
        # An evaluation's kind of cluster: no reward loop, and with genrm off no judges either.
        async with launch(config, policy=policy, judges_only=True) as cluster:
            yield cluster


def make_prompts(count: int) -> list[Prompt]:
    """Prompts of arbitrary tokens that every tokenizer has."""
    return [
        Prompt(f"refit/{i}", "refit", (), "", "", tuple(3 + (11 * i + 7 * j) % 200 for j in range(PROMPT_TOKENS - i)))
        for i in range(count)
    ]


async def generations(cluster: Cluster) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Tokens and log-probabilities of greedy responses."""
    assert cluster.rollout is not None
    prompts, sampling = make_prompts(8), cluster.config.rollout.sampling.model_copy(update={"temperature": 0.0})
    stream = cluster.rollout.generate(prompts, [0] * 8, n=1, sampling=sampling, max_tokens=RESPONSE_TOKENS)
    samples = {sample.key: (sample.token_ids, sample.logprobs) async for sample in stream}
    return [samples[key] for key in sorted(samples)]
