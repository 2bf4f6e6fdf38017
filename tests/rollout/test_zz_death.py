"""Last of this folder, because it kills the engine that the others share."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from megatron_fapo.rollout.engine import EngineDiedError
from tests.rollout.conftest import make_prompts


def test_killed_engine_is_named_with_its_log_and_leaves_no_process(engine):
    pid = engine.facts["pid"]
    tree = [process.pid for process in psutil.Process(pid).children(recursive=True)]
    assert len(tree) >= 2, "the guard and the engine core"
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(
        EngineDiedError, match=rf"rollout engine 0 died; the end of its log {engine.log}:\n(.|\n)*EngineCore"
    ):
        engine.generate(make_prompts(2))
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{process}").exists() for process in tree):
        assert time.monotonic() < deadline, "processes of the killed engine are still there"
        time.sleep(0.1)
