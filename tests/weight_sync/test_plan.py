"""Plans, executed hop by hop on tensors in which every element has a number of its own."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megatron_fapo.config.policy import ParallelConfig
from megatron_fapo.plan.shapes import BUILT_IN
from megatron_fapo.plan.targets import planned_target, target_problems
from megatron_fapo.policy.hf_config import Experts, ModelShape, layout_problems
from megatron_fapo.policy.source_index import planned_indexes
from megatron_fapo.weight_sync.coverage import PlanError
from megatron_fapo.weight_sync.plan import Copy, Endpoint, Plan, make_plan
from megatron_fapo.weight_sync.predict import LinkRates, all_pull_s, broadcast_s, predict
from megatron_fapo.weight_sync.regions import Index, Ints, LocalTensor, Region, View, volume

TINY = ModelShape(
    architecture="Qwen2ForCausalLM", layers=2, hidden=8, ffn=16, heads=4, kv_heads=2, head_dim=2, vocab=100,
    max_positions=64, rope_theta=1e4, rope_scaling=None, norm_eps=1e-6, tied=False, qkv_bias=True, qk_norm=False,
    dtype="float32",
)  # fmt: skip
QWEN_32B = BUILT_IN["Qwen2.5-32B"]
H100 = LinkRates(memory_gbs=3000.0, link_gbs=370.0, network_gbs=45.0)
AUTO: dict[str, Any] = {"node_messages": True, "bucket_bytes": 512 * 2**20}


def on_nodes(indexes: Sequence[Index], first: int = 0, per_node: int = 8) -> list[Endpoint]:
    """One process a GPU, nodes filled one after the other."""
    return [Endpoint(f"node{first + i // per_node}", f"gpu{i % per_node}", index) for i, index in enumerate(indexes)]


def engines(shape: ModelShape, tensor: int, replicas: int, dtype: str = "float32") -> list[Index]:
    return [planned_target(shape, tensor, rank, dtype) for rank in range(tensor)] * replicas


class Tensors:
    """The tensors of one process."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.values = {name: torch.full((volume(t.shape),), -1) for name, t in index.tensors.items()}
        self.writes = {name: torch.zeros_like(values) for name, values in self.values.items()}

    def read(self, view: View, shape: Ints) -> torch.Tensor:
        return self.values[view.tensor].as_strided(shape, view.stride, view.offset).clone()

    def write(self, view: View, data: torch.Tensor) -> None:
        for tensors, value in ((self.values, data), (self.writes, 1)):
            part = tensors[view.tensor].as_strided(data.shape, view.stride, view.offset)
            part.copy_(part + value if tensors is self.writes else value)


