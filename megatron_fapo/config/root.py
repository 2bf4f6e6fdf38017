"""The whole configuration of a run, and the rules that span sections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from megatron_fapo.config.algorithm import AlgorithmConfig
from megatron_fapo.config.cluster import ClusterConfig
from megatron_fapo.config.data import DataConfig
from megatron_fapo.config.genrm import GenRMConfig
from megatron_fapo.config.labelling import LabellingConfig, SamplerConfig
from megatron_fapo.config.observe import ObserveConfig
from megatron_fapo.config.policy import PolicyConfig
from megatron_fapo.config.reward import RewardConfig
from megatron_fapo.config.rollout import RolloutConfig
from megatron_fapo.config.section import Section
from megatron_fapo.config.training import EvaluationConfig, TrainingConfig
from megatron_fapo.config.weight_sync import WeightSyncConfig


class Config(Section):
    run_dir: str = "runs/run"
    """Everything a run writes goes here."""
    seed: int = Field(0, ge=0)
    """Seeds data order, sampling and initialisation."""
    device: str = Field("auto", pattern="^(auto|cpu|gpu)$")
    """`auto` takes GPUs if there are any. `gpu` without one is refused."""
    gpu_share: float = Field(1.0, gt=0, le=1)
    """GPU share that Ray gives each policy, engine and GenRM server rank; 0.3 puts one of each on one card."""
    cluster: ClusterConfig = ClusterConfig()
    data: DataConfig = DataConfig()
    policy: PolicyConfig = PolicyConfig()
    rollout: RolloutConfig = RolloutConfig()
    genrm: GenRMConfig = GenRMConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    training: TrainingConfig = TrainingConfig()
    labelling: LabellingConfig = LabellingConfig()
    observe: ObserveConfig = ObserveConfig()


Purpose = Literal["train", "evaluate", "warmup", "label", "serve"]
"""What a configuration is read for."""


@dataclass(frozen=True)
class Rule:
    """A condition that spans fields. `reads` names every field that `broken` looks at, for messages and origins."""

    reads: tuple[str, ...]
    broken: Callable[[Config], bool]
    remedy: str
    purposes: tuple[Purpose, ...] | None = None
    """The uses that the condition matters to; None: a contradiction in any use, also in a file that is not complete."""


def asks_genrm(c: Config) -> bool:
    """Whether servers take part: they judge right answers, or are there for a compute_score of the user's, which may do
    without. A judge of the user's and the critic's task have none."""
    others = c.genrm.judge_function is not None or c.reward.task == "critic"
    return c.genrm.enabled and not others and (c.reward.compute_score is None or c.genrm.named)


def judges_take_turns(c: Config) -> bool:
    """Whether GenRM servers of ours share the engines' GPUs, and judge when the rollout has ended."""
    return asks_genrm(c) and c.genrm.colocated


def samplers(c: Config) -> dict[str, SamplerConfig]:
    """Who writes the solutions that are labelled, by name."""
    return c.labelling.samplers or {"policy": SamplerConfig(model_path=c.policy.model_path)}


def _genrm_homeless(c: Config) -> bool:
    return asks_genrm(c) and not c.genrm.named


def _evaluation_of_nothing(c: Config) -> bool:
    # The default period asks for nothing: without data.eval there is no evaluation.
    every = c.training.evaluation.every_steps
    return every not in (0, EvaluationConfig().every_steps) and not c.data.eval


