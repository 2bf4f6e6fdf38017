"""Decisions of labelling: what is to be done, when a solution is decided, which rows come out, what it will cost. Pure.

A solution is known by its ItemKey. All that is ever learnt of it comes as records, which the journal keeps; `apply` is
the only way from records to an Item, so that what a rerun reads back is what the first run knew. Invariants: a failure
is never a vote; rows depend on the items and the configuration alone, not on the order in which things finished.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple

from megatron_fapo.config.root import Config, samplers
from megatron_fapo.data.critic import critic_row
from megatron_fapo.data.paragraphs import split_paragraphs
from megatron_fapo.data.records import Prompt, SampleKey, Verdict
from megatron_fapo.genrm.prompts import CHARS_PER_TOKEN, judge_messages
from megatron_fapo.genrm.rules import RuleResult
from megatron_fapo.genrm.verdict import Reason, Unscored
from megatron_fapo.rollout.sampling import sample_seed

MEASURED_FROM = 32
"""Solutions (or votes) in the journal from which the estimate trusts their averages."""


class ItemKey(NamedTuple):
    sampler: str
    prompt_id: str
    sample_index: int
    content: str
    """Digest of the prompt: a row that was edited is another one."""


@dataclass(frozen=True)
class Draw:
    """One solution that is wanted."""

    key: ItemKey
    prompt: Prompt

    @property
    def sample_key(self) -> SampleKey:
        """Names the draw to an engine as the only sample of one epoch, so that single draws can be asked for."""
        return SampleKey(self.key.prompt_id, self.key.sample_index, 0)


@dataclass(frozen=True)
class Vote:
    index: int
    tokens: int
    """Of the critique."""


@dataclass(frozen=True)
class Item:
    """What is known of one solution."""

    key: ItemKey
    text: str
    tokens: int
    correct: bool | None = None
    """None: the rule has not said."""
    votes: tuple[Vote, ...] = ()
    failures: tuple[str, ...] = ()
    """Reasons of the requests that gave no vote, or of the rule."""


class State(StrEnum):
    UNVERIFIED = "unverified"
    WRONG = "wrong"
    DROPPED = "dropped"
    """Right, and no teacher can label it: see `drop_reason`."""
    OPEN = "open"
    """Right, and votes are missing."""
    DISAGREED = "disagreed"
    AGREED = "agreed"


def draws_of(sampler: str, prompts: Iterable[Prompt], samples_per_prompt: int) -> list[Draw]:
    """Every solution that is wanted of one sampler."""
    draws = []
    for prompt in prompts:
        content = hashlib.sha256(json.dumps([prompt.messages, prompt.question, prompt.ground_truth]).encode())
        for index in range(samples_per_prompt):
            draws.append(Draw(ItemKey(sampler, prompt.prompt_id, index, content.hexdigest()[:16]), prompt))
    return draws


def record_of(key: ItemKey, outcome: Item | RuleResult | Verdict | Unscored) -> dict[str, Any]:
    """What the journal keeps of a new solution, of what the rule says, or of one request to the teacher."""
    body: dict[str, Any]
    match outcome:
        case Item():
            body = {"kind": "solution", "text": outcome.text, "tokens": outcome.tokens}
        case RuleResult():
            body = {"kind": "rule", "correct": outcome.correct}
        case Verdict():
            tokens = outcome.completion_tokens
            body = {"kind": "vote", "index": outcome.index, "tokens": tokens, "critique": outcome.critique}
        case Unscored():
            body = {"kind": "failure", "reason": outcome.reason.value, "detail": outcome.detail}
    return {"key": list(key)} | body


def apply(items: dict[ItemKey, Item], record: Mapping[str, Any]) -> Item:
    """Add what a record says to `items`; returns its item."""
    key = ItemKey(*record["key"])
    match record["kind"]:
        case "solution":
            items[key] = Item(key, record["text"], record["tokens"])
        case "rule":
            items[key] = replace(items[key], correct=record["correct"])
        case "vote":
            items[key] = replace(items[key], votes=(*items[key].votes, Vote(record["index"], record["tokens"])))
        case "failure":
            items[key] = replace(items[key], failures=(*items[key].failures, record["reason"]))
    return items[key]


def state(item: Item, votes: int) -> State:
    """Where an item stands when `votes` equal votes are asked for. The first vote that differs decides."""
    if item.correct is None:
        return State.UNVERIFIED
    if not item.correct:
        return State.WRONG
    if drop_reason(item) is not None:
        return State.DROPPED
    indices = [vote.index for vote in item.votes[:votes]]
    if len(set(indices)) > 1:
        return State.DISAGREED
    return State.AGREED if len(indices) == votes else State.OPEN


def drop_reason(item: Item) -> str | None:
    """Why a solution can never be labelled, or None."""
    paragraphs = len(split_paragraphs(item.text))
    if paragraphs == 0:
        return "no_paragraphs"
    if any(vote.index >= paragraphs for vote in item.votes):
        return "index_out_of_range"  # a judge function's; what a server says has been checked
    return Reason.GENRM_CONTEXT.value if Reason.GENRM_CONTEXT in item.failures else None


def to_do(draws: Iterable[Draw], items: Mapping[ItemKey, Item], votes: int) -> tuple[list[Draw], list[Item]]:
    """The draws that have no solution yet, and the items whose rule or votes are not finished."""
    missing, started = [], []
    for draw in draws:
        item = items.get(draw.key)
        if item is None:
            missing.append(draw)
        elif state(item, votes) in (State.UNVERIFIED, State.OPEN):
            started.append(item)
    return missing, started


def identity(config: Config) -> dict[str, Any]:
    """What every item of a journal has in common. How many samples and votes there are, and which rows are kept, may
    change between runs: what is there stays valid."""
    sampling, genrm = config.rollout.sampling, config.genrm
    values = {f"rollout.sampling.{name}": value for name, value in sampling.model_dump().items()}
    values |= {"seed": config.seed, "rollout.max_response_tokens": config.rollout.max_response_tokens}
    values |= {"reward.verifier": config.reward.verifier, "teacher": teacher(config)}
    values |= {f"genrm.{name}": getattr(genrm, name) for name in ("temperature", "top_p", "max_tokens")}
    named = samplers(config).items()
    return values | {f"labelling.samplers.{name}": sampler.model_path or sampler.model for name, sampler in named}


def teacher(config: Config) -> str:
    """Who judges, as provenance names it."""
    return config.genrm.judge_function or config.genrm.model_path or config.genrm.served_model


def changes(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How a configuration contradicts a journal's; a further sampler does not."""
    absent = "not configured"
    return [
        f"{name}: {value!r} in the journal, {now.get(name, absent)!r} now"
        for name, value in recorded.items()
        if now.get(name, absent) != value
    ]


