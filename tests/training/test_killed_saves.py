"""Kill -9 in the middle of saves: the newest complete checkpoint is always there, and never a half one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.policy.models import write_model
from tests.training.killed_saves import PHASES

KILLS = 50


def test_what_is_left_by_kills_in_the_middle_of_saves_is_resumed(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    arguments = [str(tmp_path / "run"), model, str(KILLS), "7"]
    command = [sys.executable, "-W", "ignore", "-m", "tests.training.killed_saves", *arguments]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["kills"] == KILLS
    # Each phase was cut off in its middle, and some kills came too late for it: both sides of every border were met.
    assert all(seen["reached"].get(phase, 0) > 0 for phase in PHASES), seen
    assert seen["steps"] > 2, "no save but the undisturbed ones was ever finished"
    assert [name for name in seen["left"] if name.startswith("step_")] == [f"step_{seen['steps']:06d}"], seen
