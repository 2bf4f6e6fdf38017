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
from megatron_fapo.weight_sync.protocol import EngineVersion, RefitError, StaleEngineError
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

    async def pull(self, exposures):
        self._note(f"pull {exposures}")
        return self.name

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


def test_a_step_of_a_refit_is_asked_of_all_engines_or_of_some(pool_of):
    pool, handles = pool_of(None, None)
    assert run(pool.refit_step("pull", 1)) == ["engine 0", "engine 1"]
    assert run(pool.refit_each("pull", {1: (2,)})) == ["engine 1"]
    assert [run(_await(handle.history.remote())) for handle in handles] == [["pull 1"], ["pull 1", "pull 2"]]


def test_why_an_engine_cannot_do_a_step_is_told_and_all_can_give_the_refit_up(pool_of):
    pool, handles = pool_of("abort", "pull 3")
    with pytest.raises(RefitError, match="engine 1 cannot pull 3"):
        run(pool.refit_step("pull", 3))
    run(pool.abandon_refit())
    assert [run(_await(handle.history.remote()))[-1] for handle in handles] == ["abort", "abort"]


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


class IdleLLM:
    """vLLM with nothing to do."""

    errored = False

    async def pause_generation(self, **_):
        return None

    async def resume_generation(self):
        return None

    async def collective_rpc(self, *_, **__):
        return []


@pytest.mark.parametrize("fails", [False, True])
def test_a_rollout_that_a_refit_overtakes_begins_with_its_weights_or_not_at_all(tmp_path, monkeypatch, fails):
    engine = RolloutEngine(str(tmp_path), RolloutConfig(), device="cpu", dtype="float32", max_model_len=64)
    engine._llm, engine._version, admitted = IdleLLM(), EngineVersion(3), []

    async def admit(*_):
        admitted.append(engine.version())

    monkeypatch.setattr(engine, "_admit", admit)

    async def main():
        async def rollout():
            options = {"n": 1, "sampling": SamplingConfig(), "max_tokens": 4}
            return [sample async for sample in engine.generate(make_prompts(1), [0], **options)]

        await engine._admission.acquire()  # of another rollout that is being admitted
        refit = asyncio.create_task(engine.begin_refit(4, 1.0, in_flight=True))
        await asyncio.sleep(0)
        generating = asyncio.create_task(rollout())
        await asyncio.sleep(0)
        engine._admission.release()
        await refit
        await asyncio.sleep(0.1)
        assert not admitted
        assert not generating.done()
        await (engine.abort_refit() if fails else engine.commit_refit(4))
        await generating

    if fails:
        with pytest.raises(StaleEngineError, match="is stale"):
            run(asyncio.wait_for(main(), 10))
    else:
        run(asyncio.wait_for(main(), 10))
    assert admitted == ([] if fails else [4])
