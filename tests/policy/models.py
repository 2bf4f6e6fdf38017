"""Tiny random HF checkpoints of every supported architecture, and a reference computation with transformers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from megatron_fapo.policy.batch import TrainSample

VOCAB = 515
"""Odd, so that two tensor ranks need a padded row."""


FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn_exact": {
        "rope_type": "yarn",
        "factor": 3.5,
        "original_max_position_embeddings": 150,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
}
"""RoPE variants, whose effect shows within the 512 positions of these models."""


def write_config(directory: Path, family: str = "qwen3", tied: bool = True, rope: str = "default") -> Any:
    """config.json of a tiny model; returns the transformers configuration."""
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_theta": 10000.0 if rope != "llama3" else 5e5} | ROPES[rope],
    }
    if family.startswith("qwen3"):
        sizes["head_dim"] = 32
    if family == "qwen3_moe":
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": not tied}
    name = {"qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe", "llama": "Llama"}[family]
    config = getattr(transformers, f"{name}Config")(**sizes, architectures=[f"{name}ForCausalLM"])
    config.save_pretrained(directory)
    return config


def write_model(
    directory: Path, family: str = "qwen3", tied: bool = True, dtype: str = "float32", rope: str = "default"
) -> str:
    """Random weights that are nowhere zero or one, so that a forgotten bias or norm shows."""
    import transformers

    config = write_config(directory, family, tied, rope)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
        else:
            torch.nn.init.normal_(parameter, 0.0, 0.08)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    return str(directory)


def make_samples(count: int = 7, seed: int = 3) -> list[TrainSample]:
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    samples = []
    for _ in range(count):
        prompt, response = integer(3, 9), integer(2, 20)
        tokens = torch.randint(0, VOCAB, (prompt + response,), generator=generator).tolist()
        old = (torch.randn(response, generator=generator) * 0.1 - 6.2).tolist()
        samples.append(
            TrainSample(
                prompt_ids=tuple(tokens[:prompt]),
                response_ids=tuple(tokens[prompt:]),
                advantage=float(torch.randn(1, generator=generator)),
                old_logprobs=tuple(old),
                behaviour_logprobs=tuple(x + 0.01 for x in old),
            )
        )
    return samples


@cache
def _reference_model(path: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def reference_logprobs(path: str, sample: TrainSample, temperature: float = 1.0) -> torch.Tensor:
    """By transformers, one sample at a time, unpadded: the second way to compute the same thing."""
    ids = torch.tensor(sample.token_ids)[None].long()
    logits = _reference_model(path)(ids).logits[0].float() / temperature
    first = len(sample.prompt_ids) - 1
    rows = logits[first : first + len(sample.response_ids)].log_softmax(-1)
    return rows.gather(1, torch.tensor(sample.response_ids).long()[:, None])[:, 0]


def reference_gradients(path: str, samples: list[TrainSample]) -> dict[str, torch.Tensor]:
    """HF-named gradients of the clipped objective, written plainly: token-mean over all samples."""
    model = _reference_model(path)
    model.zero_grad()
    total = torch.zeros(())
    for sample in samples:
        logprob = reference_logprobs(path, sample)
        ratio = (logprob - torch.tensor(sample.old_logprobs)).exp()
        plain, clipped = -sample.advantage * ratio, -sample.advantage * ratio.clamp(0.8, 1.28)
        loss = torch.maximum(plain, clipped)
        if sample.advantage < 0:
            loss = torch.minimum(loss, torch.tensor(-sample.advantage * 10.0))
        total = total + loss.sum()
    (total / sum(len(s.response_ids) for s in samples)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}
