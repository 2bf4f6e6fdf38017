"""Which node each process of a run is on. Pure: in go the configuration and the nodes, out comes a plan or a refusal.

Invariants, asserted by the tests: every rank, engine and server has exactly one node of its role; consecutive policy
ranks fill nodes in the order of the allocation, tensor groups whole; engines and servers are spread as evenly as the
nodes have room, colocated ones excepted, which are where their policy ranks or engines are; on GPUs no node holds more
than its cards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_fapo.config.cluster import ClusterConfig
from megatron_fapo.config.root import Config, asks_genrm, judges_take_turns
from megatron_fapo.errors import UserError
from megatron_fapo.processes import Node

ROLES = ("train", "rollout", "genrm")
INDEX = "fapo_node_"
"""Prefix of the Ray resource whose name ends in a node's place in the allocation."""


@dataclass(frozen=True)
class Placement:
    """The node of each policy rank, engine and GenRM server, in order."""

    policy: tuple[Node, ...] = ()
    engines: tuple[Node, ...] = ()
    servers: tuple[Node, ...] = ()


def nodes_of(ray_nodes: Iterable[Mapping[str, Any]]) -> list[Node]:
    """The living nodes of `ray.nodes()` by index; nodes that have none, of a cluster that others started, come last."""
    alive = sorted((each for each in ray_nodes if each["Alive"]), key=lambda each: str(each["NodeManagerAddress"]))
    indices = [
        [int(name.removeprefix(INDEX)) for name in each["Resources"] if name.startswith(INDEX)] for each in alive
    ]
    found = []
    for position, (index, each) in enumerate(sorted(zip(indices, alive, strict=True), key=lambda pair: not pair[0])):
        resources = each["Resources"]
        hardware = (float(resources.get("GPU", 0.0)), frozenset(ROLES) & frozenset(resources))
        where = (each["NodeID"], each["NodeManagerAddress"], index[0] if index else position)
        found.append(Node(*where, *hardware, each["NodeManagerHostname"]))
    return sorted(found, key=lambda node: node.index)


def missing_nodes(config: ClusterConfig, nodes: Sequence[Node]) -> dict[int, str]:
    """Index -> role of every node that the run asks for and that has not joined."""
    counts = zip(ROLES, (config.train_nodes, config.rollout_nodes, config.genrm_nodes), strict=True)
    wanted = [role for role, count in counts for _ in range(count)]
    there = {(node.index, role) for node in nodes for role in node.roles}
    if not wanted and not nodes:
        return {0: "all roles"}
    return {index: role for index, role in enumerate(wanted) if (index, role) not in there}


def place(config: Config, nodes: Sequence[Node], device: str, *, policy: bool, rollout: bool, genrm: bool) -> Placement:
    """Give every process a node.

    Args:
        nodes: by index, one at least. Without roles each takes all; a role that none has falls to the nodes of the
            role before it (policy, engines, servers).
        policy, rollout, genrm: which processes the verb starts; servers only if the configuration asks for any.

    Raises:
        UserError: the nodes cannot hold them; names every role that is short, or whose tensor groups do not fit nodes.
    """
    tensor = config.policy.parallel.tensor
    ranks = config.policy.parallel.world_size if policy else 0
    engines = config.rollout.replicas if rollout else 0
    servers = config.genrm.servers if genrm and asks_genrm(config) else 0
    train, generate, judge = _homes(nodes)
    room = _Room(nodes, config.gpu_share, counted=device == "gpu")
    problems: list[str] = []
    at = _share(train, ranks, tensor) if train and not room.counted else _fill(room, train, ranks, tensor, problems)
    gpus, server_gpus = config.rollout.tensor_parallel, config.genrm.tensor_parallel
    if policy and config.rollout.colocated:
        beside = _beside(at, engines, gpus, room.counted, "rollout.colocated: engine", problems)
    else:
        beside = _spread(room, generate, engines, gpus, "rollout.replicas", problems)
    if engines and judges_take_turns(config):
        cards = [node for node in beside for _ in range(gpus)]
        asked = _beside(cards, servers, server_gpus, room.counted, "genrm.colocated: server", problems)
    else:
        asked = _spread(room, judge, servers, server_gpus, "genrm.servers", problems)
    placement = Placement(at, beside, asked)
    if room.counted and config.gpu_share < 1 and ranks > 1:
        problems.append(
            f"gpu_share={config.gpu_share:g} with {ranks} policy ranks: NCCL refuses two ranks on one card; share "
            "cards with a policy of one rank, or set gpu_share=1"
        )
    if problems:
        wanted = config.cluster.nodes
        hint = (
            f"; `cluster` has {wanted} nodes, and this is one: submit the run as a job" if wanted > len(nodes) else ""
        )
        more = "or give the role more nodes in `cluster`"
        if ranks <= 1:
            more += ", or let processes share cards with gpu_share (0.33 puts three on one)"
        raise UserError(f"the nodes cannot hold the run:\n- {'\n- '.join(problems)}\nlower these, {more}{hint}")
    return placement