def make_rows(
    config: Config, draws: Sequence[Draw], items: Mapping[ItemKey, Item]
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows in FAPO-Critic's schema, in the order of `draws`, and how many right solutions gave none, by reason.

    Which rows fall to max_per_question and balance is drawn by `seed`, not by position: the first draws of a prompt are
    no better than others.
    """
    votes = config.labelling.votes
    dropped: Counter[str] = Counter()
    agreed: list[tuple[Draw, Item]] = []
    seen: set[str] = set()
    for draw in draws:
        item = items.get(draw.key)
        now = State.WRONG if item is None else state(item, votes)
        if item is None or now is State.WRONG:
            continue
        if now is not State.AGREED:
            unfinished = now in (State.OPEN, State.UNVERIFIED) and bool(item.failures)
            dropped[drop_reason(item) or (item.failures[-1] if unfinished else now.value)] += 1
        elif (asked := _judge_prompt(draw, item)[0]["content"]) in seen:
            dropped["duplicate"] += 1  # a critic's dataset refuses a prompt that comes twice
        else:
            seen.add(asked)
            agreed.append((draw, item))

    kept = _drawn(config, agreed, dropped)
    questions = {question: number for number, question in enumerate(dict.fromkeys(d.prompt.question for d in draws))}
    rows: list[dict[str, Any]] = []
    for draw, item in agreed:
        if draw.key in kept:
            rows.append(_row(config, draw, item, questions[draw.prompt.question], len(rows)))
    return rows, +dropped


def _drawn(config: Config, agreed: Sequence[tuple[Draw, Item]], dropped: Counter[str]) -> set[ItemKey]:
    """What max_per_question and balance leave of `agreed`."""
    limits, per_question = config.labelling, Counter[str]()
    classes: tuple[list[ItemKey], list[ItemKey]] = ([], [])
    for draw, item in sorted(agreed, key=lambda pair: _seed(config, pair[0], pair[0].key.sampler)):
        per_question[draw.prompt.question] += 1
        if limits.max_per_question is None or per_question[draw.prompt.question] <= limits.max_per_question:
            classes[item.votes[0].index >= 0].append(draw.key)
        else:
            dropped["max_per_question"] += 1
    most = min(map(len, classes)) if limits.balance else len(agreed)
    dropped["balance"] += sum(len(keys[most:]) for keys in classes)
    return {key for keys in classes for key in keys[:most]}


def _judge_prompt(draw: Draw, item: Item) -> list[dict[str, str]]:
    return judge_messages(draw.prompt.question, draw.prompt.ground_truth, item.text, "tagged")


def _seed(config: Config, draw: Draw, more: str = "") -> int:
    key = draw.sample_key
    return sample_seed(config.seed, key._replace(prompt_id=more + key.prompt_id))


def _row(config: Config, draw: Draw, item: Item, question_index: int, index: int) -> dict[str, Any]:
    votes, sampler = item.votes[: config.labelling.votes], samplers(config)[draw.key.sampler]
    provenance = {
        "sampler": draw.key.sampler,
        "model": sampler.model_path or sampler.model,
        "prompt_id": draw.key.prompt_id,
        "sample_index": draw.key.sample_index,
        "temperature": config.rollout.sampling.temperature,
        "seed": _seed(config, draw),
        "teacher": teacher(config),
        "votes": [vote.index for vote in votes],
        "teacher_tokens": sum(vote.tokens for vote in votes),
    }
    return critic_row(
        "fapo_critic",
        _judge_prompt(draw, item),
        votes[0].index,
        len(split_paragraphs(item.text)),
        question_index=question_index,
        split="train",
        index=index,
        provenance=provenance,
    )


def summary(config: Config, draws: Sequence[Draw], items: Mapping[ItemKey, Item]) -> dict[str, float]:
    """Counts of the whole journal, earlier runs included, as far as `draws` go."""
    known = [items[draw.key] for draw in draws if draw.key in items]
    states = Counter(state(item, config.labelling.votes) for item in known)
    decided = states[State.AGREED] + states[State.DISAGREED]
    return {
        "wanted": len(draws),
        "sampled": len(known),
        "right": sum(item.correct is True for item in known),
        "judged": decided,
        "agreed": states[State.AGREED],
        "agreement_rate": states[State.AGREED] / max(decided, 1),
        "unfinished": states[State.OPEN] + states[State.UNVERIFIED],
        "failed_requests": sum(len(item.failures) for item in known),
        "solution_tokens": sum(item.tokens for item in known),
        "critique_tokens": sum(vote.tokens for item in known for vote in item.votes),
    }


@dataclass(frozen=True)
class Figure:
    """A number that the estimate rests on."""

    name: str
    value: float
    source: str
    """`measured on N ...`, or the field that states the assumption."""


@dataclass(frozen=True)
class Estimate:
    to_sample: int
    to_judge: float
    """Solutions, the expected right ones of those to be sampled included."""
    figures: tuple[Figure, ...]
    solution_tokens: float
    judge_prompt_tokens: float
    critique_tokens: float
    sampler_hours: float
    """GPU hours at the assumed rates."""
    teacher_hours: float


def estimate(config: Config, draws: Sequence[Draw], items: Mapping[ItemKey, Item]) -> Estimate:
    """What is still to be done, in tokens and GPU hours; averages of the journal where it has enough."""
    assumed, votes = config.labelling.assumed, config.labelling.votes
    missing, started = to_do(draws, items, votes)
    known = [item for item in items.values() if item.correct is not None]
    cast = [vote.tokens for item in known for vote in item.votes]
    decided = [item for item in known if state(item, votes) in (State.AGREED, State.DISAGREED)]

    def figure(name: str, values: Sequence[float], of: str, assumption: float) -> Figure:
        if len(values) >= MEASURED_FROM:
            return Figure(name, sum(values) / len(values), f"measured on {len(values)} {of}")
        return Figure(name, assumption, f"assumed (labelling.assumed.{name})")

    response = figure(
        "response_tokens",
        [item.tokens for item in known],
        "solutions",
        min(assumed.response_tokens, config.rollout.max_response_tokens),
    )
    right = figure("right_share", [float(item.correct is True) for item in known], "solutions", assumed.right_share)
    critique = figure("critique_tokens", cast, "votes", min(assumed.critique_tokens, config.genrm.max_tokens))
    per_item = figure("votes", [len(item.votes) for item in decided], "judged solutions", votes)
    if len(decided) < MEASURED_FROM:
        per_item = replace(per_item, source="labelling.votes, all of them")
    asked = [draw.prompt for draw in draws[:: len(draws) // MEASURED_FROM + 1]]
    fixed = [judge_messages(p.question, p.ground_truth, "-", "tagged")[0]["content"] for p in asked]
    around = sum(map(len, fixed)) / max(len(fixed), 1) / CHARS_PER_TOKEN

    to_judge = len(missing) * right.value + len(started)
    by_function = config.genrm.judge_function is not None
    requests = 0.0 if by_function else to_judge * per_item.value
    tokens = len(missing) * response.value
    prompt_tokens, critique_tokens = requests * (around + response.value), requests * critique.value
    reading, writing = assumed.teacher_prompt_tokens_per_s, assumed.teacher_tokens_per_s
    return Estimate(
        len(missing),
        to_judge,
        (response, right) if by_function else (response, right, per_item, critique),
        tokens,
        prompt_tokens,
        critique_tokens,
        tokens / assumed.sampler_tokens_per_s / 3600,
        (prompt_tokens / reading + critique_tokens / writing) / 3600,
    )


def describe(config: Config, cost: Estimate) -> str:
    """The estimate for a person, with the origin of every number it rests on."""
    assumed = config.labelling.assumed
    judging = (
        f"to judge   {cost.to_judge:,.0f} solutions by a function"
        if config.genrm.judge_function is not None
        else f"to judge   {cost.to_judge:,.0f} solutions, {cost.judge_prompt_tokens:,.0f} prompt and "
        f"{cost.critique_tokens:,.0f} critique tokens: {cost.teacher_hours:.2f} GPU h at "
        f"{assumed.teacher_prompt_tokens_per_s:,.0f} and {assumed.teacher_tokens_per_s:,.0f} tokens/s per GPU (assumed)"
    )
    return "\n".join(
        [
            f"to sample  {cost.to_sample:,} solutions, {cost.solution_tokens:,.0f} tokens: "
            f"{cost.sampler_hours:.2f} GPU h at {assumed.sampler_tokens_per_s:,.0f} tokens/s per GPU (assumed)",
            judging,
            *(f"  {figure.name:<16} {figure.value:>8,.4g}  {figure.source}" for figure in cost.figures),
            f"in all     {cost.sampler_hours + cost.teacher_hours:.2f} GPU h",
        ]
    )
