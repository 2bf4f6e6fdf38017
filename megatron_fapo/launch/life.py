"""What becomes of a job when an attempt of it has ended: pure decisions, and the screen that explains them.

In: what is known at the end of an attempt (`Evidence`). Out: a `Decision`: the exit code, whether to requeue, which
nodes to avoid, and why. Standard library only: it also runs under whatever Python the batch host has.

Invariants: a job that made no new checkpoint in `idle_restarts` + 1 attempts in a row is never requeued; nothing that
the user cancelled, or that would fail again in the same way, is requeued; a node is avoided only when its own part
failed, and only while enough others remain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_SAVED, EXIT_LOST = 0, 1, 2, 75, 76
EXIT_INTERRUPTED = 130
_KILLED = 128
"""Exit codes above it: ended by a signal."""

TIME_LIMIT, CANCEL = "time limit", "cancel"


@dataclass(frozen=True)
class Evidence:
    """What is known of an attempt that has ended."""

    driver: int | None = None
    """Exit code of the driver; None when it was not started, or had to be killed."""
    asked: str | None = None
    """`time limit` or `cancel`, when a signal came before the end."""
    slurm_requeued: bool = False
    """Slurm ended the attempt and has put the job back by itself: a node went down, or it was preempted."""
    bad_input: Sequence[str] = ()
    """Problems of the configuration: they would be the same in every attempt."""
    bad_nodes: Mapping[str, str] = field(default_factory=dict)
    """Node -> what is wrong with it, from preflight."""
    lost_nodes: Mapping[str, str] = field(default_factory=dict)
    """Node -> how its Ray ended, though nobody had asked it to."""
    overdue: str | None = None
    """What did not happen before its deadline."""
    failure: Mapping[str, object] | None = None
    """What the driver wrote to failure.json: who failed first."""
    start_steps: Sequence[int] = (0,)
    """The newest complete checkpoint at the start of each attempt of this job, this one last."""
    step: int = 0
    """The newest complete checkpoint now."""


@dataclass(frozen=True)
class Decision:
    exit_code: int
    requeue: bool
    exclude: tuple[str, ...]
    why: str


def idle_attempts(start_steps: Sequence[int], step: int) -> int:
    """How many of the last attempts in a row, this one included, ended without a checkpoint newer than they began
    with."""
    count = 0
    for start in reversed(start_steps):
        if start < step:
            break
        count += 1
    return count


def decide(evidence: Evidence, idle_restarts: int, spare_nodes: int, *, goes_on: bool = True) -> Decision:
    """
    Args:
        goes_on: whether another attempt of this verb takes up what the last one left.
        idle_restarts: attempts without progress after which there is no other (cluster.idle_restarts), less one.
        spare_nodes: nodes of the partition that could replace excluded ones.
    """
    code, retry, why = _verdict(evidence)
    if not retry:
        return Decision(code, False, (), why)
    if not goes_on:
        return Decision(code, False, (), f"{why}; this verb cannot go on where it was, submit it again")
    idle = idle_attempts(evidence.start_steps, evidence.step)
    if idle > idle_restarts:
        what = f"{why}; {idle} attempts in a row made no new checkpoint (cluster.idle_restarts={idle_restarts})"
        return Decision(EXIT_FAILED, False, (), what)
    bad = tuple(sorted({*evidence.bad_nodes, *evidence.lost_nodes}))
    if len(bad) > spare_nodes:
        why += f"; {', '.join(bad)} not excluded: only {spare_nodes} other nodes could take over"
        bad = ()
    return Decision(code, True, bad, why)


def _verdict(e: Evidence) -> tuple[int, bool, str]:
    """(exit code, worth another attempt, why)."""
    if e.driver == EXIT_DONE:
        return EXIT_DONE, False, "the run is complete"
    if e.asked == CANCEL and e.slurm_requeued:
        return EXIT_LOST, False, "a node went down or the job was preempted; the newest complete checkpoint stands"
    if e.asked == CANCEL:
        saved = "with everything saved" if e.driver == EXIT_SAVED else "the newest complete checkpoint stands"
        return EXIT_SAVED, False, f"cancelled, {saved}"
    if e.bad_input or e.driver == EXIT_BAD_INPUT:
        return EXIT_BAD_INPUT, False, "bad input: the same in every attempt"
    if e.bad_nodes:
        return EXIT_LOST, True, f"preflight refused {', '.join(sorted(e.bad_nodes))}"
    if e.driver == EXIT_SAVED:
        return EXIT_SAVED, True, f"stopped for the {e.asked or 'scheduler'} with everything saved"
    if e.lost_nodes:
        return EXIT_LOST, True, f"lost the Ray of {', '.join(sorted(e.lost_nodes))}"
    if e.overdue is not None:
        return EXIT_LOST, True, e.overdue
    if e.asked == TIME_LIMIT and e.driver is None:
        return EXIT_SAVED, True, "stopped for the time limit before the driver had started"
    if e.driver == EXIT_LOST:
        return EXIT_LOST, True, "a process of the run was lost"
    if e.driver is not None and e.driver > _KILLED and e.driver != EXIT_INTERRUPTED:
        return EXIT_LOST, True, f"the driver was killed by signal {e.driver - _KILLED}"
    return e.driver or EXIT_FAILED, False, "the run failed by an error of its own: another attempt would too"


def screen(title: str, evidence: Evidence, decision: Decision, tails: Mapping[str, str]) -> str:
    """One screen for a person: who failed first and where, the decision, and the ends of the logs that tell more.

    Args:
        tails: path of a log -> its last lines, the most telling first.
    """
    lines = [f"===== {title} ====="]
    lines += [f"configuration: {problem}" for problem in evidence.bad_input]
    lines += [f"{node}: {what}" for node, what in {**evidence.bad_nodes, **evidence.lost_nodes}.items()]
    if evidence.failure is not None:
        f = evidence.failure
        lines.append(f"first to fail: {f['role']}-{f['rank']} on {f['node']} after step {f['step']}: {f['what']}")
    if evidence.driver not in (None, EXIT_DONE, EXIT_SAVED):
        lines.append(f"driver: exit code {evidence.driver}")
    lines.append(f"newest complete checkpoint: {f'step {evidence.step}' if evidence.step >= 0 else 'none'}")
    ours = "requeued" if decision.requeue else "not requeued"
    lines.append(f"decision: {'requeued by Slurm' if evidence.slurm_requeued else ours} ({decision.why})")
    if decision.exclude:
        lines.append(f"the next attempt avoids {', '.join(decision.exclude)}")
    for path, tail in tails.items():
        lines += [f"----- the end of {path}", tail]
    return "\n".join(lines)
