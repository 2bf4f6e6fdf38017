"""`labelling`: who writes the solutions that `fapo genrm label` turns into critic rows, and which rows are kept."""

from __future__ import annotations

from pydantic import Field

from megatron_fapo.config.section import Section


class SamplerConfig(Section):
    model_path: str | None = None
    """HF checkpoint directory, sampled by engines of ours as `rollout` says."""
    urls: list[str] = []
    """In place of model_path: base URLs (`http://host:port/v1`) of running OpenAI-compatible servers."""
    model: str = ""
    """The name under which the URLs serve the model."""
    api_key_env: str | None = None
    """Name of the environment variable with the API key of the URLs."""
    request_timeout_s: float = Field(1800.0, gt=0)
    """For one solution from a URL."""
    samples_per_prompt: int | None = Field(None, ge=1)
    """Unset: rollout.samples_per_prompt."""


class AssumedConfig(Section):
    """What the cost estimate assumes until the journal has measured it (rates are always assumed)."""

    response_tokens: int = Field(1024, gt=0)
    """Of one solution."""
    right_share: float = Field(0.5, ge=0, le=1)
    """Share of solutions with the right final answer: those are judged."""
    critique_tokens: int = Field(1024, gt=0)
    """Of one vote of the teacher."""
    sampler_tokens_per_s: float = Field(2500.0, gt=0)
    """Solution tokens per second and GPU of a sampler."""
    teacher_tokens_per_s: float = Field(1000.0, gt=0)
    """Critique tokens per second and GPU of the teacher."""
    teacher_prompt_tokens_per_s: float = Field(10000.0, gt=0)
    """Prompt tokens that a GPU of the teacher reads per second."""


class LabellingConfig(Section):
    samplers: dict[str, SamplerConfig] = {}
    """The models whose solutions are labelled, one after the other: name in the rows' provenance -> where it is.
    Empty: policy.model_path, under the name `policy`."""
    votes: int = Field(3, ge=1)
    """Judgements of each right solution. It is kept when all name the same paragraph; the first that differs ends the
    judging of a solution."""
    max_per_question: int | None = Field(None, ge=1)
    """Rows of one question at most."""
    balance: bool = False
    """As many sound rows as flawed ones: the rest of the larger class is left out."""
    assumed: AssumedConfig = AssumedConfig()
