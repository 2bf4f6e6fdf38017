"""Several engines behind one stream: which gets what, and what happens to the rest when one fails.

The engines here are Ray actors without vLLM, which test_engine.py and test_refit.py have.
"""

from __future__ import annotations

import asyncio

import pytest

from megatron_fapo.config.rollout import RolloutConfig, SamplingConfig
from megatron_fapo.data.records import Sample, SampleKey
from megatron_fapo.rollout.engine import EngineDiedError, RolloutEngine, VLLMDiedError
from megatron_fapo.rollout.pool import RolloutPool
from megatron_fapo.weight_sync.protocol import Bucket, RefitError, TensorEntry
from tests.rollout.conftest import make_prompts, run


class Engine:
    """Answers at once, and fails where it is told to."""

    def reset(self, name, fails_at):
        self.name, self.fails_at, self.calls = name, fails_at, []

    def _note(self, call):
        self.calls.append(call)
        if call == self.fails_at:
            raise RefitError(f"{self.name} cannot {call}") if call != "generate" else ValueError("vLLM fell over")

    async def start(self, version):
        self._note("start")
        return {"name": self.name, "version": version}

    async def generate(self, prompts, epochs, *, n, sampling, max_tokens):  # noqa: ARG002
        for prompt, epoch in zip(prompts, epochs, strict=True):
            for index in range(n):
                await asyncio.sleep(0.01)
                key = SampleKey(prompt.prompt_id, epoch, index)
                yield Sample(key, prompt, (1,), (-0.5,), self.name, "stop", max_tokens)
        self._note("generate")

    async def begin_refit(self):
        self._note("begin")
        return {"pause_s": 1.0}

    async def load_bucket(self, bucket):  # noqa: ARG002
        await asyncio.sleep(0.1)
        self._note("load")
        return {"load_s": 2.0}

    async def finish_refit(self, version):
        self._note(f"finish {version}")
        return {"finish_s": 3.0}

    async def abort_refit(self):
        self._note("abort")

    async def history(self):
        return self.calls


@pytest.fixture(scope="module")
def actors(local_ray):
    actors = [local_ray.remote(Engine).options(num_cpus=0).remote() for _ in range(2)]
    yield actors
    for actor in actors:
        local_ray.kill(actor)


@pytest.fixture
def pool_of(actors, local_ray, tmp_path):
    """A pool of engines, each failing where it is told to (None: nowhere), and their handles."""

    def make(*fails_at):
        handles = actors[: len(fails_at)]
        logs = [tmp_path / f"{index}.log" for index in range(len(fails_at))]
        for index, (handle, failure, log) in enumerate(zip(handles, fails_at, logs, strict=True)):
            local_ray.get(handle.reset.remote(f"engine {index}", failure))
            log.write_text(f"last words of engine {index}")
        return RolloutPool(handles, [str(log) for log in logs]), handles

    return make


def collect(pool, prompts, n=2):
    async def main():
        options = {"n": n, "sampling": SamplingConfig(), "max_tokens": 4}
        return [sample async for sample in pool.generate(prompts, list(range(len(prompts))), **options)]

    return run(main())


def test_prompts_are_dealt_by_position_and_streams_are_merged(pool_of):
    pool, _ = pool_of(None, None)
    assert run(pool.start(3)) == [{"name": f"engine {i}", "version": 3} for i in range(2)]
    samples = collect(pool, make_prompts(5))
    assert {s.key for s in samples} == {(f"test/{i}", i, k) for i in range(5) for k in range(2)}
    assert {s.key.prompt_id for s in samples if s.text == "engine 0"} == {"test/0", "test/1", "test/2"}
    assert {s.text for s in samples[:4]} == {"engine 0", "engine 1"}, "both streams are read at the same time"
    assert len(collect(pool, make_prompts(1))) == 2
    assert collect(pool, []) == []


def test_a_failing_engine_is_named_with_the_end_of_its_log(pool_of):
    pool, _ = pool_of(None, "generate")
    with pytest.raises(
        EngineDiedError, match=r"rollout-1 on node .*: failed: .*vLLM fell over(.|\n)*last words of engine 1"
    ):
        collect(pool, make_prompts(4))


def source_of(count, log):
    entry = TensorEntry("t", "float32", (1,), 0, 4)
    buckets = iter([Bucket("h", "shm", (), 4, (entry,), 0.25)] * count)

    async def source():
        log.append("next")
        return next(buckets, None)

    return source


def test_refit_takes_every_engine_through_every_step(pool_of):
    pool, handles = pool_of(None, None)
    log = []
    metrics = run(pool.refit([source_of(2, log), source_of(1, log)], 9, timeout_s=30))
    for handle in handles:
        assert run(_await(handle.history.remote())) == ["begin", "load", "load", "load", "finish 9"]
    total = metrics.pop("weight_sync/total_s")
    assert total > 0
    assert metrics == {
        "weight_sync/pause_s": 1.0,
        "weight_sync/load_s": 6.0,
        "weight_sync/finish_s": 3.0,
        "weight_sync/bytes": 12.0,
        "weight_sync/buckets": 3.0,
        "weight_sync/pack_s": 0.75,
    }


@pytest.mark.parametrize("step", ["begin", "load", "finish 9"])
def test_a_refit_that_one_engine_cannot_complete_is_given_up_on_all(pool_of, step):
    pool, handles = pool_of(None, step)
    with pytest.raises(RefitError, match=f"engine 1 cannot {step}"):
        run(pool.refit([source_of(3, [])], 9, timeout_s=30))
    for handle in handles:
        assert run(_await(handle.history.remote()))[-1] == "abort"


def test_a_refit_has_a_deadline(pool_of):
    pool, handles = pool_of(None)

    async def never():
        await asyncio.sleep(60)

    with pytest.raises(RefitError, match=r"version 9 took more than 0.5 s"):
        run(pool.refit([never], 9, timeout_s=0.5))
    assert run(_await(handles[0].history.remote()))[-1] == "abort"


async def _await(reference):
    return await reference


class DyingLLM:
    """vLLM whose core is killed before it answers."""

    errored = False

    async def pause_generation(self, **_):
        self.errored = True
        await asyncio.sleep(60)

    async def resume_generation(self):
        return None


def test_a_call_that_a_killed_core_leaves_unanswered_is_given_up(tmp_path):
    engine = RolloutEngine(str(tmp_path), RolloutConfig(), device="cpu", dtype="float32", max_model_len=64)
    engine._llm = DyingLLM()
    with pytest.raises(VLLMDiedError, match="ended before it answered"):
        run(asyncio.wait_for(engine.pause(), 10))
