"""What becomes of a job, for every way in which an attempt can end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fapo.launch.life import (
    CANCEL,
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_LOST,
    EXIT_SAVED,
    TIME_LIMIT,
    Evidence,
    decide,
    idle_attempts,
    screen,
)
from megatron_fapo.training import signals

FAILURE = {"role": "rollout", "rank": 3, "node": "node2", "what": "died", "step": 7, "log_path": "x.log"}


@pytest.mark.parametrize(
    ("evidence", "exit_code", "requeue", "exclude"),
    [
        (Evidence(driver=0), EXIT_DONE, False, ()),
        (Evidence(driver=0, asked=TIME_LIMIT), EXIT_DONE, False, ()),  # it finished while the signal was on its way
        (Evidence(driver=0, lost_nodes={"node2": "x"}), EXIT_DONE, False, ()),
        (Evidence(driver=75, asked=TIME_LIMIT, step=3), EXIT_SAVED, True, ()),
        (Evidence(driver=75, step=3), EXIT_SAVED, True, ()),  # someone signalled the driver, not us
        (Evidence(asked=TIME_LIMIT), EXIT_SAVED, True, ()),
        (Evidence(driver=75, asked=CANCEL), EXIT_SAVED, False, ()),
        (Evidence(asked=CANCEL, lost_nodes={"node2": "x"}), EXIT_SAVED, False, ()),
        (Evidence(asked=CANCEL, slurm_requeued=True), EXIT_LOST, False, ()),
        (Evidence(driver=1), EXIT_FAILED, False, ()),
        (Evidence(driver=1, asked=TIME_LIMIT), EXIT_FAILED, False, ()),
        (Evidence(driver=2), EXIT_BAD_INPUT, False, ()),
        (Evidence(bad_input=["x"], bad_nodes={"node1": "y"}), EXIT_BAD_INPUT, False, ()),
        (Evidence(bad_nodes={"node3": "7 GPUs"}), EXIT_LOST, True, ("node3",)),
        (Evidence(driver=76), EXIT_LOST, True, ()),
        (Evidence(driver=137), EXIT_LOST, True, ()),
        (Evidence(driver=130), 130, False, ()),
        (Evidence(driver=76, lost_nodes={"node2": "x"}), EXIT_LOST, True, ("node2",)),
        (Evidence(driver=None, lost_nodes={"node2": "x"}), EXIT_LOST, True, ("node2",)),
        (Evidence(overdue="preflight"), EXIT_LOST, True, ()),
        (Evidence(overdue="did not stop", asked=TIME_LIMIT), EXIT_LOST, True, ()),
        (Evidence(driver=3), 3, False, ()),
        (Evidence(), EXIT_FAILED, False, ()),
    ],
)
def test_each_end_has_its_decision(evidence: Evidence, exit_code: int, requeue: bool, exclude: tuple[str, ...]) -> None:
    decision = decide(evidence, idle_restarts=2, spare_nodes=5)
    assert (decision.exit_code, decision.requeue, decision.exclude) == (exit_code, requeue, exclude)


def test_the_exit_codes_are_the_drivers_own() -> None:
    assert (EXIT_SAVED, EXIT_LOST) == (signals.EXIT_SAVED, signals.EXIT_LOST)


def test_attempts_without_progress_end_the_job() -> None:
    def after(*starts: int, step: int) -> bool:
        return decide(Evidence(driver=76, start_steps=starts, step=step), idle_restarts=2, spare_nodes=0).requeue

    assert after(-1, step=-1)
    assert after(-1, -1, step=-1)
    assert not after(-1, -1, -1, step=-1)
    assert after(-1, -1, -1, step=10)  # the last attempt got somewhere
    assert after(-1, 10, 10, step=10)
    assert not after(10, 10, 10, step=10)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(0, 3))
def test_requeues_end_unless_steps_are_made(increments: list[int], idle_restarts: int) -> None:
    """Played through: attempts that gain `increments` steps each; the job ends at the first idle_restarts + 1 zeros."""
    step, starts, idle = 0, [], 0
    for gained in increments:
        starts.append(step)
        step += gained
        idle = 0 if gained else idle + 1
        assert idle_attempts(starts, step) == idle
        evidence = Evidence(driver=76, start_steps=tuple(starts), step=step)
        assert decide(evidence, idle_restarts, 0).requeue == (idle <= idle_restarts)


def test_a_bad_node_stays_when_no_other_could_take_over() -> None:
    bad = Evidence(bad_nodes={"node1": "a", "node2": "b"})
    assert decide(bad, 2, spare_nodes=2).exclude == ("node1", "node2")
    kept = decide(bad, 2, spare_nodes=1)
    assert kept.requeue
    assert kept.exclude == ()
    assert "only 1 other" in kept.why


def test_the_screen_names_who_where_and_what_next() -> None:
    evidence = Evidence(driver=76, failure=FAILURE, lost_nodes={"node2": "Ray ended"}, step=7, start_steps=(3,))
    text = screen("job 5 attempt 0", evidence, decide(evidence, 2, 1), {"x.log": "the tail"})
    for part in ("rollout-3 on node2 after step 7: died", "node2: Ray ended", "requeued", "avoids node2", "the tail"):
        assert part in text


def test_what_cannot_go_on_is_not_requeued() -> None:
    lost = Evidence(driver=76, step=3)
    assert decide(lost, 2, 0).requeue
    refused = decide(lost, 2, 0, goes_on=False)
    assert (refused.exit_code, refused.requeue) == (EXIT_LOST, False)
    assert decide(Evidence(driver=0), 2, 0, goes_on=False).exit_code == EXIT_DONE
