"""Last of this folder, because it kills the engine that the others share."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from megatron_fapo.errors import UserError
from megatron_fapo.rollout.engine import EngineDiedError
from megatron_fapo.rollout.pool import RolloutPool
from tests.rollout.conftest import make_prompts, run


def test_killed_engine_is_named_with_its_log_and_leaves_no_process(engine):
    pid = engine.facts["pid"]
    tree = [process.pid for process in psutil.Process(pid).children(recursive=True)]
    assert len(tree) >= 2, "the guard and the engine core"
    core = next(each for each in psutil.Process(pid).children(recursive=True) if "EngineCore" in each.name())
    core.kill()
    for call in (lambda: engine.generate(make_prompts(2)), lambda: run(engine.pool.pause())):
        with pytest.raises(EngineDiedError, match="its vLLM processes are gone") as death:
            call()
        assert death.value.lost, "another attempt may go on elsewhere, whatever the engine was asked"
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(
        EngineDiedError,
        match=rf"(?s)rollout-0 on node .*, pid {pid}\): its process is gone.*the end of {engine.log}:\n.*EngineCore",
    ) as death:
        engine.generate(make_prompts(2))
    assert death.value.lost
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{process}").exists() for process in tree):
        assert time.monotonic() < deadline, "processes of the killed engine are still there"
        time.sleep(0.1)


def test_shutdown_does_not_wait_for_an_engine_that_is_starting(engine, local_ray):
    from megatron_fapo.config.rollout import RolloutConfig
    from megatron_fapo.rollout.engine import RolloutEngine

    actor = local_ray.remote(RolloutEngine).options(num_cpus=0)
    checkpoint = str(engine.checkpoints[0])
    handle = actor.remote(checkpoint, RolloutConfig(), device="cpu", dtype="float32", max_model_len=64)

    async def main():
        pool = RolloutPool([handle], [None])
        starting = asyncio.ensure_future(pool.start())
        await asyncio.wait([starting], timeout=4)
        began = time.monotonic()
        await pool.shutdown()
        assert time.monotonic() - began < 20
        with pytest.raises(EngineDiedError, match="rollout-0 on node"):
            await starting

    asyncio.run(main())


def test_start_refuses_what_vllm_could_not_use(engine, local_ray):
    from megatron_fapo.config.rollout import RolloutConfig
    from megatron_fapo.rollout.engine import RolloutEngine

    actor = local_ray.remote(RolloutEngine).options(num_cpus=0)

    async def start(path, **fields):
        handle = actor.remote(path, RolloutConfig(**fields), device="cpu", dtype="float32", max_model_len=64)
        await RolloutPool([handle], [None]).start()

    with pytest.raises(UserError, match="/nowhere is not a checkpoint directory"):
        asyncio.run(start("/nowhere"))
    with pytest.raises(UserError, match=r"rollout.vllm: max_num_seqs is set by other fields"):
        asyncio.run(start(str(engine.checkpoints[0]), vllm={"max_num_seqs": 3}))