def _homes(nodes: Sequence[Node]) -> tuple[list[Node], list[Node], list[Node]]:
    """The nodes of each role."""
    if not any(node.roles for node in nodes):
        return list(nodes), list(nodes), list(nodes)
    train, rollout, genrm = ([node for node in nodes if role in node.roles] for role in ROLES)
    return train, rollout or train, genrm or rollout or train


class _Room:
    """Cards that are left: whole ones, and shares of cards that Ray packs together."""

    def __init__(self, nodes: Sequence[Node], share: float, *, counted: bool) -> None:
        self.counted, self.per_card = counted, math.floor(1 / share + 1e-9)
        self.free = {node.id: int(node.gpus) * self.per_card for node in nodes}
        """Shares by node; a process of several cards takes all shares of each."""

    def cost(self, gpus: int) -> int:
        return 1 if gpus == 1 else gpus * self.per_card

    def fits(self, node: Node, gpus: int) -> int:
        """How many processes of so many cards the node still holds."""
        free = self.free[node.id]
        return free if gpus == 1 else free // self.per_card // gpus

    def take(self, node: Node, gpus: int) -> None:
        self.free[node.id] -= self.cost(gpus)


def _fill(room: _Room, nodes: Sequence[Node], ranks: int, tensor: int, problems: list[str]) -> tuple[Node, ...]:
    places = [node for node in nodes for _ in range(room.fits(node, 1) // tensor * tensor)][:ranks]
    if len(places) < ranks:
        groups = f" in tensor groups of {tensor}, each on one node" if tensor > 1 else ""
        problems.append(f"policy.parallel: {ranks} ranks{groups}, and {_names(nodes)} for {len(places)}")
    for node in places:
        room.take(node, 1)
    return tuple(places)


def _share(nodes: Sequence[Node], ranks: int, tensor: int) -> tuple[Node, ...]:
    """Consecutive tensor groups in even shares, where nobody counts cards."""
    groups = ranks // tensor
    return tuple(nodes[rank // tensor * len(nodes) // groups] for rank in range(ranks))


def _beside(
    cards: Sequence[Node], count: int, gpus: int, counted: bool, what: str, problems: list[str]
) -> tuple[Node, ...]:
    """Who takes turns with others: each has the next `gpus` of the `cards`, which are given by their nodes."""
    groups = [cards[i * gpus : (i + 1) * gpus] for i in range(count)]
    torn = [i for i, group in enumerate(groups) if len({node.id for node in group}) > 1]
    if counted and torn:
        problems.append(f"{what} {torn[0]} would be on several nodes, as those whose GPUs it shares; lower its size")
    return tuple(group[0] for group in groups if group)


def _spread(
    room: _Room, nodes: Sequence[Node], count: int, gpus: int, field: str, problems: list[str]
) -> tuple[Node, ...]:
    """Each to the node that has the fewest of them so far, the first of equal ones."""
    given = {node.id: 0 for node in nodes}
    places: list[Node] = []
    while len(places) < count:
        open_ = [node for node in nodes if not room.counted or room.fits(node, gpus)]
        if not open_:
            cards = f" of {gpus} GPUs each" if gpus > 1 else ""
            problems.append(f"{field}: {count}{cards}, and {_names(nodes)} for {len(places)}")
            break
        node = min(open_, key=lambda each: (given[each.id], each.index))
        given[node.id] += 1
        room.take(node, gpus)
        places.append(node)
    return tuple(sorted(places, key=lambda each: each.index))


def _names(nodes: Sequence[Node]) -> str:
    which = ", ".join(f"{node.index} with {node.gpus:g} GPUs" for node in nodes)
    return f"{'node' if len(nodes) == 1 else 'nodes'} {which} {'has' if len(nodes) == 1 else 'have'} room"
