"""`rollout`: the vLLM engines that generate samples."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from megatron_fapo.config.section import Section


class SamplingConfig(Section):
    temperature: float = Field(1.0, ge=0)
    """Also used when the policy's own log-probabilities are computed, so that both sides speak of one distribution."""
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = -1
    """-1 keeps the whole vocabulary."""


class RolloutConfig(Section):
    replicas: int = Field(1, ge=1)
    """vLLM engines, one Ray actor each."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs of one engine."""
    samples_per_prompt: int = Field(8, ge=1)
    """Group size n."""
    max_response_tokens: int = Field(8192, gt=0)
    """Responses are cut here and marked `length`."""
    sampling: SamplingConfig = SamplingConfig()
    """For training rollouts. A top_p or top_k that truncates makes behaviour and policy distributions differ."""
    colocated: bool = False
    """Engines on the policy's own GPUs, in its ranks' order: they sleep while the policy works, without weights and KV
    cache, and a refit wakes them. Together with policy.offload. On CPUs vLLM keeps its memory."""
    gpu_memory_utilization: float = Field(0.5, gt=0, lt=1)
    """Share of each GPU's memory that an engine may take, while it is awake (GPU only)."""
    cpu_kv_cache_gb: float = Field(0.25, gt=0)
    """Memory of the KV cache of an engine on CPU, GiB."""
    max_num_seqs: int = Field(256, gt=0)
    """Sequences that an engine decodes at once."""
    enforce_eager: bool = False
    """Skip CUDA graphs and compilation: starts sooner, generates slower."""
    start_timeout_s: float = Field(600.0, gt=0)
    vllm: dict[str, Any] = {}
    """Passed through to vLLM's AsyncEngineArgs."""
