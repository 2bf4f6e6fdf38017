"""The order of a refit's steps, and what becomes of it when one fails: policy and engines here only take notes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from megatron_fapo.config.weight_sync import WeightSyncConfig
from megatron_fapo.processes import Process, ProcessDiedError
from megatron_fapo.training.refit import Refits
from megatron_fapo.weight_sync.protocol import RefitError
from megatron_fapo.weight_sync.share import Share
from tests.weight_sync.plain import columns_of, rows_of

SHAPES = {"a": (4, 4), "b": (2, 8)}


Sums = list[tuple[int, int, int, int]]


def sums_of(share: Share) -> Sums:
    """Of every copy that a policy rank gives, or a worker takes, the same."""
    parts = {hop.part for hop in share.plan.hops if hop.depth == 0 and hop.giver == share.me < 2}
    parts |= {hop.part for hop in share.plan.hops if hop.taker == share.me}
    return [(part, copy, 1, 2) for part in sorted(parts) for copy in range(len(share.plan.parts[part].copies))]


class Everybody:
    """Both sides: what was done, by whom, in which order; fails where it is told to."""

    def __init__(self, nodes: Sequence[str], fails_at: str = "") -> None:
        self.nodes, self.fails_at, self.log = nodes, fails_at, []
        self.shares: list[Share] = []

    def note(self, what: str) -> None:
        self.log.append(what)
        if what == self.fails_at:
            raise RefitError(f"cannot {what}")


class Policy(Everybody):
    async def source_indexes(self) -> list[str]:
        self.note("index")
        return [rows_of(SHAPES, 2, rank).to_json() for rank in range(2)]

    @property
    def places(self) -> list[tuple[str, str]]:
        return [(node[0], node[1:]) for node in self.nodes]

    async def take_shares(self, shares: Sequence[str]) -> list[int]:
        self.note("take")
        self.shares = [Share.from_json(text) for text in shares]
        return [2, 1][: len(shares)]

    async def open_group(self, rank: int) -> tuple[str, int]:
        self.note(f"open group at {rank}")
        return "here", 1

    async def join(self, ranks: Sequence[int], *_: Any) -> None:
        self.note(f"join {[*ranks]}")

    async def weights(self, what: str, ranks: Sequence[int], *args: Any) -> list[Any]:
        if ranks:
            self.note(what if what != "expose" else f"expose {args[0]} of {[*ranks]}")
        return [sums_of(self.shares[i]) if what == "sums" else {} for i in ranks]


class Engines(Everybody):
    def __init__(self, nodes: Sequence[str], fails_at: str = "") -> None:
        super().__init__(nodes, fails_at)
        self.told: dict[str, dict[int, list[int]]] = {}
        self.lost: ProcessDiedError | None = None
        self.alter: Callable[[Sums], Sums] = lambda sums: sums

    async def target_indexes(self) -> list[list[str]]:
        self.note("index")
        return [[columns_of(SHAPES, 2, worker).to_json() for worker in range(2)] for _ in self.nodes]

    @property
    def places(self) -> list[list[tuple[str, str]]]:
        return [[(node[0], f"{worker}" if node[1:] else "") for worker in range(2)] for node in self.nodes]

    async def take_shares(self, shares: Sequence[Sequence[str]]) -> None:
        assert [len(mine) for mine in shares] == [2] * len(self.nodes)
        self.note("take")
        self.shares = [Share.from_json(text) for mine in shares for text in mine]

    async def join(self, engines: Sequence[int], *_: Any) -> None:
        self.note(f"join {[*engines]}")

    async def refit_step(self, method: str, *_: Any) -> list[Any]:
        self.note(method)
        if method == "finish_refit":
            sums = [self.alter(sums_of(share)) for share in self.shares]
            return [[(0.125, sums[2 * i]), (0.125, sums[2 * i + 1])] for i in range(len(self.nodes))]
        return [{"begin_refit": 0.5, "reset_refit": 0.25}.get(method)] * len(self.nodes)

    async def refit_each(self, method: str, arguments: dict[int, Sequence[Any]]) -> list[Any]:
        if method == self.fails_at == "pull":
            await asyncio.sleep(0.05)
        self.note(f"{method} {[*arguments]}" if method == "exchange" else method)
        self.told[method] = {engine: [giver for giver, _ in args[0]] for engine, args in arguments.items()}
        if self.fails_at == f"hang in {method}":
            await asyncio.sleep(60)
        return [None] * len(arguments)

    async def abandon_refit(self) -> ProcessDiedError | None:
        self.note("abandon")
        return self.lost


def refits_of(policy: Policy, engines: Engines, **config: Any) -> Refits:
    return Refits(policy, engines, WeightSyncConfig(**config))  # type: ignore[arg-type]


def test_a_refit_within_a_node_and_the_next_without_a_plan() -> None:
    policy, engines = Policy(["x", "x"]), Engines(["x", "x"])
    refits = refits_of(policy, engines)
    metrics = asyncio.run(refits.refit(3))
    assert policy.log == ["index", "take", "open", "expose 0 of [0, 1]", "expose 1 of [0]", "sums", "conceal"]
    assert engines.log == [
        "index",
        "take",
        "begin_refit",
        "pull",
        "pull",
        "finish_refit",
        "reset_refit",
        "commit_refit",
    ]
    nbytes = 4 * (16 + 16) * 2  # of each of two engines, between its workers
    assert {name: metrics[f"weight_sync/{name}_bytes"] for name in ("local", "node", "network")} == {
        "local": 0, "node": nbytes, "network": 0,
    }  # fmt: skip
    assert metrics["weight_sync/bytes"] == nbytes
    seconds = {"pause_s": 0.5, "reset_s": 0.25, "load_s": 0.125}
    assert {name: metrics[f"weight_sync/{name}"] for name in seconds} == seconds
    assert {"plan_s", "expose_s", "transfer_s", "finish_s", "verify_s", "total_s"} <= {n[12:] for n in metrics}
    again = asyncio.run(refits.refit(4))
    assert "weight_sync/plan_s" not in again
    assert Counter(policy.log)["index"] == Counter(engines.log)["take"] == 1


def test_across_nodes_the_group_is_made_once_and_anew_after_a_failure() -> None:
    policy, engines = Policy(["x", "x"]), Engines(["y", "x"])
    refits = refits_of(policy, engines)
    asyncio.run(refits.refit(3))
    asyncio.run(refits.refit(4))
    assert Counter(policy.log)["open group at 0"] == Counter(policy.log)["join [0, 1]"] == 1
    assert Counter(engines.log)["join [0]"] == 1, "the engine beside the policy maps its memory"
    assert engines.told["pull"] == {1: [0]}, "of the second round, and no others are told of it"
    assert Counter(engines.log)["exchange [0]"] == Counter(policy.log)["exchange"] == 2
    engines.fails_at = "exchange [0]"
    with pytest.raises(RefitError, match="cannot exchange"):
        asyncio.run(refits.refit(5))
    assert "abandon" in engines.log
    assert policy.log[-1] == "conceal"
    engines.fails_at = ""
    asyncio.run(refits.refit(5))
    assert Counter(policy.log)["open group at 0"] == 2
    assert engines.log[-1] == "commit_refit"


@pytest.mark.parametrize(
    ("side", "step"),
    [
        ("engines", "begin_refit"), ("policy", "open"), ("policy", "expose 1 of [0]"), ("engines", "pull"),
        ("policy", "exchange"), ("engines", "exchange [0]"), ("engines", "finish_refit"), ("policy", "sums"),
        ("policy", "join [0, 1]"), ("engines", "join [0]"), ("engines", "reset_refit"), ("engines", "commit_refit"),
    ],
)  # fmt: skip
def test_whatever_fails_every_engine_gives_it_up_and_the_next_refit_goes_through(side: str, step: str) -> None:
    policy, engines = Policy(["x", "x"]), Engines(["y", "x"])
    refits = refits_of(policy, engines)
    failing = policy if side == "policy" else engines
    failing.fails_at = step
    with pytest.raises(RefitError, match="cannot "):
        asyncio.run(refits.refit(3))
    assert "abandon" in engines.log
    assert step == "commit_refit" or "commit_refit" not in engines.log
    failing.fails_at = ""
    asyncio.run(refits.refit(3))
    assert engines.log[-1] == "commit_refit"
    assert Counter(policy.log)["index"] == 1, "the plan is still good"


def test_nothing_is_served_that_is_not_proven() -> None:
    policy, engines = Policy(["x", "x"]), Engines(["x"])
    engines.alter = lambda sums: [*sums[:-1], (*sums[-1][:3], 9)]
    with pytest.raises(RefitError, match="arrived at worker 0 with other bytes"):
        asyncio.run(refits_of(policy, engines).refit(3))
    assert "commit_refit" not in engines.log


def test_a_process_that_is_gone_is_named_though_its_peers_were_heard_of_first() -> None:
    policy, engines = Policy(["x", "x"], "exchange"), Engines(["y"])
    engines.lost = ProcessDiedError(Process("rollout", 0), "its vLLM processes are gone", lost=True)
    with pytest.raises(ProcessDiedError, match="rollout-0"):
        asyncio.run(refits_of(policy, engines).refit(3))


def test_a_worker_that_checked_less_than_all_in_the_first_refit_is_not_believed() -> None:
    policy, engines = Policy(["x", "x"]), Engines(["x"])
    engines.alter = lambda sums: sums[:-1]
    with pytest.raises(RefitError, match="worker 0 checked 3 copies of 4"):
        asyncio.run(refits_of(policy, engines).refit(3))
    assert "reset_refit" not in engines.log


def test_a_plan_that_cannot_be_made_leaves_the_engines_alone() -> None:
    policy, engines = Policy(["x", "x"]), Engines(["x"])

    async def other_model() -> list[str]:
        return [rows_of({"a": (4, 4)}, 2, rank).to_json() for rank in range(2)]

    policy.source_indexes = other_model  # type: ignore[method-assign]
    with pytest.raises(RefitError, match="no source holds b"):
        asyncio.run(refits_of(policy, engines).refit(3))
    assert engines.log == ["index"]


def test_a_refit_has_a_deadline() -> None:
    policy, engines = Policy(["x", "x"]), Engines(["x"], "hang in pull")
    with pytest.raises(RefitError, match=r"version 9 took more than 0\.3 s"):
        asyncio.run(refits_of(policy, engines, timeout_s=0.3).refit(9))
    assert engines.log[-1] == "abandon"


def test_hops_within_a_node_are_messages_where_that_is_asked_for() -> None:
    policy, engines = Policy(["x", "x"]), Engines(["x"])
    asyncio.run(refits_of(policy, engines, node_link="message").refit(1))
    assert "exchange [0]" in engines.log


def test_on_shared_cards_workers_send_what_policy_ranks_expose() -> None:
    policy, engines = Policy(["x0", "x1"]), Engines(["x*", "y*"])
    asyncio.run(refits_of(policy, engines).refit(1))
    assert "exchange [0, 1]" in engines.log
    assert engines.told["exchange"] == {0: [0, 1], 1: []}
    assert "exchange" not in policy.log, "their workers send for them"