RULES = (
    Rule(
        ("cluster.train_nodes", "cluster.rollout_nodes", "cluster.genrm_nodes"),
        lambda c: c.cluster.train_nodes == 0 and c.cluster.rollout_nodes + c.cluster.genrm_nodes > 0,
        "roles are given nodes in this order: set train_nodes too",
    ),
    Rule(
        ("training.prompts_per_step", "training.prompts_per_mini_batch"),
        lambda c: c.training.prompts_per_step % c.training.prompts_per_mini_batch != 0,
        "the mini-batch must divide the step",
    ),
    Rule(
        ("training.prompts_per_mini_batch", "rollout.samples_per_prompt", "policy.parallel.data"),
        lambda c: c.training.prompts_per_mini_batch * c.rollout.samples_per_prompt < c.policy.parallel.data,
        "a mini-batch has fewer samples than there are data-parallel replicas; raise the first two or lower the third",
    ),
    Rule(
        ("policy.parallel.sequence_parallel", "policy.parallel.tensor"),
        lambda c: c.policy.parallel.sequence_parallel and c.policy.parallel.tensor == 1,
        "sequence parallelism shards over tensor ranks: set tensor > 1 or sequence_parallel to false",
    ),
    Rule(
        ("policy.optimizer.schedule", "policy.optimizer.decay_steps"),
        lambda c: c.policy.optimizer.schedule != "constant" and c.policy.optimizer.decay_steps is None,
        "this schedule needs decay_steps, the optimizer updates until min_lr",
    ),
    Rule(
        ("policy.optimizer.decay_steps", "policy.optimizer.warmup_steps"),
        lambda c: 0 < (c.policy.optimizer.decay_steps or 0) <= c.policy.optimizer.warmup_steps,
        "decay must end after warm-up ends",
    ),
    Rule(
        ("policy.optimizer.min_lr", "policy.optimizer.lr"),
        lambda c: c.policy.optimizer.min_lr > c.policy.optimizer.lr,
        "min_lr must not be above the peak lr",
    ),
    Rule(
        ("policy.optimizer.offload_fraction", "policy.optimizer.main_dtype", "policy.optimizer.moments_dtype"),
        lambda c: c.policy.optimizer.offload_fraction > 0 and c.policy.optimizer.low_precision,
        "state on the host is float32: set both types to it, or offload_fraction to 0",
    ),
    Rule(
        ("policy.optimizer.offload_fraction", "policy.dtype"),
        lambda c: c.policy.optimizer.offload_fraction > 0 and c.policy.dtype == "float32",
        "mcore's hybrid optimizer does not take float32 parameters: set dtype to bfloat16, or offload_fraction to 0",
    ),
    Rule(
        ("policy.optimizer.main_dtype", "policy.dtype"),
        lambda c: c.policy.optimizer.main_dtype != "float32" and c.policy.dtype == "float32",
        "float32 parameters are their own main weights: set main_dtype to float32",
    ),
    Rule(
        ("policy.offload", "rollout.colocated"),
        lambda c: c.policy.offload != c.rollout.colocated,
        "policy and engines make room for each other, and neither alone: set both or neither",
    ),
    Rule(
        ("weight_sync.node_link", "policy.offload"),
        lambda c: c.weight_sync.node_link == "map" and c.policy.offload,
        "an offloaded policy can give back its cards' memory when one process maps it, not when several do: set "
        "node_link to auto",
    ),
    Rule(
        ("weight_sync.in_flight", "rollout.colocated"),
        lambda c: c.weight_sync.in_flight and (c.rollout.colocated or judges_take_turns(c)),
        "engines that take turns fall asleep, and samples in flight are lost: set in_flight to false",
    ),
    Rule(
        ("algorithm.old_logprobs", "algorithm.tis_cap"),
        lambda c: c.algorithm.old_logprobs == "engine" and c.algorithm.tis_cap is not None,
        "pi_old / pi_behaviour is 1 where the engine's log-probabilities stand for both, and corrects nothing: set "
        "old_logprobs to policy, or tis_cap to null",
    ),
    Rule(
        ("algorithm.old_logprobs", "training.asynchrony.max_staleness"),
        lambda c: c.algorithm.old_logprobs == "engine" and c.training.asynchrony.max_staleness > 0,
        "the engine's log-probabilities of older samples are another policy's: set old_logprobs to policy, or "
        "max_staleness to 0",
    ),
    Rule(
        ("training.asynchrony.max_staleness", "algorithm.tis_cap"),
        lambda c: c.training.asynchrony.max_staleness > 0 and c.algorithm.tis_cap is None,
        "samples of older versions need importance weights: set tis_cap, such as 2.0, or max_staleness to 0",
    ),
    Rule(
        ("training.asynchrony.max_staleness", "rollout.colocated", "policy.offload", "genrm.colocated"),
        lambda c: (
            c.training.asynchrony.max_staleness > 0
            and (c.rollout.colocated or c.policy.offload or judges_take_turns(c))
        ),
        "engines generate while the policy is updated, and cannot take turns: give policy, engines and judges GPUs of "
        "their own (all three false), or a gpu_share of each, or set max_staleness to 0",
        ("train",),
    ),
    Rule(
        ("rollout.colocated", "rollout.replicas", "rollout.tensor_parallel", "policy.parallel"),
        lambda c: c.rollout.colocated and c.rollout.replicas * c.rollout.tensor_parallel > c.policy.parallel.world_size,
        "colocated engines have the GPUs of the policy's ranks, one engine on each: lower replicas or tensor_parallel",
        ("train",),
    ),
    Rule(
        ("rollout.colocated", "cluster.rollout_nodes"),
        lambda c: c.rollout.colocated and c.cluster.rollout_nodes > 0,
        "colocated engines are on the policy's nodes: set rollout_nodes to 0",
    ),
    Rule(
        ("genrm.colocated", "genrm.servers", "genrm.urls", "genrm.rendezvous"),
        lambda c: judges_take_turns(c) and (c.genrm.servers == 0 or bool(c.genrm.urls or c.genrm.rendezvous)),
        "only servers of this run can sleep while it generates: set servers > 0 and leave urls and rendezvous out, or"
        " set colocated to false",
    ),
    Rule(
        ("genrm.colocated", "cluster.genrm_nodes"),
        lambda c: judges_take_turns(c) and c.cluster.genrm_nodes > 0,
        "colocated servers are on the engines' nodes: set genrm_nodes to 0",
    ),
    Rule(
        (
            *("genrm.colocated", "genrm.servers", "genrm.tensor_parallel"),
            *("rollout.replicas", "rollout.tensor_parallel"),
        ),
        lambda c: (
            judges_take_turns(c)
            and c.genrm.servers * c.genrm.tensor_parallel > c.rollout.replicas * c.rollout.tensor_parallel
        ),
        "colocated servers have the GPUs of the engines, one server on each: lower servers or their tensor_parallel",
        ("train", "evaluate"),
    ),
    Rule(
        ("genrm.colocated",),
        judges_take_turns,
        "here nobody takes turns with the servers: set it to false",
        ("label", "serve"),
    ),
    Rule(
        ("rollout.sampling.temperature",),
        lambda c: c.rollout.sampling.temperature == 0,
        "greedy rollouts give groups of equal samples and no log-probabilities to train on; set it above 0",
    ),
    Rule(
        ("reward.overlong.buffer_tokens", "rollout.max_response_tokens"),
        lambda c: c.reward.overlong.enabled and c.reward.overlong.buffer_tokens >= c.rollout.max_response_tokens,
        "the overlong buffer must be shorter than the response limit; lower it or set reward.overlong.enabled to false",
        ("train", "evaluate"),
    ),
    Rule(
        ("genrm.enabled", "genrm.urls", "genrm.rendezvous", "genrm.servers", "genrm.model_path"),
        _genrm_homeless,
        "name a GenRM: genrm.model_path for the servers of ours, or with servers = 0 genrm.urls of running ones or the"
        " genrm.rendezvous of a judge service; or set genrm.enabled to false for the rule-only baseline",
        ("train",),
    ),
    Rule(
        ("genrm.urls", "genrm.rendezvous", "genrm.servers", "genrm.model_path", "genrm.judge_function"),
        _genrm_homeless,
        "name the teacher: genrm.model_path with servers > 0, or with servers = 0 genrm.urls, genrm.rendezvous or"
        " genrm.judge_function",
        ("label",),
    ),
    Rule(
        (
            *("genrm.enabled", "genrm.judge_function", "genrm.servers", "genrm.model_path", "genrm.urls"),
            *("genrm.rendezvous", "reward.compute_score", "reward.task"),
        ),
        lambda c: (
            not asks_genrm(c)
            or c.reward.compute_score is not None
            or not (c.genrm.servers > 0 and c.genrm.model_path)
            or bool(c.genrm.urls or c.genrm.rendezvous)
        ),
        "a judge service starts genrm.servers > 0 servers of genrm.model_path and nothing else: leave the other fields"
        " at their defaults; the file to write is --rendezvous",
        ("serve",),
    ),
    Rule(
        ("genrm.enabled", "reward.compute_score", "reward.task"),
        lambda c: not c.genrm.enabled or c.reward.compute_score is not None or c.reward.task != "policy",
        "labels come from the rule and the teacher's verdicts: leave these three at their defaults",
        ("label",),
    ),
    Rule(
        ("genrm.prompt_form", "genrm.judge_function"),
        lambda c: asks_genrm(c) and c.genrm.prompt_form != "tagged",
        "a label counts tagged paragraphs: ask the teacher in the tagged form",
        ("label",),
    ),
    Rule(
        ("labelling.votes", "genrm.temperature"),
        lambda c: asks_genrm(c) and c.labelling.votes > 1 and c.genrm.temperature == 0,
        "greedy votes are copies of one another and always agree: raise the temperature, or take one vote",
        ("label",),
    ),
    Rule(
        ("genrm.votes", "genrm.temperature"),
        lambda c: asks_genrm(c) and (c.genrm.votes % 2 == 0 or (c.genrm.votes > 1 and c.genrm.temperature == 0)),
        "a majority needs an odd number of votes that differ: an even number can tie, greedy votes are copies",
    ),
    Rule(
        ("labelling.samplers",),
        lambda c: any((s.model_path is None) != bool(s.urls and s.model) for s in c.labelling.samplers.values()),
        "each sampler has either a model_path, or urls with model, the name that they serve",
    ),
    Rule(
        ("genrm.judge_eval", "genrm.enabled", "genrm.urls", "genrm.rendezvous", "genrm.servers", "genrm.model_path"),
        lambda c: c.genrm.judge_eval and _genrm_homeless(c),
        "name a GenRM to judge with, or set genrm.judge_eval to false",
        ("evaluate",),
    ),
    Rule(
        ("reward.rho_shift", "reward.flawed_penalty"),
        lambda c: c.reward.rho_shift is not None and c.reward.flawed_penalty != RewardConfig().flawed_penalty,
        "both set lambda; keep one",
    ),
    Rule(
        ("reward.rho_shift_schedule", "reward.rho_shift", "reward.flawed_penalty"),
        lambda c: (
            bool(c.reward.rho_shift_schedule)
            and (c.reward.rho_shift is not None or c.reward.flawed_penalty != RewardConfig().flawed_penalty)
        ),
        "each sets lambda; keep one",
    ),
    Rule(
        ("reward.rho_shift_schedule",),
        lambda c: (
            any(step < 0 or rho <= 0 for step, rho in c.reward.rho_shift_schedule)
            or len({step for step, _ in c.reward.rho_shift_schedule}) < len(c.reward.rho_shift_schedule)
        ),
        "steps must be distinct and not negative, and rho_shift above 0",
    ),
    Rule(
        ("reward.task", "reward.compute_score"),
        lambda c: c.reward.task == "critic" and c.reward.compute_score is not None,
        "the critic's reward is its own; unset compute_score or train a policy",
    ),
    Rule(
        ("training.checkpoint.best_max_tokens", "training.checkpoint.best_metric"),
        lambda c: c.training.checkpoint.best_max_tokens is not None and c.training.checkpoint.best_metric is None,
        "a token budget chooses among checkpoints by a metric; set best_metric",
    ),
    Rule(
        ("training.checkpoint.best_metric", "data.eval"),
        lambda c: (
            c.training.checkpoint.best_metric is not None
            and c.training.checkpoint.best_metric.split("/")[:2] not in [["eval", name] for name in c.data.eval]
        ),
        "name a metric eval/NAME/... of an evaluation set of data.eval",
        ("train",),
    ),
    Rule(
        ("observe.stall_abort_s", "observe.stall_warning_s"),
        lambda c: c.observe.stall_abort_s is not None and c.observe.stall_abort_s < c.observe.stall_warning_s,
        "a run that is ended for a stall has warned of it before: lower the warning or raise the abort",
    ),
    Rule(
        ("data.question_key", "data.answer_key"),
        lambda c: (c.data.question_key is None) != (c.data.answer_key is None),
        "plain rows need both keys; set both or neither",
    ),
    Rule(
        ("training.evaluation.samples", "data.eval"),
        lambda c: not c.training.evaluation.samples.keys() <= c.data.eval.keys(),
        "samples names sets of data.eval only",
        ("train", "evaluate"),
    ),
    Rule(
        ("training.evaluation.every_steps", "data.eval"),
        _evaluation_of_nothing,
        "evaluation needs datasets: set data.eval.NAME to a path, or every_steps to 0",
        ("train",),
    ),
)
