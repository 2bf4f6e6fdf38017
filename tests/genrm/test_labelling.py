"""Labelling: what counts as agreement, which rows come out, and that an interrupted run repeats and changes nothing."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_fapo.config import Config
from megatron_fapo.data.records import Prompt
from megatron_fapo.errors import UserError
from megatron_fapo.genrm.client import GenRMClient
from megatron_fapo.genrm.label import Journal, Labeller, sample_from_urls
from megatron_fapo.genrm.labelling import (
    MEASURED_FROM,
    Draw,
    Item,
    State,
    Vote,
    changes,
    draws_of,
    estimate,
    identity,
    make_rows,
    state,
    summary,
    to_do,
)
from megatron_fapo.genrm.rules import RuleResult, recipe_string_rule
from megatron_fapo.genrm.verdict import Reason, Unscored
from tests.faults.fake_server import Behaviour, FakeServer, says, status

CONFIG = Config.model_validate(
    {
        "policy": {"model_path": "models/policy"},
        "rollout": {"samples_per_prompt": 4, "sampling": {"temperature": 0.7}, "max_response_tokens": 64},
        "genrm": {"served_model": "genrm", "servers": 0, "deadline_s": 5, "request_timeout_s": 5, "max_tokens": 64},
    }
)
SOLUTION = "One.\n\nTwo.\n\nSo \\boxed{2}."


def prompts(count: int) -> list[Prompt]:
    return [
        Prompt(f"test/{i}", "test", ({"role": "user", "content": f"{i}: 1+1?"},), "2", f"What is 1+1? ({i})", (1,))
        for i in range(count)
    ]


def with_labelling(config: Config = CONFIG, **values: Any) -> Config:
    return Config.model_validate(config.model_dump() | {"labelling": config.labelling.model_dump() | values})


def judged(draw: Draw, *indices: int, text: str | None = None, failures: tuple[str, ...] = ()) -> Item:
    text = text or f"Way {draw.key.sample_index}.\n\n{SOLUTION}"
    return Item(draw.key, text, 20, True, tuple(Vote(index, 10) for index in indices), failures)


DRAWS = draws_of("policy", prompts(3), 4)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"correct": None}, State.UNVERIFIED),
        ({"correct": False}, State.WRONG),
        ({}, State.OPEN),
        ({"votes": (1, 1)}, State.OPEN),
        ({"votes": (1, 1, 1)}, State.AGREED),
        ({"votes": (-1, -1, -1)}, State.AGREED),
        ({"votes": (1, 2)}, State.DISAGREED),
        ({"votes": (1, 1, -1)}, State.DISAGREED),
        ({"votes": (1, 1, 1, 2)}, State.AGREED),  # of an earlier run that asked for more votes
        ({"votes": (1, 1), "failures": (Reason.GENRM_DEADLINE,)}, State.OPEN),  # a failure is no third vote
        ({"votes": (1,), "failures": (Reason.GENRM_CONTEXT.value,)}, State.DROPPED),
        ({"text": " \n\n "}, State.DROPPED),
        ({"votes": (3, 3, 3)}, State.DROPPED),  # a solution of three paragraphs has no fourth
    ],
)
def test_states(changed: dict[str, Any], expected: State) -> None:
    changed = changed | {"votes": tuple(Vote(index, 10) for index in changed.get("votes", ()))}
    item = replace(Item(DRAWS[0].key, SOLUTION, 20, True), **changed)
    assert state(item, 3) is expected


def test_rows_are_critic_rows_and_only_of_agreement() -> None:
    agreed, disagreed, failed, wrong = DRAWS[:4]
    items = {
        agreed.key: judged(agreed, 1, 1, 1),
        disagreed.key: judged(disagreed, 1, -1, failures=("genrm_deadline",)),  # before it was asked again
        failed.key: judged(failed, -1, -1, failures=("genrm_deadline",)),
        wrong.key: Item(wrong.key, SOLUTION, 20, False),
    }
    rows, dropped = make_rows(CONFIG, DRAWS, items)
    assert dropped == {"disagreed": 1, "genrm_deadline": 1}
    (row,) = rows
    content = row["prompt"][0]["content"]
    assert content.count("<paragraph_") == row["extra_info"]["total_steps"] == 4
    assert row["reward_model"] == {"ground_truth": 1, "style": "rule"}
    assert (row["data_source"], row["ability"]) == ("fapo_critic", "math_critic")
    assert "What is 1+1? (0)" in content
    provenance = row["extra_info"]["provenance"]
    assert provenance.pop("seed") > 0
    assert provenance == {
        "sampler": "policy",
        "model": "models/policy",
        "prompt_id": "test/0",
        "sample_index": 0,
        "temperature": 0.7,
        "teacher": "genrm",
        "votes": [1, 1, 1],
        "teacher_tokens": 30,
    }
    figures = summary(CONFIG, DRAWS, items)
    assert (figures["sampled"], figures["right"], figures["judged"], figures["agreed"]) == (4, 3, 2, 1)
    assert (figures["unfinished"], figures["agreement_rate"], figures["critique_tokens"]) == (1, 0.5, 70)


def test_balance_max_per_question_and_duplicates() -> None:
    draws = draws_of("policy", prompts(6), 8)
    labels = [-1 if draw.key.sample_index < 6 else 2 for draw in draws]
    items = {draw.key: judged(draw, label, label, label) for draw, label in zip(draws, labels, strict=True)}
    rows, dropped = make_rows(with_labelling(balance=True), draws, items)
    counted = Counter(row["reward_model"]["ground_truth"] for row in rows)
    assert counted == {-1: 12, 2: 12}
    assert dropped == {"balance": 24}
    assert [row["extra_info"]["index"] for row in rows] == list(range(24))
    limited, dropped = make_rows(with_labelling(max_per_question=2), draws, items)
    assert Counter(row["extra_info"]["question_index"] for row in limited) == dict.fromkeys(range(6), 2)
    assert dropped == {"max_per_question": 36}
    # Drawn, not the first ones: those would be all sound here.
    assert {row["extra_info"]["provenance"]["sample_index"] for row in limited} - {0, 1}
    shuffled = dict(random.Random(1).sample(list(items.items()), len(items)))
    assert make_rows(with_labelling(balance=True), draws, shuffled)[0] == rows
    # Other white space between paragraphs makes no other prompt.
    same = {d.key: judged(d, -1, -1, -1, text=SOLUTION + "\n" * d.key.sample_index) for d in draws}
    assert make_rows(CONFIG, draws, same)[1] == {"duplicate": 42}


def test_the_estimate_names_its_assumptions_until_it_has_measured() -> None:
    draws = draws_of("policy", prompts(100), 4)
    config = with_labelling(assumed={"response_tokens": 50, "right_share": 0.25, "critique_tokens": 40})
    cost = estimate(config, draws, {})
    assert (cost.to_sample, cost.to_judge, cost.solution_tokens) == (400, 100, 20_000)
    assert cost.critique_tokens == 100 * 3 * 40
    assert cost.judge_prompt_tokens > 100 * 3 * 50
    assert all("assumed" in figure.source for figure in cost.figures if figure.name != "votes")
    items = {d.key: judged(d, 1, 2) for d in draws[:MEASURED_FROM]}
    cost = estimate(config, draws, items)
    assert (cost.to_sample, cost.to_judge, cost.solution_tokens) == (368, 368, 368 * 20)
    assert cost.critique_tokens == 368 * 2 * 10
    assert all("measured" in figure.source for figure in cost.figures)
    by_function = config.model_copy(update={"genrm": config.genrm.model_copy(update={"judge_function": "a:b"})})
    assert estimate(by_function, draws, {}).teacher_hours == 0
    # An edited row is a new draw; what an old row's solution was is not reused.
    edited = draws_of("policy", [replace(prompts(1)[0], ground_truth="3")], 4)
    assert len(to_do(edited, items, 3)[0]) == 4


def test_changes_of_configuration() -> None:
    before = identity(CONFIG)
    assert changes(before, identity(with_labelling(votes=5, balance=True))) == []
    hotter = CONFIG.model_copy(update={"genrm": CONFIG.genrm.model_copy(update={"temperature": 1.0})})
    assert changes(before, identity(hotter)) == ["genrm.temperature: 0.6 in the journal, 1.0 now"]
    two = with_labelling(samplers={"a": {"model_path": "a"}})
    assert changes(before, identity(two)) == [
        "labelling.samplers.policy: 'models/policy' in the journal, 'not configured' now"
    ]
    more = with_labelling(samplers={"policy": {"model_path": "models/policy"}, "b": {"model_path": "b"}})
    assert changes(before, identity(more)) == []


class CountingRule:
    """The recipe's rule in this process, with a list of what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def verify(self, solution: str, ground_truth: str) -> RuleResult | Unscored:
        self.asked.append(solution)
        if "hang" in solution and self.asked.count(solution) == 1:
            return Unscored(Reason.VERIFIER_TIMEOUT, "slow")
        return recipe_string_rule(solution, ground_truth)


