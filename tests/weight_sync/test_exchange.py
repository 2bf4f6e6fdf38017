"""Plans executed by real processes: as messages, over chains of nodes and cohorts, and mapped; and when one fails."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from megatron_fapo.weight_sync.exchange import abort
from megatron_fapo.weight_sync.plan import Endpoint, Plan, make_plan
from megatron_fapo.weight_sync.protocol import RefitError, require_equal_sums
from megatron_fapo.weight_sync.share import Share, Terms, shares_of
from megatron_fapo.weight_sync.source import WeightSource
from megatron_fapo.weight_sync.target import WeightTarget
from tests.weight_sync.plain import PlainMemory, columns_of, contents, rows_of

SHAPES = {"a": (12, 8), "b": (6, 10), "c": (40, 4)}
CPU = torch.device("cpu")
SOURCES, TARGETS = 2, 4


def hf_tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


SOURCE_INDEXES = [rows_of(SHAPES, SOURCES, rank) for rank in range(SOURCES)]
TARGET_INDEXES = [columns_of(SHAPES, 2, number % 2, padding=3) for number in range(TARGETS)]


class Process:
    """One end: what the methods of the pipe's other end ask for."""

    def __init__(self, number: int) -> None:
        self.number = number
        if number < SOURCES:
            self.tensors: dict[str, torch.Tensor] = {}
            self.source = WeightSource(lambda: self.tensors, CPU)
        else:
            self.memory = PlainMemory(TARGET_INDEXES[number - SOURCES])
            self.target = WeightTarget(self.memory, CPU)

    @property
    def end(self) -> Any:
        return self.source if self.number < SOURCES else self.target

    def train(self, seed: int) -> None:
        if self.number < SOURCES:  # new storage each time: plans hold no addresses
            self.tensors = contents(SOURCE_INDEXES[self.number], hf_tensors(seed))

    def take(self, share: str) -> int | None:
        return self.end.take(Share.from_json(share))

    def begin(self, version: int) -> None:
        (self.source.open if self.number < SOURCES else self.target.begin)(version, 1.0)

    def fail_next(self, how: str) -> None:
        if how == "write":
            self.memory.failing = True
        else:
            self.end._group._carry = lambda *_: time.sleep(60) if how == "hang" else os._exit(1)

    def mend(self) -> None:
        self.memory.failing = False

    def held(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.memory.tensors.items()}

    def call(self, what: str, *args: Any) -> Any:
        return getattr(self.end, what)(*args)


