"""Rollout, rule and judge as a discrete-event simulation. Pure: no clock, no randomness, no I/O.

A server (engine or GenRM) runs up to `slots` sequences; all of them gain one token per decoding step, and a step takes
longer the more sequences run and the longer they are. A sample goes engine -> verifier process -> (if its answer is
right) the GenRM server with the fewest outstanding tokens, each from the moment that it leaves the one before.

Invariants (asserted by the tests): every sample is generated, checked and (if it is to be) judged exactly once; tokens
are conserved; no server runs more than its slots; more engines or servers never make a step longer.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_fapo.rollout.sampling import assign


@dataclass(frozen=True)
class SimSample:
    """Lengths of one sample, tokens; `critique` 0: its answer is wrong, or shares another's verdict."""

    prompt: int
    response: int
    critique: int = 0


@dataclass(frozen=True)
class Speed:
    """What a decoding step of a server takes, seconds."""

    base_s: float
    sequence_s: float
    """For each running sequence."""
    context_s: float
    """For each token in the KV cache of running sequences."""
    prompt_token_s: float
    """For each prompt token, once, while nothing is decoded."""
    slots: int
    """Sequences at once."""

    def tokens_per_s(self, running: int, context: float) -> float:
        """Of a server with so many sequences of so many tokens each."""
        return running / (self.base_s + running * (self.sequence_s + self.context_s * context))


@dataclass(frozen=True)
class Stage:
    """Equal servers of one role."""

    count: int
    speed: Speed


@dataclass(frozen=True)
class Rollout:
    """What happened, in seconds from the start of the rollout."""

    generated: list[float]
    """Per sample: when its last token was there."""
    scored: list[float]
    """Per sample: when its score was there."""
    engine_busy_s: list[float]
    judge_busy_s: list[float]
    engine_trace: list[tuple[float, int]]
    """(time, running sequences of all engines), at every change."""
    judge_trace: list[tuple[float, int]]

    @property
    def generation_s(self) -> float:
        return max(self.generated, default=0.0)

    @property
    def tail_s(self) -> float:
        """From the last token to the last score."""
        return max(self.scored, default=0.0) - self.generation_s


@dataclass
class Server:
    """One server; time is passed in."""

    speed: Speed
    now: float = 0.0
    progress: float = 0.0
    """Tokens that a sequence running from the start would have."""
    stall: float = 0.0
    """Seconds of prompts still to be read."""
    context: float = 0.0
    """Tokens in the KV cache."""
    outstanding: int = 0
    busy: float = 0.0
    version: int = 0
    """Counts changes, so that outdated events can be told."""
    running: list[tuple[float, int, int]] = field(default_factory=list)
    """Heap of (progress at the end, sample, its tokens in all)."""
    waiting: deque[tuple[int, int, int, int]] = field(default_factory=deque)
    """(sample, prompt, length, prompt tokens that no cache has)."""

    def _step(self) -> tuple[float, float]:
        n, s = len(self.running), self.speed
        return s.base_s + s.sequence_s * n + s.context_s * self.context, s.context_s * n

    def next_s(self) -> float:
        """When the next sequence ends, if nothing arrives before."""
        if not self.running:
            return math.inf
        step, growth = self._step()
        left = max(self.running[0][0] - self.progress, 0.0)
        return self.now + self.stall + step * left + growth * left * left / 2

    def advance(self, to: float) -> None:
        """Let time pass, at most to the end of the next sequence."""
        passed, self.now = to - self.now, to
        if not self.running:
            return
        self.busy += passed
        read = min(passed, self.stall)
        self.stall -= read
        passed -= read
        step, growth = self._step()
        root = math.sqrt(step * step + 2 * growth * passed)
        gained = 2 * passed / (step + root)  # of growth/2 x^2 + step x = passed, without cancellation
        self.progress += gained
        self.context += gained * len(self.running)

    def add(self, sample: int, prompt: int, length: int, unread: int) -> None:
        self.waiting.append((sample, prompt, length, unread))
        self.outstanding += prompt + length
        self.admit()

    def admit(self) -> None:
        self.version += 1
        while self.waiting and len(self.running) < self.speed.slots:
            sample, prompt, length, unread = self.waiting.popleft()
            heapq.heappush(self.running, (self.progress + length, sample, prompt + length))
            self.context += prompt
            self.stall += unread * self.speed.prompt_token_s

    def finish(self) -> int:
        """Take the sequence that ends now."""
        end, sample, tokens = heapq.heappop(self.running)
        self.progress = end  # what rounding left
        self.context = max(0.0, self.context - tokens)
        self.outstanding -= tokens
        self.admit()
        return sample


