"""`reward`: how a sample becomes a number."""

from __future__ import annotations

import itertools
from typing import Any

from pydantic import Field

from megatron_fapo.config.section import Section


class OverlongConfig(Section):
    enabled: bool = True
    buffer_tokens: int = Field(4096, gt=0)
    """The penalty starts this many tokens before the response limit."""
    penalty_factor: float = Field(1.0, ge=0)
    """The penalty at the limit; linear in between."""


class RewardConfig(Section):
    task: str = Field("policy", pattern="^(policy|critic)$")
    """What is trained: `policy` solves problems and earns the FAPO reward; `critic` is the GenRM itself, which reads
    FAPO-Critic rows and earns the step-wise reward (paper, equation 7). `fapo genrm train` sets it."""
    critic_process: bool = True
    """For the critic: False leaves the localisation term out (the outcome-only ablation)."""
    verifier: str = Field("math_verify", pattern="^(math_verify|recipe_string)$")
    """`math_verify` compares answers as mathematics; `recipe_string` is the recipe's string rule on the last 300
    characters."""
    compare_rules: bool = True
    """Ask the rule that does not decide as well, and report where the two differ. math-verify takes the time: by its
    side the string rule costs nothing, beside the string rule it costs the most."""
    verifier_processes: int = Field(2, ge=1)
    """Worker processes of the rule verifier (and of synchronous user functions)."""
    verifier_timeout_s: float = Field(20.0, gt=0)
    """Past it the worker is killed and replaced and the sample is unscored (`verifier_timeout`)."""
    compute_score: str | None = None
    """Your reward function, `package.module:function` or `path/file.py:function`; replaces rule and GenRM.
    Signature: compute_score(data_source, solution_str, ground_truth, extra_info, **kw) -> float | dict, or async. Where
    `genrm` names servers, one that accepts `reward_router_address` and `reward_model_tokenizer` gets them."""
    compute_score_kwargs: dict[str, Any] = {}
    """Further keywords; they hold over those above."""
    flawed_penalty: float = Field(1.0, ge=0)
    """lambda: subtracted from a right answer that the GenRM calls flawed. 0 only measures."""
    rho_shift: float | None = Field(None, gt=0)
    """Learning progress (sound / wrong) at which flawed positives change from rewarded to penalised.
    Sets lambda = 2 / (rho_shift + 1) in place of flawed_penalty (paper, Appendix A)."""
    rho_shift_schedule: list[tuple[int, float]] = []
    """A rho_shift that moves: [[step, value], ...], linear in between, constant outside. In place of both above."""
    shape: str = Field("fapo", pattern="^(fapo|step_ratio)$")
    """`step_ratio` is the paper's failed ablation: a flawed positive earns the share of its paragraphs before the
    first error, whatever lambda."""
    overlong: OverlongConfig = OverlongConfig()
    max_unscored_share: float = Field(0.1, ge=0, le=1)
    """A step with a larger share of unscored samples stops the run, with everything saved."""

    def flawed_penalty_at(self, step: int) -> float:
        """lambda in training step `step`, counted from 1."""
        points = sorted(self.rho_shift_schedule)
        if not points:
            return self.flawed_penalty if self.rho_shift is None else 2.0 / (self.rho_shift + 1.0)
        rho = points[0][1] if step <= points[0][0] else points[-1][1]
        for (begin, low), (end, high) in itertools.pairwise(points):
            if begin <= step <= end:
                rho = low + (high - low) * (step - begin) / (end - begin)
        return 2.0 / (rho + 1.0)
