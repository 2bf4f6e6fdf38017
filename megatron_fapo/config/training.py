"""`training`: the loop's schedule, and what is kept."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from megatron_fapo.config.section import Section


class EvaluationConfig(Section):
    every_steps: int = Field(10, ge=0)
    """0: never. Otherwise also before the first step and after the last."""
    samples_per_prompt: int = Field(1, ge=1)
    """k of avg@k and pass@k."""
    samples: dict[str, PositiveInt] = {}
    """Set of data.eval -> its own samples per prompt. Sets not named here take samples_per_prompt."""
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(0.7, gt=0, le=1)


class CheckpointConfig(Section):
    every_steps: int = Field(10, ge=0)
    """0: only at the end and on a stop signal."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints kept."""
    asynchronous: bool = True
    """Training goes on while a checkpoint is written: the policy's ranks copy weights and optimizer state into host
    memory first, 12 to 18 bytes per parameter over all ranks. False: it waits, with the same copies."""
    best_metric: str | None = None
    """Also keep the checkpoint with the highest value of this metric, such as `eval/fpb/f1`, as checkpoints/best.
    Only steps that are evaluated and saved can be chosen; of equal ones the earliest is."""
    best_max_tokens: float | None = Field(None, gt=0)
    """Token budget of the best checkpoint: mean response tokens of the same evaluation, at most."""


class AsynchronyConfig(Section):
    max_staleness: int = Field(0, ge=0)
    """Versions, that is steps, by which a sample may be older than the policy that it trains, counted from the version
    that began it: so many of the next steps are generated while the policy is updated. 1 is one-step-off. 0: engines
    wait while the policy is updated, and the policy while they generate. Above 0 together with algorithm.tis_cap, and
    where nobody takes turns. `weight_sync.in_flight`: whether new weights go in between the tokens of samples."""


class TrainingConfig(Section):
    steps: int = Field(200, ge=1)
    """Rollout-and-train steps of the run, resumed ones included."""
    prompts_per_step: int = Field(512, ge=1)
    """Prompts of one rollout."""
    prompts_per_mini_batch: int = Field(32, ge=1)
    """Groups of one optimizer update; must divide prompts_per_step."""
    asynchrony: AsynchronyConfig = AsynchronyConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log_samples_every_steps: int = Field(1, ge=0)
    """Every so many steps all samples with scores and critiques go to samples/. 0: never."""
