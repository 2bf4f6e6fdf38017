"""`cluster`: the nodes of a run, and which of them do what."""

from __future__ import annotations

from pydantic import Field

from megatron_fapo.config.section import Section


class ClusterConfig(Section):
    train_nodes: int = Field(0, ge=0)
    """Nodes of the policy, the first of the allocation. 0: all nodes take all roles (a laptop, one node)."""
    rollout_nodes: int = Field(0, ge=0)
    """Nodes of the engines, the next ones. 0: engines are placed on the nodes of the policy."""
    genrm_nodes: int = Field(0, ge=0)
    """Nodes of the GenRM servers, the last ones. 0: servers are placed on the nodes of the engines."""
    gpus_per_node: int = Field(8, ge=1)
    """GPUs of each node."""
    start_timeout_s: float = Field(600.0, gt=0)
    """For all nodes to join the run; past it the missing ones are named and the run ends."""
    idle_restarts: int = Field(2, ge=0)
    """A job that was requeued so many times in a row without a new checkpoint is not requeued again."""

    @property
    def nodes(self) -> int:
        """Nodes of the allocation."""
        return max(self.train_nodes + self.rollout_nodes + self.genrm_nodes, 1)
