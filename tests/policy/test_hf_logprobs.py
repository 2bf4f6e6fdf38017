"""Every family and RoPE variant computes what transformers computes: to 2e-5 in float32 (the largest seen is 4e-6)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_fapo.config.policy import PolicyConfig
from megatron_fapo.policy.batch import TrainSample
from megatron_fapo.policy.parallel import Rank
from tests.policy.models import VOCAB, reference_logprobs, write_model
from tests.policy.ranks import Ranks, make_worker, policy_config

KINDS = {
    # (family, tied, RoPE); whether a Qwen3-MoE scales its experts' weights to sum to 1 goes with being untied.
    "llama": ("llama", False, "default"),
    "qwen2": ("qwen2", True, "default"),
    "qwen3": ("qwen3", True, "default"),
    "qwen3_moe": ("qwen3_moe", True, "default"),
    "qwen3_moe, normalised": ("qwen3_moe", False, "default"),
    "linear": ("llama", True, "linear"),
    "llama3": ("llama", False, "llama3"),
    "yarn": ("qwen2", False, "yarn"),
    "yarn, exact": ("qwen3_moe", False, "yarn_exact"),
}
LENGTHS = ((5, 30), (200, 250))
"""(prompt, response) tokens: short, and far beyond the positions before scaling of the YaRN variants."""


def logprobs_job(rank: Rank, configs: list[PolicyConfig], samples: list[TrainSample]) -> list[list[list[float]]]:
    results = []
    for cfg in configs:
        worker = make_worker(rank, cfg, temperature=0.7)
        (logprobs,) = worker.logprobs([samples])
        results.append(logprobs)
        worker.close()
    return results


@pytest.fixture(scope="module")
def samples() -> list[TrainSample]:
    generator = torch.Generator().manual_seed(7)
    ids = [torch.randint(0, VOCAB, (p + r,), generator=generator).tolist() for p, r in LENGTHS]
    return [TrainSample(tuple(i[:p]), tuple(i[p:])) for i, (p, _) in zip(ids, LENGTHS, strict=True)]


def test_logprobs_are_those_of_transformers(ranks: Ranks, tmp_path: Path, samples: list[TrainSample]) -> None:
    paths = [write_model(tmp_path / name, family, tied, rope=rope) for name, (family, tied, rope) in KINDS.items()]
    (results,) = ranks.run(1, logprobs_job, [policy_config(path) for path in paths], samples)
    for name, path, result in zip(KINDS, paths, results, strict=True):
        for sample, got in zip(samples, result, strict=True):
            expected = reference_logprobs(path, sample, temperature=0.7)
            difference = (torch.tensor(got) - expected).abs().max()
            assert difference < 2e-5, (name, len(sample.prompt_ids), difference)