def box(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    return tensor[tuple(slice(s, s + n) for s, n in zip(region.start, region.shape, strict=True))]


def checkpoint(indexes: Sequence[Index]) -> dict[str, torch.Tensor]:
    """HF tensors in which no number occurs twice."""
    shapes: dict[str, Ints] = {}
    for region in (r for index in indexes for r in index.regions):
        end = tuple(s + n for s, n in zip(region.start, region.shape, strict=True))
        shapes[region.name] = tuple(map(max, end, shapes.get(region.name, end)))
    tensors, first = {}, 0
    for name, shape in sorted(shapes.items()):
        tensors[name] = torch.arange(first, first + volume(shape)).reshape(shape)
        first += volume(shape)
    return tensors


def execute(plan: Plan, sources: Sequence[Endpoint], targets: Sequence[Endpoint]) -> list[Tensors]:
    """What the targets hold when every hop has been done, those that pass on after those that give."""
    whole = checkpoint([source.index for source in sources])
    held = [Tensors(end.index) for end in (*sources, *targets)]
    for process in held[: len(sources)]:
        for region in process.index.regions:
            process.write(region.view, box(whole[region.name], region))
    packed: dict[tuple[int, int], list[torch.Tensor]] = {}
    for hop in sorted(plan.hops, key=lambda hop: hop.depth):
        copies = plan.parts[hop.part].copies
        if hop.depth:
            data = packed[hop.giver, hop.part]
        else:
            assert hop.giver < plan.sources <= hop.taker
            data = [held[hop.giver].read(copy.source, copy.shape) for copy in copies]
        packed[hop.taker, hop.part] = data
        for copy, values in zip(copies, data, strict=True):
            held[hop.taker].write(copy.target, values)
    for process in held[len(sources) :]:
        for fill in process.index.fills:
            process.write(fill.view, torch.full(fill.shape, int(fill.value)))
    return held[len(sources) :]


def check(plan: Plan, sources: Sequence[Endpoint], targets: Sequence[Endpoint]) -> None:
    """Every element is what the checkpoint has there, written once; no link carries more than it must."""
    whole = checkpoint([source.index for source in sources])
    for process in execute(plan, sources, targets):
        for name, writes in process.writes.items():
            assert torch.equal(writes, torch.ones_like(writes)), name
        for region in process.index.regions:
            assert torch.equal(process.read(region.view, region.shape), box(whole[region.name], region)), region
    assert plan.bytes_by_link() == plan.minimum
    ends = [*sources, *targets]
    depths = {(hop.taker, hop.part): hop.depth for hop in plan.hops}
    for hop in plan.hops:
        giver, taker = ends[hop.giver], ends[hop.taker]
        same_card = bool(giver.gpu) and giver.gpu == taker.gpu
        near = "local" if same_card and not hop.depth else "node"
        assert hop.link == ("network" if giver.node != taker.node else near)
        assert hop.depth == (depths[hop.giver, hop.part] + 1 if hop.giver >= len(sources) else 0)


@st.composite
def layouts(draw: Any) -> tuple[list[Endpoint], list[Endpoint]]:
    """A small model, its policy and engines, on nodes however they fall."""
    pick = lambda *choices: draw(st.sampled_from(choices))  # noqa: E731
    moe, tensor, pipeline = pick(False, False, True), pick(1, 2, 4), pick(1, 2)
    parallel = ParallelConfig(
        tensor=tensor, pipeline=pipeline, virtual_pipeline=pick(1, pipeline), data=pick(1, 2, 3),
        expert=pick(1, 2, 4) if moe else 1, expert_tensor=pick(1, 2) if moe else 1, sequence_parallel=tensor > 1,
    )  # fmt: skip
    shape = dataclasses.replace(
        TINY, layers=4, heads=8, kv_heads=pick(1, 2, 4), vocab=pick(64, 100, 130), tied=pick(False, True),
        qkv_bias=pick(False, True), qk_norm=pick(False, True), hidden=pick(4, 8),
        experts=Experts(count=4, per_token=2, ffn=8, normalised=True) if moe else None,
    )  # fmt: skip
    workers = pick(1, 2, 4, 8)
    assume(not layout_problems(shape, parallel) and not target_problems(shape, workers))
    sources = planned_indexes(shape, parallel, "float32")
    targets = engines(shape, workers, draw(st.integers(1, 6)))
    match pick("apart", "colocated", "mixed", "cpu"):
        case "apart":
            policy = on_nodes(sources, 0, pick(2, 4, 8))
            return policy, on_nodes(targets, len(sources), pick(2, 4, 8))
        case "colocated":
            per_node = pick(2, 4, 8)
            return on_nodes(sources, 0, per_node), on_nodes(targets, 0, per_node)
        case "mixed":
            nodes = draw(st.integers(1, 4))
            return [
                [Endpoint(f"node{i * 7 % nodes}", f"{role}{i}", index) for i, index in enumerate(indexes)]
                for role, indexes in (("policy", sources), ("engine", targets))
            ]  # type: ignore[return-value]
        case _:
            nodes = draw(st.integers(1, 3))
            place = lambda i: Endpoint(f"node{draw(st.integers(1, nodes))}", "", i)  # noqa: E731
            return [place(i) for i in sources], [place(i) for i in targets]


@given(layouts())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_every_element_arrives_once_and_no_link_carries_more_than_it_must(
    layout: tuple[list[Endpoint], list[Endpoint]],
) -> None:
    plan = make_plan(*layout)
    check(plan, *layout)
    assert Plan.from_json(plan.to_json()) == plan
    assert make_plan(*layout).to_json() == plan.to_json()
    processes = [plan.of(i) for i in range(plan.sources + plan.targets)]
    seen = Counter(hop for each in processes for hop in each.hops)
    assert seen == Counter(dict.fromkeys(plan.hops, 2))
    assert all(each.parts[hop.part] == plan.parts[hop.part] for each in processes for hop in each.hops)


def nics(plan: Plan, sources: Sequence[Endpoint], targets: Sequence[Endpoint]) -> tuple[dict[Any, int], dict[Any, int]]:
    """Network bytes (out, in) of every card."""
    ends = [*sources, *targets]
    out: dict[Any, int] = defaultdict(int)
    into: dict[Any, int] = defaultdict(int)
    for hop in (hop for hop in plan.hops if hop.link == "network"):
        for cards, end in ((out, ends[hop.giver]), (into, ends[hop.taker])):
            cards[end.node, end.gpu] += plan.parts[hop.part].nbytes
    return out, into


def big(data: int, replicas: int, *, far: bool = True) -> tuple[Plan, list[Endpoint], list[Endpoint]]:
    """32B: TP4 PP4 to TP4, 8 GPUs a node."""
    parallel = ParallelConfig(tensor=4, pipeline=4, data=data, sequence_parallel=True)
    sources = on_nodes(planned_indexes(QWEN_32B, parallel, "bfloat16"))
    targets = on_nodes(engines(QWEN_32B, 4, replicas, "bfloat16"), 2 * data if far else 0)
    return make_plan(sources, targets), sources, targets


@pytest.mark.parametrize("data", [1, 2, 4])
@pytest.mark.parametrize("replicas", [8, 16])
def test_no_card_carries_much_more_than_a_node_s_share(data: int, replicas: int) -> None:
    plan, sources, targets = big(data, replicas)
    assert plan.bytes_by_link() == plan.minimum
    out, into = nics(plan, sources, targets)
    share = sum(into.values()) / len(targets)
    assert max(into.values()) < 1.03 * share
    # The stage with the embedding has to send more than the others.
    assert max(out.values()) < 1.1 * share
    if replicas >= 4 * data:  # sources are the bottleneck: all of them are busy
        given = [out[source.node, source.gpu] for source in sources]
        assert max(given) < 1.1 * sum(given) / len(given)
    # Of 2 x data nodes that sources feed each has the next one, and so on; the last pass on within the node.
    assert max(hop.depth for hop in plan.hops) <= max(1, replicas // (4 * data))


def test_replicas_of_the_policy_give_alike() -> None:
    plan, sources, targets = big(4, 8)
    out, _ = nics(plan, sources, targets)
    kinds: dict[str, list[int]] = defaultdict(list)
    for source in sources:
        kinds[source.index.to_json()].append(out.get((source.node, source.gpu), 0))
    assert all(max(given) <= 1.02 * min(given) for given in kinds.values())


def test_a_plan_of_1024_ranks_is_quick() -> None:
    began = time.monotonic()
    plan, sources, targets = big(32, 128)
    prediction = predict(plan, sources, targets, H100, **AUTO)
    assert time.monotonic() - began < 10
    assert (plan.sources, plan.targets, plan.bytes_over_minimum) == (512, 512, 1.0)
    assert 0.18 < prediction.total_s < 0.25


def test_the_same_plan_whatever_the_hash_seed() -> None:
    code = """if True:
        import hashlib, sys
        from megatron_fapo.plan.shapes import BUILT_IN
        from megatron_fapo.weight_sync.plan import Endpoint, make_plan
        from megatron_fapo.plan.targets import planned_target
        shape = BUILT_IN["Qwen2.5-0.5B"]
        one, two = ([planned_target(shape, n, rank, "bfloat16") for rank in range(n)] for n in (1, 2))
        both = (("policy", two), ("engine", one))
        sources, targets = ([Endpoint(f"{role}{i}", "", x) for i, x in enumerate(xs * 2)] for role, xs in both)
        print(hashlib.sha256(make_plan(sources, targets).to_json().encode()).hexdigest())
        assert not {"torch", "vllm", "megatron", "ray"} & sys.modules.keys(), "planning needs none of them"
    """
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ | {"PYTHONHASHSEED": seed}, text=True
        )
        for seed in ("1", "2")
    ]
    first, second = (run.communicate()[0] for run in runs)
    assert first == second
    assert len(first) == 65