def text_of(draw: Draw) -> str:
    """A third of the solutions are wrong; all differ."""
    number = int(hashlib.sha256(repr(draw.key[:3]).encode()).hexdigest(), 16)
    return f"Way {number % 1000}.\n\nThus.\n\n\\boxed{{{3 if number % 3 == 0 else 2}}}"


def verdict_of(body: dict[str, Any]) -> int:
    """Depends on what is asked and on the seed alone: for half of the solutions the votes differ."""
    content = body["messages"][0]["content"]
    kind = int(hashlib.sha256(content.encode()).hexdigest(), 16)
    return body["seed"] % 3 if kind % 2 else kind % 3 - 1


class Interrupted(Exception):
    """Stands for whatever ends a run in the middle."""


class Bench:
    """Runs of one journal against one fake teacher."""

    def __init__(self, directory: Path, script: Callable[[dict[str, Any], int], Behaviour] | None = None) -> None:
        self.path = directory / "out.jsonl.journal.jsonl"
        self.rule = CountingRule()
        self.draws = draws_of("policy", prompts(8), 4)
        self.sampled: list[Any] = []
        self.bodies: list[dict[str, Any]] = []
        self.script = script or (lambda body, _number: says(f"Hm. \\boxed{{{verdict_of(body)}}}"))

    async def stream(self, missing: Sequence[Draw], stop_after: int | None, shuffle: int) -> AsyncIterator[Item]:
        for count, draw in enumerate(random.Random(shuffle).sample(missing, len(missing))):
            if count == stop_after:
                raise Interrupted
            self.sampled.append(draw.key)
            yield Item(draw.key, text_of(draw), 30)
            await asyncio.sleep(0.001)

    def run(self, stop_after: int | None = None, shuffle: int = 0, config: Config = CONFIG) -> Journal:
        async def main() -> Journal:
            async with FakeServer(self.script) as server:
                client = GenRMClient([server.url], config.genrm)
                await client.check()
                try:
                    with Journal(self.path, identity(config)) as journal:
                        missing, started = to_do(self.draws, journal.items, 3)
                        labeller = Labeller(journal, self.draws, self.rule, client, 3)
                        await labeller.run(started, self.stream(missing, stop_after, shuffle))
                        return journal
                finally:
                    self.bodies += server.bodies
                    await client.close()

        return asyncio.run(main())

    def rows(self) -> str:
        return json.dumps(make_rows(CONFIG, self.draws, Journal(self.path, identity(CONFIG)).items))


