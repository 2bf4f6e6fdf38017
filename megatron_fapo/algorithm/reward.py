"""The rewards: of the policy (paper, equations 4, 5 and 8), of the critic that becomes its GenRM (equation 7), and the
overlong term that is added to both.

Invariants
- wrong < 0 for every penalty; right and sound is +1; right but flawed is 1 - flawed_penalty.
- The overlong term lies in [-penalty_factor, 0] and never grows with length.
"""

from __future__ import annotations

from megatron_fapo.config.reward import OverlongConfig


def fapo_reward(correct: bool, flawed: bool, flawed_penalty: float) -> float:
    """R_FAPO of one sample: +1 if right, -1 if wrong, minus lambda if right but flawed.

    `flawed_penalty` is lambda, from `RewardConfig.flawed_penalty_at`. `flawed` has no effect on a wrong answer:
    the GenRM is asked about right answers only.
    """
    if not correct:
        return -1.0
    return 1.0 - flawed_penalty if flawed else 1.0


def step_ratio_reward(correct: bool, first_wrong: int, paragraphs: int) -> float:
    """The paper's failed ablation: a right answer earns the share of its paragraphs before the first error (-1: none).

    It pays for many short steps and for hiding errors late, which is why it stalls.
    """
    if not correct:
        return -1.0
    return 1.0 if first_wrong == -1 else min(first_wrong, paragraphs) / paragraphs


def critic_reward(predicted: int | None, label: int, total_steps: int, process: bool = True) -> float:
    """R_outcome + R_process of one critique (equation 7): in [-1, 1], and above 0 exactly for the right class.

    Args:
        predicted: the index the critique ends on, -1 for no error; None when it has no readable index in range.
        label: -1, or the 0-based paragraph of the first error.
        total_steps: paragraphs of the solution, n.
        process: subtract |predicted - label| / n from a flaw that is found; False is the outcome-only ablation.
    """
    if predicted is None or (predicted == -1) != (label == -1):
        return -1.0
    return 1.0 - abs(predicted - label) / total_steps if process else 1.0


def overlong_penalty(response_tokens: int, max_response_tokens: int, cfg: OverlongConfig) -> float:
    """The overlong term of one sample: 0 until `buffer_tokens` before the limit, -penalty_factor at it, linear between.

    It is added to every scored sample, right or wrong. Raises ValueError for a length outside [0, max_response_tokens].
    """
    if not 0 <= response_tokens <= max_response_tokens:
        raise ValueError(
            f"a response of {response_tokens} tokens is outside [0, {max_response_tokens}]: "
            "pass the limit that the rollout was cut at (rollout.max_response_tokens)"
        )
    excess = response_tokens - (max_response_tokens - cfg.buffer_tokens)
    if not cfg.enabled or excess <= 0:
        return 0.0
    return -excess / cfg.buffer_tokens * cfg.penalty_factor
