"""The whole configuration of a run, and the rules that span sections."""

from __future__ import annotations

from pydantic import Field

from megatron_fapo.config.algorithm import AlgorithmConfig
from megatron_fapo.config.data import DataConfig
from megatron_fapo.config.genrm import GenRMConfig
from megatron_fapo.config.policy import PolicyConfig
from megatron_fapo.config.reward import RewardConfig
from megatron_fapo.config.rollout import RolloutConfig
from megatron_fapo.config.section import Section
from megatron_fapo.config.training import TrainingConfig
from megatron_fapo.config.weight_sync import WeightSyncConfig


class Config(Section):
    run_dir: str = "runs/run"
    """Everything a run writes goes here."""
    seed: int = Field(0, ge=0)
    """Seeds data order, sampling and initialisation."""
    device: str = Field("auto", pattern="^(auto|cpu|gpu)$")
    """`auto` takes GPUs if there are any. `gpu` without one is refused."""
    gpu_share: float = Field(1.0, gt=0, le=1)
    """GPU share that Ray gives each policy rank, engine rank and GenRM server rank; 0.3 puts one of each on one card."""
    data: DataConfig = DataConfig()
    policy: PolicyConfig = PolicyConfig()
    rollout: RolloutConfig = RolloutConfig()
    genrm: GenRMConfig = GenRMConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    training: TrainingConfig = TrainingConfig()
