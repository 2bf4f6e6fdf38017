"""Several steps of rollouts that run ahead of updates, simulated. Pure: no clock, no randomness, no I/O.

The order of things is that of `training.loop`, the engines are those of `plan.simulate`. GenRM servers appear as the
seconds from a step's last token to its last score, as if they judged one step at a time.

Invariants (asserted by the tests): without staleness a step takes what `simulate` and the policy's phases add up to,
and trains no older tokens; engines hold no samples in a refit that is not in flight, and are waited for in no other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_fapo.plan.simulate import Server, SimSample, Stage
from megatron_fapo.rollout.sampling import assign
from megatron_fapo.training.ahead import begun_by


@dataclass(frozen=True)
class StepWork:
    """What a step asks for."""

    samples: Sequence[SimSample]
    """In order of groups."""
    tail_s: float
    """From the last token to the last score."""
    policy_s: float
    """Log-probabilities and updates."""


@dataclass(frozen=True)
class StepTime:
    """A step as it went."""

    total_s: float
    waited_s: float
    """For its own groups."""
    drained_s: float
    """For engines to be idle before its refit."""
    engine_busy_s: float
    """Of all engines together, in the step's time."""
    older_share: float
    """Of the tokens that it trained, those that come from older weights than the policy's."""


class _Engines:
    def __init__(self, steps: Sequence[StepWork], group: int, stage: Stage) -> None:
        self._steps, self._group, self._speed = steps, group, stage.speed
        self.servers = [Server(stage.speed) for _ in range(stage.count)]
        self.left: dict[int, int] = {}
        """Step -> samples that are not generated yet; without those that are trained."""
        self.generated: dict[int, float] = {}
        """Step -> when its last sample was."""
        self._samples: list[tuple[int, SimSample]] = []

    def submit(self, step: int, now: float) -> None:
        samples = self._steps[step - 1].samples
        self.left[step] = len(samples)
        for server, prompts in zip(self.servers, assign(len(samples) // self._group, len(self.servers)), strict=True):
            server.advance(now)
            for i in (prompt * self._group + place for prompt in prompts for place in range(self._group)):
                unread = 0 if i % self._group else samples[i].prompt  # the others find it in the prefix cache
                server.add(len(self._samples), samples[i].prompt, samples[i].response, unread)
                self._samples.append((step, samples[i]))

    def until(self, reached: Callable[[], bool], limit: float = math.inf) -> None:
        """Let samples end, in order of time, until it is so, or the time is up."""
        while not reached():
            server = min(self.servers, key=lambda server: server.next_s())
            if (when := server.next_s()) > limit:
                break
            server.advance(when)
            step, _ = self._samples[server.finish()]
            self.left[step] -= 1
            self.generated[step] = when

    def advance(self, now: float) -> None:
        self.until(lambda: False, now)
        for server in self.servers:
            server.advance(now)

    def generated_tokens(self, step: int) -> float:
        """Of what has begun of a step."""
        if step not in self.left:
            return 0.0
        unfinished = 0.0
        for server in self.servers:
            unfinished += sum(end - server.progress for end, i, _ in server.running if self._samples[i][0] == step)
            unfinished += sum(self._samples[i][1].response for i, *_ in server.waiting if self._samples[i][0] == step)
        return sum(sample.response for sample in self._steps[step - 1].samples) - unfinished

    def refit(self, until: float) -> None:
        """Nothing is generated, then samples in flight are read again with the new weights."""
        for server in self.servers:
            server.now = until
            server.stall += server.context * self._speed.prompt_token_s

    @property
    def busy_s(self) -> float:
        return sum(server.busy for server in self.servers)


def simulate_run(
    steps: Sequence[StepWork], group: int, engines: Stage, *, max_staleness: int, in_flight: bool, refit_s: float
) -> list[StepTime]:
    """The steps of a run, one after the other.

    Args:
        group: samples of a prompt; the engine reads its prompt once.
        refit_s: seconds in which neither engines nor policy do anything else.
    """
    run, times = _Engines(steps, group, engines), []
    now, begun, older = 0.0, 0, 0.0
    for step, work in enumerate(steps, 1):
        began, busy_s = now, run.busy_s
        for each in begun_by(step, begun, max_staleness, len(steps)):
            run.submit(each, now)
            begun = each
        run.until(lambda step=step: run.left[step] == 0)  # type: ignore[misc]
        now = max(now, run.generated[step] + work.tail_s)
        waited, share = now - began, older / sum(sample.response for sample in work.samples)
        del run.left[step]
        run.advance(now := now + work.policy_s)
        trained = now
        if not in_flight:
            run.until(lambda: not any(run.left.values()))
            run.advance(now := max(now, *(server.now for server in run.servers)))
        older = run.generated_tokens(step + 1)
        run.refit(now := now + refit_s)
        times.append(StepTime(now - began, waited, now - refit_s - trained, run.busy_s - busy_s, share))
    return times
