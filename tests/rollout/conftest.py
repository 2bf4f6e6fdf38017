"""One real vLLM engine for all tests of this folder: it takes most of a minute to start."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron_fapo.config.rollout import RolloutConfig, SamplingConfig
from megatron_fapo.data.records import Prompt, Sample, SampleKey
from megatron_fapo.rollout.pool import RolloutPool

MAX_MODEL_LEN = 512


def run(awaitable: Awaitable[Any]) -> Any:
    async def main() -> Any:
        return await awaitable

    return asyncio.run(main())


def make_prompts(count: int) -> list[Prompt]:
    """Prompts of 10 to 16 arbitrary tokens."""
    return [
        Prompt(f"test/{i}", "test", (), "1", "q", tuple((7 * i + 3 * j) % 250 for j in range(10 + i % 7)))
        for i in range(count)
    ]


@dataclass
class Engine:
    """The running engine, and shorthands for what tests do with it."""

    pool: RolloutPool
    handle: Any
    facts: dict[str, Any]
    checkpoints: tuple[Path, Path]
    """The one that it started from, and another."""
    log: Path
    first_run: dict[SampleKey, Sample] = field(default_factory=dict)
    """What `standard_run` gave before any refit."""

    async def stream(self, prompts: list[Prompt], *, n: int = 4, max_tokens: int = 48, temperature: float = 1.0) -> Any:
        sampling = SamplingConfig(temperature=temperature)
        async for sample in self.pool.generate(
            prompts, [0] * len(prompts), n=n, sampling=sampling, max_tokens=max_tokens
        ):
            yield sample

    def generate(self, prompts: list[Prompt], **options: Any) -> dict[SampleKey, Sample]:
        async def collect() -> dict[SampleKey, Sample]:
            return {sample.key: sample async for sample in self.stream(prompts, **options)}

        return run(collect())

    def standard_run(self) -> dict[SampleKey, Sample]:
        return self.generate(make_prompts(12))


def make_breakable() -> type:
    """The engine's actor, whose steps can be made to fail in vLLM's worker or in its core."""
    from megatron_fapo.rollout.engine import RolloutEngine

    class BreakableEngine(RolloutEngine):
        broken = ""

        def break_at(self, step: str) -> None:
            self.broken = step

        async def _workers(self, method: str, *args: Any) -> list[Any]:
            answer = await super()._workers(method, *args)
            if method == self.broken:  # after its work: what it has done must be undone
                raise RuntimeError(f"{method} broke")
            return answer

        async def _ask(self, call: Any) -> Any:
            answer = await super()._ask(call)
            return False if answer is True and self.broken == "reset" else answer

    return BreakableEngine


@pytest.fixture(scope="package")
def local_ray():
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # 30 is too few on a busy machine
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # no actor would use them
    import ray

    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False,
        object_store_memory=100 * 2**20,
    )  # fmt: skip
    yield ray
    ray.shutdown()


@pytest.fixture(scope="package")
def engine(local_ray, tmp_path_factory):
    from megatron_fapo.data.tokenizer import init_tiny_model
    from megatron_fapo.rollout.environment import vllm_environment

    root = tmp_path_factory.mktemp("engine")
    checkpoints = (root / "first", root / "second")
    for seed, path in enumerate(checkpoints):
        init_tiny_model(path, seed)
    log = root / "rollout-0.log"
    actor = local_ray.remote(make_breakable()).options(num_cpus=0, runtime_env={"env_vars": vllm_environment("cpu")})
    handle = actor.remote(
        str(checkpoints[0]), RolloutConfig(), device="cpu", dtype="float32", max_model_len=MAX_MODEL_LEN,
        seed=11, log_path=str(log),
    )  # fmt: skip
    pool = RolloutPool([handle], [str(log)])
    facts = run(pool.start())[0]
    engine = Engine(pool, handle, facts, checkpoints, log)
    engine.first_run = engine.standard_run()
    yield engine
    run(pool.shutdown())