def simulate(
    samples: Sequence[SimSample],
    group: int,
    engines: Stage,
    judges: Stage | None,
    *,
    rule_s: float,
    rule_processes: int,
    streamed: bool = True,
) -> Rollout:
    """One rollout, everything submitted at its start.

    Args:
        samples: in order of groups; prompts go to engines as `rollout.sampling.assign` deals them.
        group: samples of a prompt; the engine reads its prompt once.
        judges: None: right answers are not judged.
        rule_s: seconds of a verifier process for an answer.
        streamed: judges work while others generate; False: they begin when all answers are checked.
    """
    pools = [[Server(engines.speed) for _ in range(engines.count)]]
    pools.append([Server(judges.speed) for _ in range(judges.count)] if judges else [])
    generated, scored = [math.nan] * len(samples), [math.nan] * len(samples)
    traces: list[list[tuple[float, int]]] = [[], []]
    running = [0, 0]
    events: list[tuple[float, int, int, int, int]] = []  # time, order, pool (2: rule), server or sample, version
    free_rule = [0.0] * rule_processes
    order, checked = 0, 0
    ready: deque[int] = deque()  # right answers that nobody judges yet

    def schedule(pool: int, index: int) -> None:
        nonlocal order
        server = pools[pool][index]
        if (when := server.next_s()) < math.inf:
            order += 1
            heapq.heappush(events, (when, order, pool, index, server.version))

    def changed(pool: int, when: float, before: int, index: int) -> None:
        running[pool] += len(pools[pool][index].running) - before
        traces[pool].append((when, running[pool]))
        schedule(pool, index)

    for index, prompts in enumerate(assign(-(-len(samples) // group), engines.count)):
        for prompt in prompts:
            for place, i in enumerate(range(prompt * group, min((prompt + 1) * group, len(samples)))):
                # The first sample's prompt is read, the others find it in the prefix cache.
                each = samples[i]
                pools[0][index].add(i, each.prompt, each.response, each.prompt if place == 0 else 0)
        changed(0, 0.0, 0, index)
    while events:
        when, _, pool, index, version = heapq.heappop(events)
        if pool == 2:  # the rule is done
            checked += 1
            if pools[1] and samples[index].critique:
                ready.append(index)
            else:
                scored[index] = when
            while ready and (streamed or checked == len(samples)):
                sample = samples[(index := ready.popleft())]
                target = min(range(len(pools[1])), key=lambda i: pools[1][i].outstanding)
                server = pools[1][target]
                server.advance(when)
                before = len(server.running)
                solution = sample.prompt + sample.response
                server.add(index, solution, sample.critique, solution)
                changed(1, when, before, target)
            continue
        server = pools[pool][index]
        if version != server.version:
            continue
        server.advance(when)
        before = len(server.running)
        done = server.finish()
        changed(pool, when, before, index)
        if pool == 1:
            scored[done] = when
            continue
        generated[done] = when
        began = max(when, heapq.heappop(free_rule))
        heapq.heappush(free_rule, began + rule_s)
        order += 1
        heapq.heappush(events, (began + rule_s, order, 2, done, 0))
    busy = [[server.busy for server in pool] for pool in pools]
    return Rollout(generated, scored, busy[0], busy[1], traces[0], traces[1])
