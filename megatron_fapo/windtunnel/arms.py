"""What the wind tunnel compares. An arm is a configuration; arms with the same seed see the same prompts in the same
order and start from the same weights, so that their difference is the arm's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ORACLE = "genrm.judge_function=megatron_fapo.data.oracle:judge"
STEPS, CRITIC_STEPS = 40, 30
SEEDS = (1, 2, 3)
EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass(frozen=True)
class Arm:
    name: str
    about: str
    overrides: tuple[str, ...]
    """`{genrm}` stands for the trained GenRM's path, `{steps}` for the steps of the run."""
    kind: Literal["policy", "critic"] = "policy"
    flawed_penalty: float | None = None
    """lambda, where it is one number for the whole run and the judge is the oracle: what theory can be held against."""
    reference: str = "baseline"
    """The arm that it is compared with."""


def _oracle(name: str, flawed_penalty: float, about: str) -> Arm:
    return Arm(name, about, (ORACLE, f"reward.flawed_penalty={flawed_penalty!r}"), flawed_penalty=flawed_penalty)


def _scheduled(name: str, first: float, last: float, about: str) -> Arm:
    return Arm(name, about, (ORACLE, f"reward.rho_shift_schedule=[[1, {first}], [{{steps}}, {last}]]"))


ARMS = (
    Arm("baseline", "answers alone are rewarded", ("genrm.enabled=false",)),
    _oracle("fapo_oracle", 1.0, "FAPO, lambda 1, judged by the oracle"),
    Arm("fapo_genrm", "FAPO, lambda 1, judged by the trained tiny GenRM", ("genrm.model_path={genrm}",)),
    _oracle("lambda_0.5", 0.5, "FAPO, lambda 1/2 (rho_shift 3)"),
    _oracle("lambda_1.33", 4 / 3, "FAPO, lambda 4/3 (rho_shift 1/2)"),
    _oracle("lambda_2", 2.0, "FAPO, lambda 2: a flawed positive is as bad as a wrong answer"),
    _scheduled("rho_falling", 3.0, 0.5, "rho_shift from 3 to 1/2: ever stricter"),
    _scheduled("rho_rising", 0.5, 3.0, "rho_shift from 1/2 to 3: ever milder"),
    Arm(
        "fapo_async",
        "fapo_oracle one step off: new weights go in between tokens, importance weights up to 2",
        (ORACLE, "training.asynchrony.max_staleness=1", "weight_sync.in_flight=true", "algorithm.tis_cap=2.0"),
        reference="fapo_oracle",
    ),
    Arm("step_ratio", "the failed ablation: share of paragraphs before the error", (ORACLE, "reward.shape=step_ratio")),
    Arm("critic_stepwise", "GenRM training, step-wise reward", (), "critic", reference="critic_outcome"),
    Arm("critic_outcome", "GenRM training, outcome-only reward", ("reward.critic_process=false",), "critic"),
)
QUICK = ("baseline", "fapo_oracle")


def choose(names: list[str] | None, quick: bool) -> tuple[Arm, ...]:
    """The arms to run, in the order of ARMS. Raises ValueError for a name that is not an arm's."""
    wanted = names or (QUICK if quick else [arm.name for arm in ARMS])
    unknown = set(wanted) - {arm.name for arm in ARMS}
    if unknown:
        known = ", ".join(arm.name for arm in ARMS)
        raise ValueError(f"no arm {', '.join(sorted(unknown))}: the arms are {known}")
    return tuple(arm for arm in ARMS if arm.name in wanted)
