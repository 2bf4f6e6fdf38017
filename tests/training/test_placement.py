"""Where processes go: every one has a node, nodes hold what they can, and what does not fit is refused at once."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_fapo.config.cluster import ClusterConfig
from megatron_fapo.config.genrm import GenRMConfig
from megatron_fapo.config.root import Config
from megatron_fapo.errors import UserError
from megatron_fapo.processes import Node
from megatron_fapo.training.placement import Placement, missing_nodes, nodes_of, place


def make_nodes(*roles: str, gpus: float = 8) -> list[Node]:
    return [Node(f"id{i}", f"10.0.0.{i}", i, gpus, frozenset(role.split())) for i, role in enumerate(roles)]


def make_config(
    ranks: tuple[int, int, int] = (1, 1, 1),
    engines: tuple[int, int] = (1, 1),
    servers: tuple[int, int] = (1, 1),
    **top: Any,
) -> Config:
    """`ranks`: tensor, pipeline, data. `engines` and `servers`: how many, of how many GPUs."""
    tensor, pipeline, data = ranks
    return Config.model_validate(
        {
            "policy": {"parallel": {"tensor": tensor, "pipeline": pipeline, "data": data}},
            "rollout": {"replicas": engines[0], "tensor_parallel": engines[1]},
            "genrm": {"servers": servers[0], "tensor_parallel": servers[1], "model_path": "genrm"},
            **top,
        }
    )


def placed(config: Config, nodes: list[Node], device: str = "gpu") -> Placement:
    return place(config, nodes, device, policy=True, rollout=True, genrm=True)


def indices(nodes: tuple[Node, ...]) -> list[int]:
    return [node.index for node in nodes]


def test_the_layouts_of_the_recipe_fill_their_nodes() -> None:
    """7B: 8 + 8 + 16 on 1 + 1 + 2 nodes. 32B: 16 + 8 of 4 GPUs + 16 on 2 + 4 + 2."""
    nodes = make_nodes("train", "rollout", "genrm", "genrm")
    plan = placed(make_config((4, 1, 2), (8, 1), (16, 1)), nodes)
    assert (indices(plan.policy), indices(plan.engines)) == ([0] * 8, [1] * 8)
    assert indices(plan.servers) == [2] * 8 + [3] * 8
    nodes = make_nodes("train", "train", "rollout", "rollout", "rollout", "rollout", "genrm", "genrm")
    plan = placed(make_config((8, 1, 2), (8, 4), (16, 1)), nodes)
    assert indices(plan.policy) == [0] * 8 + [1] * 8
    assert indices(plan.engines) == [2, 2, 3, 3, 4, 4, 5, 5]


def test_a_role_without_nodes_falls_to_the_role_before_it() -> None:
    config = make_config((1, 1, 2), (2, 1), (2, 1))
    assert (
        placed(config, make_nodes("train", "rollout")).servers == placed(config, make_nodes("train", "rollout")).engines
    )
    plan = placed(config, make_nodes("train", gpus=6))
    assert {*plan.policy, *plan.engines, *plan.servers} == set(make_nodes("train", gpus=6))
    (everything,) = make_nodes("", gpus=6)
    plan = placed(config, [everything])
    assert {*plan.policy, *plan.engines, *plan.servers} == {everything}


def test_only_what_a_verb_starts_takes_room() -> None:
    config, nodes = make_config((8, 1, 1), (1, 8), (8, 1)), make_nodes("")
    assert place(config, nodes, "gpu", policy=False, rollout=True, genrm=False) == Placement(engines=tuple(nodes))
    rule_only = config.model_copy(update={"genrm": config.genrm.model_copy(update={"enabled": False})})
    assert place(rule_only, nodes, "gpu", policy=True, rollout=False, genrm=True).servers == ()


def test_all_shortages_are_told_at_once() -> None:
    with pytest.raises(UserError) as refusal:
        placed(make_config((1, 1, 9), (3, 4), (2, 8)), make_nodes("train", "rollout", "genrm"))
    text = str(refusal.value)
    assert "policy.parallel: 9 ranks, and node 0 with 8 GPUs has room for 8" in text
    assert "rollout.replicas: 3 of 4 GPUs each, and node 1 with 8 GPUs has room for 2" in text
    assert "genrm.servers: 2 of 8 GPUs each, and node 2 with 8 GPUs has room for 1" in text
    assert "submit" not in text


def test_a_cluster_configuration_on_one_machine_is_pointed_to_the_job() -> None:
    config = make_config((4, 1, 4), cluster={"train_nodes": 2})
    with pytest.raises(UserError, match="`cluster` has 2 nodes, and this is one: submit the run as a job"):
        placed(config, make_nodes(""))


def test_a_tensor_group_is_not_torn() -> None:
    plan = placed(make_config((3, 1, 3)), make_nodes("train", "train", "rollout"))
    assert indices(plan.policy) == [0] * 6 + [1] * 3
    plan = placed(make_config((4, 1, 2)), make_nodes("train", "train", "rollout", gpus=6))
    assert indices(plan.policy) == [0] * 4 + [1] * 4
    with pytest.raises(UserError, match=r"8 ranks in tensor groups of 8, each on one node, and nodes .* for 0"):
        placed(make_config((8, 1, 1)), make_nodes("train", "train", "rollout", gpus=6))
    assert indices(placed(make_config((3, 1, 3)), make_nodes("train", "train"), "cpu").policy) == [0] * 6 + [1] * 3


def test_shares_of_a_card_and_whole_cards_are_not_given_twice() -> None:
    config = make_config((1, 1, 1), (1, 1), (1, 1), gpu_share=0.33)
    assert placed(config, make_nodes("", gpus=1)).servers == tuple(make_nodes("", gpus=1))
    with pytest.raises(UserError, match=r"genrm.servers: 2, and node 0 with 1 GPUs has room for 1"):
        placed(make_config((1, 1, 1), (1, 1), (2, 1), gpu_share=0.33), make_nodes("", gpus=1))
    with pytest.raises(UserError, match=r"rollout.replicas: 1 of 2 GPUs each"):
        placed(make_config((1, 1, 1), (1, 2), (1, 1), gpu_share=0.33), make_nodes("", gpus=2))


def test_two_policy_ranks_never_share_a_card() -> None:
    with pytest.raises(UserError, match="2 policy ranks: NCCL refuses two") as refusal:
        placed(make_config((1, 1, 2), gpu_share=0.5), make_nodes(""))
    assert "let processes share" not in str(refusal.value)
    with pytest.raises(UserError, match="let processes share cards with gpu_share"):
        placed(make_config(), make_nodes("", gpus=1))
    placed(make_config((1, 1, 2), gpu_share=0.5), make_nodes(""), "cpu")
    place(make_config((1, 1, 2), gpu_share=0.5), make_nodes(""), "gpu", policy=False, rollout=True, genrm=True)


def colocated(ranks: tuple[int, int, int], engines: tuple[int, int], **top: Any) -> Config:
    config = make_config(ranks, engines, (0, 1), **top)
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"colocated": True})})


def test_colocated_engines_are_where_their_policy_ranks_are_and_take_no_room() -> None:
    plan = placed(colocated((4, 1, 4), (4, 4)), make_nodes("train", "train"))
    assert (indices(plan.policy), indices(plan.engines)) == ([0] * 8 + [1] * 8, [0, 0, 1, 1])
    assert indices(placed(colocated((1, 1, 2), (2, 1)), make_nodes("", gpus=2)).engines) == [0, 0]
    with pytest.raises(UserError, match="engine 1 would be on several nodes"):
        placed(colocated((2, 1, 4), (2, 4)), make_nodes("train", "train", gpus=6))
    # Without the policy, as for an evaluation, they need GPUs of their own.
    alone = place(colocated((1, 1, 2), (2, 1)), make_nodes("", gpus=2), "gpu", policy=False, rollout=True, genrm=True)
    assert indices(alone.engines) == [0, 0]


def test_colocated_servers_have_the_cards_of_the_engines_and_take_no_room() -> None:
    def config(engines: tuple[int, int], servers: tuple[int, int], **top: Any) -> Config:
        made = make_config((1, 1, 1), engines, servers, **top)
        return made.model_copy(update={"genrm": made.genrm.model_copy(update={"colocated": True})})

    nodes = make_nodes("train", "rollout", "rollout")
    plan = placed(config((4, 4), (16, 1)), nodes)
    assert (indices(plan.engines), indices(plan.servers)) == ([1, 1, 2, 2], [1] * 8 + [2] * 8)
    assert indices(placed(config((16, 1), (3, 4)), nodes).servers) == [1, 1, 2]
    with pytest.raises(UserError, match=r"genrm.colocated: server 1 would be on several nodes"):
        placed(config((12, 1), (3, 4)), make_nodes("train", "rollout", "rollout", gpus=6))
    both = colocated((1, 1, 2), (2, 1))
    servers = GenRMConfig(colocated=True, model_path="genrm", servers=2)
    all_three = placed(both.model_copy(update={"genrm": servers}), make_nodes("", gpus=2))
    assert [len(each) for each in (all_three.policy, all_three.engines, all_three.servers)] == [2, 2, 2]
    # Where no engine is started, as for a judge service, nobody has cards to share.
    alone = place(config((1, 1), (8, 1)), make_nodes(""), "gpu", policy=False, rollout=False, genrm=True)
    assert len(alone.servers) == 8


ROLE_SETS = st.sampled_from(["train", "rollout", "genrm", "train rollout genrm"])


@given(
    st.lists(ROLE_SETS, min_size=0, max_size=5).map(lambda more: ["train", *more]),
    st.integers(1, 8),
    st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 2), st.integers(1, 3)),
    st.tuples(st.integers(1, 9), st.sampled_from([1, 2])),
    st.tuples(st.integers(0, 9), st.sampled_from([1, 2])),
    st.sampled_from([1.0, 0.5, 0.33]),
    st.sampled_from(["cpu", "gpu"]),
)
def test_a_plan_is_whole_or_refused(
    roles: list[str],
    gpus: int,
    ranks: tuple[int, int, int],
    engines: tuple[int, int],
    servers: tuple[int, int],
    share: float,
    device: str,
) -> None:
    config = make_config(ranks, engines, servers, gpu_share=share)
    nodes = make_nodes(*roles, gpus=gpus)
    try:
        plan = placed(config, nodes, device)
    except UserError:
        assert device == "gpu", "nothing is counted on CPUs"
        assume(False)
    tensor, pipeline, data = ranks
    assert len(plan.policy) == tensor * pipeline * data
    assert (len(plan.engines), len(plan.servers)) == (engines[0], servers[0])
    assert all("train" in node.roles for node in plan.policy)
    assert all(a <= b for group in (plan.policy, plan.engines, plan.servers) for a, b in pairwise(indices(group)))
    groups = [plan.policy[i : i + tensor] for i in range(0, len(plan.policy), tensor)]
    assert all(len(set(group)) == 1 for group in groups)
    if device == "cpu":
        homes = {"train": plan.policy[::tensor], "rollout": plan.engines, "genrm": plan.servers}
        for role, group in homes.items():
            eligible = [node for node in nodes if role in node.roles] or list({*group})
            counts = [Counter(group)[node] for node in eligible]
            assert max(counts, default=0) - min(counts, default=0) <= 1
        return
    cards: Counter[Node] = Counter()
    shares: Counter[Node] = Counter(plan.policy)
    for group, size in ((plan.engines, engines[1]), (plan.servers, servers[1])):
        (shares if size == 1 else cards).update(
            {node: n * (1 if size == 1 else size) for node, n in Counter(group).items()}
        )
    per_card = int(1 / share)
    for node in nodes:
        assert cards[node] + -(-shares[node] // per_card) <= node.gpus


def ray_node(index: int | None, *roles: str, alive: bool = True, address: str = "10.0.0.1") -> dict[str, Any]:
    resources = {"CPU": 8.0, "GPU": 4.0, **dict.fromkeys(roles, 1000.0)}
    if index is not None:
        resources[f"fapo_node_{index}"] = 1.0
    return {
        "NodeID": f"id-{address}", "Alive": alive, "NodeManagerAddress": address, "NodeManagerHostname": "host",
        "Resources": resources,
    }  # fmt: skip


def test_rays_nodes_are_read_in_the_order_of_the_allocation() -> None:
    nodes = nodes_of(
        [
            ray_node(1, "rollout", "genrm", address="a"),
            ray_node(0, "train", address="b"),
            ray_node(2, "train", alive=False),
            ray_node(None, address="c"),
        ]
    )
    assert [(node.address, sorted(node.roles)) for node in nodes] == [
        ("b", ["train"]),
        ("a", ["genrm", "rollout"]),
        ("c", []),
    ]
    assert nodes[0] == Node("id-b", "b", 0, 4.0, frozenset({"train"}), "host")


def test_a_machine_alone_is_node_0() -> None:
    assert [node.index for node in nodes_of([ray_node(None)])] == [0]


def test_missing_nodes_are_named_with_their_role() -> None:
    config = ClusterConfig(train_nodes=2, rollout_nodes=1, genrm_nodes=1)
    there = make_nodes("train", "train", "rollout", "genrm")
    assert missing_nodes(config, there) == {}
    assert missing_nodes(config, there[1:3]) == {0: "train", 3: "genrm"}
    assert missing_nodes(config, make_nodes("train", "genrm", "rollout", "genrm")) == {1: "train"}
    assert missing_nodes(ClusterConfig(), make_nodes("")) == {}
    assert missing_nodes(ClusterConfig(), []) == {0: "all roles"}
