"""The policy loss: clipped surrogate with clip-higher and dual clip, optional TIS, KL and entropy terms.

Shapes: B rows, T positions of a micro-batch; any layout will do (padded [B, T], packed [1, T]) as long as all inputs
share it. Entries describe the token AT a position: the caller shifts logits.

Invariants
- Everything returned is a sum over masked-in tokens, so sums over micro-batches and ranks equal the sum over the whole.
- What stands at masked-out positions (inf, NaN, leftovers) reaches neither values nor gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron_fapo.config.algorithm import AlgorithmConfig

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +-this, so that one token far off cannot overflow exp(); beyond it the gradient is 0."""
TOKENS = "policy/tokens"


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch. Only `logprobs_BT` and `entropy_BT` carry gradients; the others are taken as constants."""

    logprobs_BT: Tensor
    """Log-probability of each token under the policy being trained, at the sampling temperature."""
    old_logprobs_BT: Tensor
    """The same under the policy as it was when this step began."""
    advantages_BT: Tensor
    """The sample's advantage, repeated over its response tokens."""
    mask_BT: Tensor
    """bool: response tokens of scored samples."""
    behaviour_logprobs_BT: Tensor | None = None
    """As the rollout engine computed them; required by `tis_cap`."""
    reference_logprobs_BT: Tensor | None = None
    """Under the model that the run started from; required by `kl_coef` > 0."""
    entropy_BT: Tensor | None = None
    """Entropy of the policy's distribution at each position, nats; required by `entropy_coef` > 0."""


@dataclass(frozen=True)
class LossOutputs:
    loss_sum: Tensor
    """Differentiable scalar. Divide by the token count of the GLOBAL mini-batch: the result is then the token mean of
    spec equation 3, however the mini-batch was cut into micro-batches and ranks."""
    token_sums: dict[str, Tensor]
    """Metric name -> detached float64 scalar, summed over tokens. The keys depend on the configuration and on which
    inputs are present, never on the data, so that ranks can reduce them as one vector."""


def policy_loss(inputs: LossInputs, cfg: AlgorithmConfig) -> LossOutputs:
    """Sum over masked tokens of w * surrogate + kl_coef * k3 - entropy_coef * entropy.

    surrogate = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), and at most -A dual_clip where A < 0, with
    r = pi / pi_old; w = min(pi_old / pi_behaviour, tis_cap), a constant; k3 = e^d - 1 - d with d = log pi_ref - log pi.
    Half-precision inputs are computed in float32. Raises ValueError for mismatched shapes, a mask that is not bool, or
    an input that the configuration needs and the caller left out.
    """
    _check(inputs, cfg)
    mask_BT = inputs.mask_BT
    logprobs_BT = _clean(inputs.logprobs_BT, mask_BT)
    old_BT = _clean(inputs.old_logprobs_BT, mask_BT).detach()
    advantages_BT = _clean(inputs.advantages_BT, mask_BT).detach()

    log_ratio_BT = (logprobs_BT - old_BT).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio_BT = log_ratio_BT.exp()
    clipped_BT = ratio_BT.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    surrogate_BT = torch.maximum(-advantages_BT * ratio_BT, -advantages_BT * clipped_BT)
    negative_BT = advantages_BT < 0
    per_token = {
        "policy/ratio_mean": ratio_BT,
        "policy/advantage_mean": advantages_BT,
        "policy/kl_old_new_k1": -log_ratio_BT,
        "policy/kl_old_new_k3": ratio_BT - 1 - log_ratio_BT,
        "policy/clip_high_fraction": (advantages_BT > 0) & (ratio_BT > 1 + cfg.clip_high),
        "policy/clip_low_fraction": negative_BT & (ratio_BT < 1 - cfg.clip_low),
    }
    if cfg.dual_clip is not None:
        bounded_BT = torch.minimum(surrogate_BT, -advantages_BT * cfg.dual_clip)
        surrogate_BT = torch.where(negative_BT, bounded_BT, surrogate_BT)
        per_token["policy/dual_clip_fraction"] = negative_BT & (ratio_BT > cfg.dual_clip)
    if cfg.tis_cap is not None:
        behaviour_BT = _clean(inputs.behaviour_logprobs_BT, mask_BT).detach()
        weight_BT = (old_BT - behaviour_BT).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        per_token["policy/tis_truncated_fraction"] = weight_BT > cfg.tis_cap
        weight_BT = weight_BT.clamp(max=cfg.tis_cap)
        per_token["policy/tis_weight_mean"] = weight_BT
        surrogate_BT = surrogate_BT * weight_BT
    per_token["policy/surrogate_loss"] = loss_BT = surrogate_BT

    if inputs.reference_logprobs_BT is not None:
        reference_BT = _clean(inputs.reference_logprobs_BT, mask_BT).detach()
        gap_BT = (reference_BT - logprobs_BT).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        per_token["policy/reference_kl"] = kl_BT = gap_BT.exp() - 1 - gap_BT
        if cfg.kl_coef > 0:
            loss_BT = loss_BT + cfg.kl_coef * kl_BT
    if inputs.entropy_BT is not None:
        per_token["policy/entropy"] = entropy_BT = _clean(inputs.entropy_BT, mask_BT)
        # At 0 the term stays out: 0 * entropy would still run the backward pass through the whole vocabulary.
        if cfg.entropy_coef > 0:
            loss_BT = loss_BT - cfg.entropy_coef * entropy_BT
    per_token["policy/loss"] = loss_BT

    token_sums = {name: _masked(value.detach(), mask_BT).sum(dtype=torch.float64) for name, value in per_token.items()}
    token_sums[TOKENS] = mask_BT.sum(dtype=torch.float64)
    return LossOutputs(loss_sum=_masked(loss_BT, mask_BT).sum(), token_sums=token_sums)


def finish_token_sums(sums: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Token means, by metric name, of `token_sums` already added over micro-batches and ranks; the count stays a count.

    Without tokens there is nothing to average and only the count, 0, is returned.
    """
    tokens = float(sums[TOKENS])
    means = {name: float(total) / tokens for name, total in sums.items() if name != TOKENS} if tokens else {}
    return {TOKENS: tokens, **means}


def _masked(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return torch.where(mask_BT, value_BT, torch.zeros_like(value_BT))


def _clean(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Zero what is masked out BEFORE any arithmetic: multiplying by the mask afterwards leaves 0 * inf = NaN behind,
    and a `where` at the end alone still lets the NaN into the gradients of what came before it."""
    return _masked(value_BT, mask_BT).to(torch.promote_types(value_BT.dtype, torch.float32))


def _check(inputs: LossInputs, cfg: AlgorithmConfig) -> None:
    shape = inputs.mask_BT.shape
    present = {f.name: getattr(inputs, f.name) for f in fields(inputs) if getattr(inputs, f.name) is not None}
    problems = [
        f"{k} has shape {tuple(v.shape)}, mask_BT {tuple(shape)}" for k, v in present.items() if v.shape != shape
    ]
    if inputs.mask_BT.dtype != torch.bool:
        problems.append(f"mask_BT is {inputs.mask_BT.dtype}; pass torch.bool")
    for needed, option, on in (
        ("behaviour_logprobs_BT", "tis_cap", cfg.tis_cap is not None),
        ("reference_logprobs_BT", "kl_coef", cfg.kl_coef > 0),
        ("entropy_BT", "entropy_coef", cfg.entropy_coef > 0),
    ):
        if on and needed not in present:
            problems.append(f"algorithm.{option} is on but {needed} is missing; pass it or turn {option} off")
    if problems:
        raise ValueError("policy_loss: " + "; ".join(problems))