def serve(number: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    process = Process(number)
    while True:
        what, args = pipe.recv()
        try:
            answer = getattr(process, what)(*args)
        except Exception as error:
            answer = error
        pipe.send(answer)


class Crew:
    """All processes. A question to several is asked at once."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "megatron_fapo.weight_sync.target"])
        pairs = [context.Pipe() for _ in range(SOURCES + TARGETS)]
        self.pipes = [mine for mine, _ in pairs]
        self.processes = [context.Process(target=serve, args=(i, pair[1]), daemon=True) for i, pair in enumerate(pairs)]
        for process, (_, theirs) in zip(self.processes, pairs, strict=True):
            process.start()
            theirs.close()

    def ask(self, what: str, *args: Any, of: list[int] | None = None) -> list[Any]:
        numbers = list(range(len(self.pipes))) if of is None else of
        for number in numbers:
            self.pipes[number].send((what, args))
        return self.answers(numbers)

    def answers(self, numbers: list[int]) -> list[Any]:
        found = []
        for number in numbers:
            assert self.pipes[number].poll(60), f"process {number} does not answer"
            try:
                found.append(self.pipes[number].recv())
            except EOFError:
                found.append(None)
        return found

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture
def crew() -> Iterator[Crew]:
    crew = Crew()
    yield crew
    crew.close()


class Run:
    """Refits of a crew by one plan."""

    def __init__(self, crew: Crew, nodes: list[str], *, node_messages: bool = False, bucket_bytes: int = 2000) -> None:
        """`nodes`: of every process its node, and after a slash the card that it would be on."""
        self.crew = crew
        places = [(place.partition("/")[0], place.partition("/")[2]) for place in nodes]
        ends = [Endpoint(*place, index) for place, index in zip(places, SOURCE_INDEXES + TARGET_INDEXES, strict=True)]
        self.plan: Plan = make_plan(ends[:SOURCES], ends[SOURCES:])
        keep = any(card for _, card in places)
        shares, self.members = shares_of(self.plan, Terms(node_messages, bucket_bytes, keep), places)
        self.chunk_bytes = shares[0].terms.chunk_bytes
        self.rounds = [crew.ask("take", share.to_json(), of=[i])[0] for i, share in enumerate(shares)]
        self.join()

    def join(self) -> None:
        if self.members:
            self.keeper = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            self.store = ("127.0.0.1", self.keeper.port)
            self.expect(self.crew.ask("call", "join", self.store, self.members, "127.0.0.1", 30.0, of=self.members))

    @staticmethod
    def expect(answers: list[Any]) -> list[Any]:
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def refit(self, seed: int) -> None:
        """New weights, then all of a refit; every element of every target is compared."""
        self.expect(self.crew.ask("train", seed))
        self.expect(self.crew.ask("begin", seed))
        targets = list(range(SOURCES, SOURCES + TARGETS))
        shown: Any = []
        for number in range(max(self.rounds[:SOURCES])):
            givers = [i for i in range(SOURCES) if number < self.rounds[i]]
            exposures = self.expect(self.crew.ask("call", "expose", number, of=givers))
            shown = list(zip(givers, exposures, strict=True))
            self.expect(self.crew.ask("call", "pull", shown, of=targets))
        for number in self.members:
            arguments = () if number < SOURCES else (shown,)
            self.crew.pipes[number].send(("call", ("exchange", *arguments)))
        self.expect(self.crew.answers(self.members))
        taken = self.expect(self.crew.ask("call", "finish", of=targets))
        given = self.expect(self.crew.ask("call", "sums", of=list(range(SOURCES))))
        assert min(map(len, taken)) > 0
        require_equal_sums(given, taken)
        for number, held in zip(targets, self.crew.ask("held", of=targets), strict=True):
            wanted = contents(TARGET_INDEXES[number - SOURCES], hf_tensors(seed))
            assert [name for name in wanted if not torch.equal(wanted[name], held[name])] == []


def test_every_way_to_go_brings_every_element(crew: Crew) -> None:
    """One crew, for it takes seconds to start: over the network in chains, within a node, and both."""
    chained = Run(crew, ["x", "x", "y", "y", "z", "z"], bucket_bytes=800)
    assert {hop.link for hop in chained.plan.hops} == {"network"}
    assert sum(part.nbytes for part in chained.plan.parts) > 5 * chained.chunk_bytes, "the test means many chunks"
    for seed in (1, 2):
        chained.refit(seed)

    cohort = Run(crew, ["x", "x", "y", "y", "y", "y"], bucket_bytes=800)
    assert any(hop.depth > 0 for hop in cohort.plan.hops), "the test means parts that are passed on"
    cohort.refit(3)

    mapped = Run(crew, ["x"] * 6, bucket_bytes=100)
    assert mapped.members == []
    assert mapped.rounds[0] == 3, "the test means a bucket for each tensor"
    mapped.refit(4)

    messages = Run(crew, ["x"] * 6, node_messages=True)
    assert len(messages.members) == 6
    assert messages.rounds[:2] == [0, 0]
    messages.refit(5)

    mixed = Run(crew, ["x", "y", "x", "x", "y", "y"])
    assert {hop.link for hop in mixed.plan.hops} == {"node", "network"}
    mixed.refit(6)

    # As on cards that policy and workers share, where no card may have two members of the group.
    turns = Run(crew, ["x/0", "x/1", "x/0", "x/1", "y/0", "y/1"], node_messages=True, bucket_bytes=10**6)
    assert turns.members == [2, 3, 4, 5]
    for seed in (7, 8):
        turns.refit(seed)


def test_when_one_fails_all_give_up_and_a_new_group_works(crew: Crew) -> None:
    run = Run(crew, ["x", "x", "y", "y", "z", "z"], bucket_bytes=800)
    run.refit(1)
    victim = run.members[-1]

    def broken(how: str, others: list[int]) -> list[Any]:
        crew.ask("train", 2)
        crew.ask("begin", 2)
        crew.pipes[victim].send(("fail_next", (how,)))
        crew.answers([victim])
        began = time.monotonic()
        for number in run.members:
            crew.pipes[number].send(("call", ("exchange", *([] if number < SOURCES else [[]]))))
        if how == "hang":
            time.sleep(1)
            abort(run.store)
        found = crew.answers(others)
        assert time.monotonic() - began < 15, "they waited for the time-out"
        # Who has nothing to wait for may be done; nobody is left waiting.
        assert all(answer is None or isinstance(answer, RefitError) for answer in found), found
        return [answer for answer in found if answer is not None]

    found = broken("write", run.members)
    assert any("nowhere to go" in str(error) for error in found)
    crew.ask("mend", of=[victim])
    run.join()
    run.refit(3)

    others = [number for number in run.members if number != victim]
    found = broken("hang", others)
    assert any("gave the refit up" in str(error) for error in found)


def test_when_one_dies_all_give_up(crew: Crew) -> None:
    run = Run(crew, ["x", "x", "y", "y", "z", "z"], bucket_bytes=800)
    run.refit(1)
    victim = run.members[0]
    crew.ask("begin", 2)
    crew.ask("fail_next", "die", of=[victim])
    others = [number for number in run.members if number != victim]
    began = time.monotonic()
    for number in run.members:
        crew.pipes[number].send(("call", ("exchange", *([] if number < SOURCES else [[]]))))
    found = crew.answers(others)
    assert all(answer is None or isinstance(answer, RefitError) for answer in found)
    assert any(found)
    assert time.monotonic() - began < 15, "they waited for the time-out"