def test_interrupted_and_resumed_is_the_same_and_repeats_nothing(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole, parts = Bench(tmp_path / "whole"), Bench(tmp_path)
    items = whole.run().items
    states = Counter(state(item, 3) for item in items.values())
    assert min(states[s] for s in (State.AGREED, State.DISAGREED, State.WRONG)) >= 4
    assert sum(states.values()) == 32
    for draw in whole.draws:
        indices = [vote.index for vote in items[draw.key].votes]
        assert (state(items[draw.key], 3) is State.AGREED) == (len(indices) == 3 and len(set(indices)) == 1)
    seeds = Counter((body["messages"][0]["content"], body["seed"]) for body in whole.bodies)
    assert set(seeds.values()) == {1}, "votes are requests of their own"

    with pytest.raises(Interrupted):
        parts.run(stop_after=7, shuffle=1)
    with parts.path.open("ab") as journal:  # what a crash leaves
        journal.write(b'{"kind": "vote", "key": ["policy", "te')
    with pytest.raises(Interrupted):
        parts.run(stop_after=9, shuffle=2)
    parts.run(shuffle=3)
    assert parts.rows() == whole.rows()
    assert len(json.loads(whole.rows())[0]) == states[State.AGREED]
    assert len(parts.sampled) == len(set(parts.sampled)) == 32
    # A judgement that the interruption cut off is asked for again; one that was answered and recorded is not.
    lines = [json.loads(line) for line in parts.path.read_text().splitlines()]
    recorded = [line for line in lines if line["kind"] == "vote"]
    assert len(recorded) == sum(len(item.votes) for item in items.values())
    asked = len(whole.bodies), len(parts.rule.asked)
    whole.run()
    parts.run()
    assert (len(whole.bodies), len(parts.rule.asked)) == asked, "nothing is left to do"


def test_a_failed_vote_is_kept_as_a_reason_and_asked_for_again(tmp_path: Path) -> None:
    failing = True

    def script(body: dict[str, Any], _number: int) -> Behaviour:
        if failing and verdict_of(body) == 0:
            return says("I cannot say.")
        if failing and verdict_of(body) == 1:
            return status(400, "This model's maximum context length is 5")
        return says(f"\\boxed{{{verdict_of(body)}}}")

    bench = Bench(tmp_path, script)
    first = bench.run().items
    open_items = [item for item in first.values() if state(item, 3) is State.OPEN]
    dropped = [item for item in first.values() if state(item, 3) is State.DROPPED]
    assert open_items
    assert dropped
    assert {item.failures for item in open_items} == {("genrm_unparsable",)}
    _, reasons = make_rows(CONFIG, bench.draws, first)
    assert reasons["genrm_unparsable"] == len(open_items)
    assert reasons["genrm_context"] == len(dropped)
    failing = False
    before = len(bench.bodies)
    second = bench.run().items
    assert all(state(second[item.key], 3) in (State.AGREED, State.DISAGREED) for item in open_items)
    assert all(state(second[item.key], 3) is State.DROPPED for item in dropped)
    assert len({(b["messages"][0]["content"], b["seed"]) for b in bench.bodies[before:]}) == len(bench.bodies) - before
    # The seed whose critique could not be read is not tried a second time.
    tried = {(b["messages"][0]["content"], b["seed"]) for b in bench.bodies[:before]}
    assert not tried & {(b["messages"][0]["content"], b["seed"]) for b in bench.bodies[before:]}


def test_a_rule_that_failed_is_asked_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    item = Item(bench.draws[0].key, f"hang\n\n{SOLUTION}", 5)

    async def stream(missing: Sequence[Draw], *_: object) -> AsyncIterator[Item]:
        for _draw in missing:
            yield item

    bench.draws, bench.stream = bench.draws[:1], stream  # type: ignore[method-assign]
    failed = bench.run().items[item.key]
    assert (failed.correct, failed.failures, failed.votes) == (None, ("verifier_timeout",), ())
    assert make_rows(CONFIG, bench.draws, {item.key: failed})[1] == {"verifier_timeout": 1}
    assert bench.run().items[item.key].correct is True


def test_a_journal_of_another_configuration_and_one_in_use_are_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.run(stop_after=None)
    content = bench.path.read_bytes()
    with pytest.raises(UserError, match=r"seed: 0 in the journal, 5 now"):
        Journal(bench.path, identity(CONFIG.model_copy(update={"seed": 5})))
    with Journal(bench.path, identity(CONFIG)):
        with pytest.raises(UserError, match="written by another run"):
            Journal(bench.path, identity(CONFIG)).__enter__()
    assert bench.path.read_bytes() == content


def test_solutions_of_urls(tmp_path: Path) -> None:
    del tmp_path
    config = with_labelling(samplers={"ext": {"urls": ["http://127.0.0.1:1/v1"], "model": "genrm"}})
    draws = draws_of("ext", prompts(3), 2)

    async def collect(urls: list[str]) -> dict[Any, Item]:
        sampler = config.labelling.samplers["ext"].model_copy(update={"urls": urls})
        return {item.key: item async for item in sample_from_urls("ext", sampler, draws, config)}

    async def main() -> None:
        def script(body: dict[str, Any], number: int) -> Behaviour:
            if "2: 1+1?" in body["messages"][0]["content"]:
                return status(400, "no such thing")
            return status(503) if number % 3 == 0 else says(f"{body['seed']} \\boxed{{2}}")

        async with FakeServer(script) as one, FakeServer(script) as two:
            items = await collect([one.url, two.url])
            assert {key.prompt_id for key in items} == {"test/0", "test/1"}, "what no server answers is left out"
            assert len({item.text for item in items.values()}) == 4, "each sample has a seed of its own"
            assert one.bodies[0]["temperature"] == 0.7
            assert one.bodies[0]["max_tokens"] == 64
            assert await collect([two.url, one.url]) == items, "the same solutions, whichever server answers"
            with pytest.raises(UserError, match=r"samplers\.ext: http://127\.0\.0\.1:1/v1 does not serve 'genrm'"):
                await collect(["http://127.0.0.1:1/v1"])

    asyncio.run(main())
