"""The guard, with real process trees that behave as badly as they can."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

from megatron_fapo.rollout.guard import TAG, Guard, kill_tagged, tagged_pids

STUBBORN = (
    "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.setsid(); os.fork(); time.sleep(60)"
)


def wait_for(condition, what, deadline_s=10.0):
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def test_release_kills_the_tree_and_nothing_else():
    guard = Guard()
    bystander = subprocess.Popen(["sleep", "60"])
    tree = subprocess.Popen([sys.executable, "-c", STUBBORN], env={**os.environ, **guard.environment})
    wait_for(lambda: len(tagged_pids(guard.tag)) == 2, "the tree did not start")
    guard.release()
    assert tree.wait(5) == -signal.SIGKILL
    assert tagged_pids(guard.tag) == []
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_tree_dies_with_an_owner_that_was_killed():
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(f"""
            import os, subprocess, sys, time
            from megatron_fapo.rollout.guard import Guard
            guard = Guard()
            subprocess.Popen([sys.executable, "-c", {STUBBORN!r}], env={{**os.environ, **guard.environment}})
            print(guard.tag, flush=True)
            time.sleep(60)
        """)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    tag = owner.stdout.readline().strip()
    wait_for(lambda: len(tagged_pids(tag)) == 2, "the tree did not start")
    owner.kill()
    owner.wait()
    wait_for(lambda: not tagged_pids(tag), "the tree outlived its owner")


def test_release_of_a_tree_that_has_ended():
    guard = Guard()
    subprocess.run(["true"], env={**os.environ, **guard.environment}, check=True)
    guard.release()


def test_only_the_whole_tag_matches():
    process = subprocess.Popen(["sleep", "60"], env={TAG: "abcdef"})
    kill_tagged("abc")
    assert process.poll() is None
    kill_tagged("abcdef")
    assert process.wait(5) == -signal.SIGKILL


def test_a_process_that_renames_itself_is_still_found():
    """As Ray's agents and vLLM's engine cores do: without SPT_NOENV the title is written over the environment."""
    guard = Guard()
    program = """
import setproctitle, time
setproctitle.setproctitle("renamed" * 500)
print("ready", flush=True)
time.sleep(60)
"""
    environment = guard.environment | {"PADDING": "x" * 4000}  # the tag stands first, where a title reaches
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    guard.release()
    assert process.wait(5) == -signal.SIGKILL
