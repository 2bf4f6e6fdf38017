"""`algorithm`: advantage and policy loss."""

from __future__ import annotations

from pydantic import Field

from megatron_fapo.config.section import Section


class AlgorithmConfig(Section):
    clip_low: float = Field(0.2, ge=0, lt=1)
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = Field(0.28, ge=0)
    """The ratio is clipped above 1 + clip_high (clip-higher)."""
    dual_clip: float | None = Field(10.0, gt=1)
    """Upper bound of the ratio for negative advantages; unset: none."""
    normalize_std: bool = True
    """Divide group advantages by the unbiased standard deviation + 1e-6."""
    old_logprobs: str = Field("policy", pattern="^(policy|engine)$")
    """Whose log-probabilities the ratio is taken against. `policy`: its own as the step begins; the first mini-batch of
    a step has them from its training, the others take a forward pass. `engine`: the rollout engine's stand for those of
    the other mini-batches, which saves the pass, while mismatch_gate holds."""
    mismatch_gate: float = Field(1.01, ge=1)
    """With old_logprobs: engine, the most that mismatch/token_mult_prob_error may have been in the newest step that
    measured it. Above it, and where no step has measured it yet, a step takes the pass."""
    tis_cap: float | None = Field(None, gt=0)
    """Truncated importance sampling: token weights min(pi_old / pi_behaviour, tis_cap). Unset: off."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the k3 KL to the reference policy (the model the run started from)."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the entropy bonus."""
    drop_uniform_groups: bool = False
    """Leave groups whose rewards are all equal out of the loss (their advantage is 0 in any case)."""
