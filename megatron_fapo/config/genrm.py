"""`genrm`: the servers that judge solutions, what they are asked, and how long we wait."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from megatron_fapo.config.section import Section


class GenRMConfig(Section):
    enabled: bool = True
    """False scores by the rule alone: the baseline."""
    urls: list[str] = []
    """External OpenAI-compatible base URLs (`http://host:port/v1`), used beside the servers started here."""
    rendezvous: str | None = None
    """File of a judge service (`fapo genrm serve --rendezvous FILE`), on a filesystem that both see. Its servers are
    used beside those started here and the URLs. The run waits for it up to start_timeout_s, and follows it when it
    moves."""
    api_key_env: str | None = None
    """Name of the environment variable with the API key of the external URLs and of the service. Servers that we start
    ask for the same key."""
    served_model: str = "genrm"
    """The model name sent to servers; ours serve under it. A URL that does not list it is refused at start."""
    judge_function: str | None = None
    """Your judge in place of servers, `package.module:function` or `path/file.py:function`, sync and quick or async.
    Signature: judge(question, ground_truth, solution) -> int, -1 or the 0-based paragraph of the first error."""
    model_path: str | None = None
    """HF checkpoint of the GenRM; needed when servers > 0. Its tokenizer is handed to a reward.compute_score that takes
    `reward_model_tokenizer`, also when all servers are others'."""
    servers: int = Field(1, ge=0)
    """vLLM servers that we start."""
    tensor_parallel: int = Field(1, ge=1)
    gpu_memory_utilization: float = Field(0.3, gt=0, lt=1)
    """Share of each GPU's memory that a server may take (GPU only)."""
    cpu_kv_cache_gb: float = Field(0.25, gt=0)
    """Memory of the KV cache of a server on CPU, GiB."""
    max_model_len: int | None = Field(None, gt=0)
    """Context of the servers that we start; unset: the model's own."""
    enforce_eager: bool = False
    start_timeout_s: float = Field(600.0, gt=0)
    prompt_form: str = Field("tagged", pattern="^(tagged|raw)$")
    """`tagged`: indexed paragraphs, as the GenRM was trained. `raw`: the untagged form of the original's RL runs."""
    temperature: float = Field(0.6, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)
    max_tokens: int = Field(16384, gt=0)
    """Longest critique; the room left in the server's context lowers it further."""
    deadline_s: float = Field(600.0, gt=0)
    """For one verdict, retries included. Past it the sample is unscored (`genrm_deadline`)."""
    request_timeout_s: float = Field(300.0, gt=0)
    """For one request to one server; past it the request is cancelled and another server is asked."""
    max_attempts: int = Field(4, ge=1)
    """Requests for one verdict, over all servers."""
    max_concurrent_per_server: int = Field(256, ge=1)
    """Requests in flight to one server; further ones wait in order."""
    hedge_share: float = Field(0.05, ge=0, le=1)
    """Most requests that may be sent a second time, to another server, when they take longer than 97 % do: as a share
    of all. The first answer counts and the other request is cancelled. 0: none."""
    votes: int = Field(1, ge=1)
    """Critiques for one verdict, with seeds of their own; the majority decides, and asking ends when it is reached.
    Odd. More than 1 needs a temperature above 0."""
    long_solutions: str = Field("window", pattern="^(window|unscored)$")
    """A solution that leaves no room for max_tokens in the server's context: `window` has it judged in parts, in the
    tagged form; `unscored` leaves it unscored (`genrm_context`)."""
    window_overlap: int = Field(2, ge=0)
    """Paragraphs that a window shares with the one before."""
    pool_empty_timeout_s: float = Field(600.0, gt=0)
    """No server answers anybody: scoring waits this long for one to come back, and says so; then the run ends with
    everything saved (exit code 76)."""
    colocated: bool = False
    """The servers share the rollout's GPUs: they sleep while it generates, and judge after it. False: they judge while
    others still generate."""
    judge_eval: bool = True
    """Ask the GenRM about right answers of evaluation samples too, to report their flawed-positive ratio."""
    vllm: dict[str, Any] = {}
    """Passed through to `vllm serve` as options (`{max_num_seqs: 64}` is `--max-num-seqs 64`)."""

    @property
    def named(self) -> bool:
        """Whether there are servers to ask."""
        return bool(self.model_path if self.servers > 0 else self.urls or self.rendezvous)