def test_a_layer_by_hand_from_two_tensor_ranks_to_one_worker() -> None:
    """Four heads and two KV heads of size 2. A tensor rank has one KV group: the rows of q (two heads), k and v after
    each other. The worker has all rows of q, then of k, then of v."""
    sources = on_nodes(planned_indexes(TINY, ParallelConfig(tensor=2), "float32"))
    targets = on_nodes(engines(TINY, 1, 1))
    plan = make_plan(sources, targets)
    tensor = "decoder.layers.0.self_attention.linear_qkv.weight"
    taken = [
        (hop.giver, copy.name.split(".")[-2], copy.shape, copy.source.offset // 8, copy.target.offset // 8)
        for hop in plan.hops
        for copy in plan.parts[hop.part].copies
        if copy.source.tensor == tensor
    ]
    assert sources[0].index.tensors[tensor] == LocalTensor((8, 8), "float32")
    assert targets[0].index.tensors["model.layers.0.self_attn.qkv_proj.weight"] == LocalTensor((16, 8), "float32")
    assert sorted(taken) == [  # giver, what, shape, first row at the giver, first row at the taker
        (0, "k_proj", (2, 8), 4, 8),
        (0, "q_proj", (4, 8), 0, 0),
        (0, "v_proj", (2, 8), 6, 12),
        (1, "k_proj", (2, 8), 4, 10),
        (1, "q_proj", (4, 8), 0, 4),
        (1, "v_proj", (2, 8), 6, 14),
    ]
    assert [(hop.giver, hop.taker, hop.link) for hop in plan.hops] == [(0, 2, "local"), (1, 2, "node")]


def test_two_stages_by_hand_to_two_workers() -> None:
    """Each worker takes its rows of layer 0 from the first stage, of layer 1 from the second."""
    sources = on_nodes(planned_indexes(TINY, ParallelConfig(pipeline=2), "float32"))
    plan = make_plan(sources, on_nodes(engines(TINY, 2, 1)))
    taken = {
        (hop.taker - 2, copy.name): (hop.giver, copy.shape, copy.source.offset, copy.target.offset)
        for hop in plan.hops
        for copy in plan.parts[hop.part].copies
    }
    for worker in (0, 1):
        for layer in (0, 1):
            up = taken[worker, f"model.layers.{layer}.mlp.up_proj.weight"]
            assert up == (layer, (8, 8), (16 + 8 * worker) * 8, 8 * 8)
            assert taken[worker, f"model.layers.{layer}.mlp.down_proj.weight"] == (layer, (8, 8), 8 * worker, 0)
        rows = 64 - 28 * worker  # of 100, padded to 128
        assert taken[worker, "lm_head.weight"] == (1, (rows, 8), 64 * 8 * worker, 0)


def test_a_cohort_shares_what_crosses_the_network() -> None:
    """Two replicas on one node: half of the bytes come to each, which passes them on."""
    sources = on_nodes(planned_indexes(TINY, ParallelConfig(), "float32"))
    targets = on_nodes(engines(TINY, 1, 2), 1)
    plan = make_plan(sources, targets)
    _, into = nics(plan, sources, targets)
    whole = sum(copy.nbytes for part in plan.parts for copy in part.copies)
    assert sorted(into.values()) == pytest.approx([whole / 2] * 2, rel=0.05)
    assert Counter((hop.link, hop.depth) for hop in plan.hops) == {("network", 0): 2, ("node", 1): 2}


def test_copies_that_continue_each_other_are_one() -> None:
    def index(*rows: int) -> Index:
        regions, first = [], 0
        for count in rows:
            regions.append(Region("w", (first, 0), (count, 4), View("w", first * 4, (4, 1))))
            first += count
        return Index({"w": LocalTensor((first, 4), "float32")}, tuple(regions))

    plan = make_plan(on_nodes([index(2, 3, 4)]), on_nodes([index(4, 5)]))
    assert plan.parts[0].copies == (Copy("w", (9, 4), View("w", 0, (4, 1)), View("w", 0, (4, 1)), 9 * 4 * 4),)

    swapped = index(4, 5)  # the first four rows lie after the others
    views = [
        dataclasses.replace(r, view=View("w", at * 4, (4, 1))) for r, at in zip(swapped.regions, (5, 0), strict=True)
    ]
    plan = make_plan(on_nodes([index(2, 3, 4)]), on_nodes([dataclasses.replace(swapped, regions=tuple(views))]))
    taken = [(copy.shape[0], copy.source.offset // 4, copy.target.offset // 4) for copy in plan.parts[0].copies]
    assert taken == [(4, 0, 5), (5, 4, 0)]


def refused(sources: Sequence[Index], targets: Sequence[Index]) -> tuple[str, ...]:
    with pytest.raises(PlanError) as caught:
        make_plan(on_nodes(sources), on_nodes(targets))
    return caught.value.problems


def edited(index: Index, name: str, **changes: Any) -> Index:
    """With the regions of one HF tensor changed; `drop` leaves them out."""
    drop = changes.pop("drop", False)
    regions = [r if r.name != name else dataclasses.replace(r, **changes) for r in index.regions]
    return dataclasses.replace(index, regions=tuple(r for r in regions if not (drop and r.name == name)))


GATE, NORM = "model.layers.1.mlp.gate_proj.weight", "model.norm.weight"


def test_what_does_not_fit_is_refused_by_name_and_all_at_once() -> None:
    first, second = planned_indexes(TINY, ParallelConfig(tensor=2), "float32")
    (engine,) = engines(TINY, 1, 1)

    assert refused([first, edited(second, GATE, drop=True)], [engine]) == (
        f"{GATE} has shape (8, 8) in sources, (16, 8) in targets",
    )
    hole = edited(second, GATE, start=(10, 0), shape=(6, 8))
    assert refused([first, hole], [engine]) == (
        f"no source holds {GATE}[8:10, 0:8], wanted by model.layers.1.mlp.gate_up_proj.weight (target kind 0)",
    )
    overlap = edited(second, GATE, start=(7, 0), shape=(9, 8))
    assert any("overlap partly" in p and f"{GATE}[7:16, 0:8]" in p for p in refused([first, overlap], [engine]))
    nobody = [edited(index, NORM, drop=True) for index in (first, second)]
    assert refused(nobody, [engine]) == (f"no source holds {NORM}, which targets want",)
    other = dataclasses.replace(engine, tensors={**engine.tensors, NORM: LocalTensor((8,), "bfloat16")})
    assert refused([first, second], [other]) == (
        f"{NORM}[0:8] is float32 in sources, bfloat16 in {NORM} (target kind 0)",
    )
    unwanted = edited(engine, NORM, drop=True)
    assert refused([first, second], [unwanted]) == (
        f"no target wants {NORM}, which sources hold",
        f"nothing fills {NORM} of shape (8,) from [0] to [7] (target kind 0)",
    )
    twice = dataclasses.replace(engine, regions=(*engine.regions, engine.regions[0]))
    assert refused([first, second], [twice]) == (
        "more than one region fills model.embed_tokens.weight of shape (128, 8) from [0, 0] to [99, 7] (target kind 0)",
    )
    assert any("leaves" in p for p in refused([edited(first, NORM, shape=(9,)), second], [engine]))
    worse = edited(edited(hole, NORM, drop=True), "lm_head.weight", drop=True)
    assert len(refused([edited(first, NORM, drop=True), worse], [engine, unwanted])) > 3


@pytest.mark.parametrize(("data", "far", "expected"), [(2, True, 0.182), (2, False, 0.136), (1, True, 0.182)])
def test_predictions_are_near_the_floors_of_disaggregated_and_colocated_nodes(
    data: int, far: bool, expected: float
) -> None:
    """65.5 GB over 8 NICs a node; megatron's order of ranks puts one stage on a node of the colocated four, so that
    three quarters of a node's 65.5 GB come from others."""
    plan, sources, targets = big(data, 8, far=far)
    prediction = predict(plan, sources, targets, H100, **AUTO)
    assert prediction.network_s == pytest.approx(expected, rel=0.07)
    assert prediction.limits == "network"
    assert prediction.total_s < 1.1 * expected


def test_predictions_of_a_colocated_policy_whose_replicas_are_two_stages_a_node() -> None:
    parallel = ParallelConfig(tensor=4, pipeline=4, sequence_parallel=True)
    sources = on_nodes(planned_indexes(QWEN_32B, parallel, "bfloat16") * 2)
    targets = on_nodes(engines(QWEN_32B, 4, 8, "bfloat16"))
    prediction = predict(make_plan(sources, targets), sources, targets, H100, **AUTO)
    assert prediction.network_s == pytest.approx(0.091, rel=0.1)


def test_predictions_of_one_node_and_of_what_is_avoided() -> None:
    parallel = ParallelConfig(tensor=4, sequence_parallel=True)
    sources = on_nodes(planned_indexes(QWEN_32B, parallel, "bfloat16"))
    targets = [dataclasses.replace(end, gpu=f"{end.gpu}+4") for end in on_nodes(engines(QWEN_32B, 4, 1, "bfloat16"))]
    prediction = predict(make_plan(sources, targets), sources, targets, H100, **AUTO)
    assert prediction.node_s == pytest.approx(0.044, rel=0.02)
    assert (prediction.limits, prediction.local_s, prediction.network_s, prediction.fill_s) == ("node", 0, 0, 0)
    size = 2 * QWEN_32B.parameters
    assert all_pull_s(size, 8, 32, H100) == pytest.approx(0.36, rel=0.02)
    assert broadcast_s(size, H100) == pytest.approx(1.46, rel=0.01)
