"""Refits of a real vLLM engine from other processes: whole, proven, and never half served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_fapo.config.weight_sync import WeightSyncConfig
from megatron_fapo.training.refit import Refits
from megatron_fapo.weight_sync.protocol import RefitError, StaleEngineError
from tests.rollout.conftest import make_prompts, run
from tests.rollout.test_engine import reference_logprobs


class Rank:
    """A policy rank as far as a refit sees it: a process that holds some tensors of a checkpoint, as they are there."""

    def __init__(self):
        from megatron_fapo.weight_sync.source import WeightSource

        self.tensors = {}
        self.source = WeightSource(lambda: self.tensors, torch.device("cpu"))
        self.damage = None

    def hold(self, checkpoint, rank, ranks, leave_out=None, damage=None):
        tensors = load_file(checkpoint / "model.safetensors")
        # The worst order: what vLLM fuses into one tensor comes from different ranks, in rounds far apart.
        names = sorted(tensors, key=lambda name: name.split(".")[-2:])
        self.tensors = {name: tensors[name] for name in names[rank::ranks] if name != leave_out}
        if damage == "unknown":
            self.tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(4, 4)
        if damage == "shape":
            self.tensors["model.norm.weight"] = torch.zeros(64)
        self.damage = damage

    def source_index(self):
        from tests.weight_sync.plain import whole

        return whole(self.tensors).to_json()

    def take_share(self, share):
        from megatron_fapo.weight_sync.share import Share

        return self.source.take(Share.from_json(share))

    def open_group(self, address):
        self.meeting = torch.distributed.TCPStore(address, 0, is_master=True, wait_for_workers=False)
        return address, self.meeting.port

    def weights(self, what, *args):
        if what == "exchange" and self.damage == "die":
            import os

            os._exit(1)
        answer = getattr(self.source, what)(*args)
        if what == "expose":
            return self._damaged(answer)
        if what == "sums" and self.damage == "drift":
            return [(part, copy, one + 1, two) for part, copy, one, two in answer]
        return answer

    def _damaged(self, wire):
        from megatron_fapo.weight_sync.mapped import Exposure

        exposure = Exposure.from_wire(wire)
        (memory,) = exposure.memories
        if self.damage == "bytes":
            self.source._exposer._mirrors[self.source._exposer._turn]._data[3] ^= 1
        if self.damage == "gone":
            self.source._exposer.close()
        if self.damage == "short":
            exposure = replace(exposure, memories=((*memory[:-1], memory[-1] + 4096),))
        if self.damage == "host":
            exposure = replace(exposure, host="elsewhere")
        if self.damage == "nothing":
            exposure = replace(exposure, tensors={})
        return exposure.to_wire()


class Ranks:
    """Some of them, with what `Refits` asks of the policy."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self.handles = handles

    async def _all(self, what: str, *args: Any, of: Sequence[int] | None = None) -> list[Any]:
        import asyncio

        handles = self.handles if of is None else [self.handles[i] for i in of]
        return await asyncio.gather(*(getattr(handle, what).remote(*args) for handle in handles))

    places = property(lambda self: [("", "")] * len(self.handles))

    async def source_indexes(self) -> list[str]:
        return await self._all("source_index")

    async def take_shares(self, shares: Sequence[str]) -> list[int]:
        return [(await self._all("take_share", share, of=[i]))[0] for i, share in enumerate(shares)]

    async def open_group(self, rank: int) -> Any:
        return (await self._all("open_group", "127.0.0.1", of=[rank]))[0]

    async def weights(self, what: str, ranks: Sequence[int], *args: Any) -> list[Any]:
        import ray.exceptions

        try:
            return await self._all("weights", what, *args, of=ranks)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None

    async def join(self, ranks: Sequence[int], store: Any, members: Any, timeout_s: float) -> None:
        await self.weights("join", ranks, store, members, "127.0.0.1", timeout_s)


@pytest.fixture(scope="module")
def ranks(local_ray):
    """Two policy processes."""
    handles = [local_ray.remote(Rank).options(num_cpus=0).remote() for _ in range(2)]
    yield handles
    for handle in handles:
        local_ray.kill(handle)


def refit(engine, ranks, which, version, *, refits=None, config=None, **options):
    """Put one of the two checkpoints into the engine, each rank giving its share."""
    import ray

    checkpoint = engine.checkpoints[which]
    given = [options if i == len(ranks) - 1 else {} for i in range(len(ranks))]  # the last one does what is wrong
    ray.get([rank.hold.remote(checkpoint, i, len(ranks), **given[i]) for i, rank in enumerate(ranks)])
    if refits is None:
        refits = Refits(
            Ranks(ranks), engine.pool, WeightSyncConfig(**{"bucket_mb": 1, "timeout_s": 60} | (config or {}))
        )
    return run(refits.refit(version))


@pytest.fixture
def first_again(engine, ranks):
    """Leaves the engine with the weights that it started from."""
    yield
    refit(engine, ranks[:1], 0, 0)


def exported(engine, path):
    run(_export(engine, path))
    return load_file(path)


async def _export(engine, path):
    await engine.handle.export_weights.remote(str(path))


@pytest.mark.usefixtures("first_again")
def test_refit_serves_exactly_the_other_checkpoint(engine, ranks, tmp_path):
    metrics = refit(engine, ranks[:1], 1, 7)
    assert run(engine.pool.versions()) == [7]
    assert (
        metrics["weight_sync/bytes"]
        == metrics["weight_sync/node_bytes"]
        == sum(t.nbytes for t in load_file(engine.checkpoints[1] / "model.safetensors").values())
    )
    assert metrics["weight_sync/bytes"] > 2**20, "the test means to need several rounds"
    assert metrics["weight_sync/total_s"] > metrics["weight_sync/load_s"] > 0
    held, sent = exported(engine, tmp_path / "held"), load_file(engine.checkpoints[1] / "model.safetensors")
    assert held.keys() == sent.keys()
    assert [name for name in sent if not torch.equal(held[name], sent[name])] == []
    sample = next(iter(engine.generate(make_prompts(1), n=1).values()))
    assert sample.weight_version == 7
    expected = reference_logprobs(engine.checkpoints[1], sample, 1.0)
    torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=2e-5, rtol=0)


def test_refitted_engine_equals_one_that_loaded_the_checkpoint(engine, ranks):
    """Back to the first weights: every token and every bit of every log-probability as after the start from disk."""
    refit(engine, ranks[:1], 1, 1)
    assert {s.token_ids for s in engine.standard_run().values()} != {s.token_ids for s in engine.first_run.values()}
    refit(engine, ranks[:1], 0, 0)
    assert engine.standard_run() == engine.first_run


@pytest.mark.usefixtures("first_again")
@pytest.mark.parametrize("link", ["map", "message"])
def test_two_ranks_give_side_by_side(engine, ranks, tmp_path, link):
    refit(engine, ranks, 1, 3, config={"node_link": link})
    held, sent = exported(engine, tmp_path / "held"), load_file(engine.checkpoints[1] / "model.safetensors")
    assert all(torch.equal(held[name], sent[name]) for name in sent)


MISSING = "model.layers.2.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leave_out": MISSING}, f"no source holds {MISSING}"),
        ({"damage": "unknown"}, r"no target wants model\.layers\.9\.mlp\.up_proj\.weight"),
        ({"damage": "shape"}, r"model\.norm\.weight has shape \(64,\) in sources"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_another_model_is_refused_and_the_engine_goes_on_serving(engine, ranks, options, message):
    with pytest.raises(RefitError, match=message):
        refit(engine, ranks[:1], 1, 5, **options)
    assert run(engine.pool.versions()) == [0]


def stale(engine):
    with pytest.raises(StaleEngineError, match="stale"):
        run(engine.pool.versions())
    with pytest.raises(StaleEngineError, match="serves nothing"):
        engine.generate(make_prompts(1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("bytes", "arrived at worker 0 with other bytes than were given"),
        ("drift", "arrived at worker 0 with other bytes than were given"),
        ("gone", "has its policy rank ended|was given back before"),
        ("short", "bytes where .* were announced"),
        ("host", "another node"),
        ("nothing", r"tensors are not complete: model\.embed_tokens\.weight"),
    ],
)
def test_failed_refit_leaves_the_engine_stale_and_a_retry_works(engine, ranks, damage, message):
    refits = Refits(Ranks(ranks[:1]), engine.pool, WeightSyncConfig(timeout_s=60))
    with pytest.raises(RefitError, match=message):
        refit(engine, ranks[:1], 1, 5, refits=refits, damage=damage)
    stale(engine)
    refit(engine, ranks[:1], 0, 0, refits=refits)  # by the same plan
    assert engine.standard_run() == engine.first_run


@pytest.mark.parametrize("step", ["refit_begin", "refit_pull", "refit_exchange", "refit_finish", "reset"])
def test_whatever_breaks_in_the_engine_it_is_stale_and_a_retry_works(engine, ranks, step):
    link = "message" if step == "refit_exchange" else "map"
    refits = Refits(Ranks(ranks[:1]), engine.pool, WeightSyncConfig(timeout_s=60, node_link=link))
    run(_ask(engine, "break_at", step))
    with pytest.raises(RefitError, match=r"broke|prefix cache could not be reset"):
        refit(engine, ranks[:1], 1, 5, refits=refits)
    run(_ask(engine, "break_at", ""))
    stale(engine)
    refit(engine, ranks[:1], 0, 0, refits=refits)
    assert engine.standard_run() == engine.first_run


def test_a_rank_that_dies_while_it_sends_is_not_waited_for(engine, ranks, local_ray):
    import time

    victim = local_ray.remote(Rank).options(num_cpus=0).remote()
    began = time.monotonic()
    with pytest.raises(local_ray.exceptions.RayActorError):
        refit(engine, [ranks[0], victim], 1, 5, config={"node_link": "message"}, damage="die")
    assert time.monotonic() - began < 30, "the time-out was waited for"
    stale(engine)
    refit(engine, ranks[:1], 0, 0)
    assert engine.standard_run() == engine.first_run


async def _ask(engine, method, *args):
    return await getattr(engine.handle, method).remote(*args)


def test_no_refit_under_samples_in_flight(engine, ranks):
    async def main():
        import ray

        stream = engine.stream(make_prompts(8), n=4, max_tokens=300)
        await anext(stream)
        ray.get(ranks[0].hold.remote(engine.checkpoints[0], 0, 1))
        with pytest.raises(RefitError, match="in flight"):
            await Refits(Ranks(ranks[:1]), engine.pool, WeightSyncConfig()).refit(2)
        rest = [sample async for sample in stream]
        assert len(rest) == 31
        assert await engine.pool.versions() == [0]

    run(main())


def test_an_engine_that_slept_serves_after_a_refit_and_not_before(engine, ranks):
    """The turns of a colocated engine: asleep, weights, refit, KV cache. On CPUs the memory stays; the rules do not."""
    assert engine.facts["frees_memory"] is False
    run(engine.pool.sleep())
    with pytest.raises(StaleEngineError, match="asleep, without kv_cache and weights"):
        engine.generate(make_prompts(1), n=1)
    run(engine.pool.wake(["weights"]))
    with pytest.raises(StaleEngineError, match="asleep, without kv_cache"):
        engine.generate(make_prompts(1), n=1)
    refit(engine, ranks[:1], 0, 0)
    run(engine.pool.wake(["kv_cache"]))
    assert engine.standard_run() == engine.first_run
    # Awake but not refitted: its weights are gone where memory is freed, so it serves nowhere.
    run(engine.pool.sleep())
    run(engine.pool.wake(["weights", "kv_cache"]))
    with pytest.raises(StaleEngineError, match="is stale"):
        engine.generate(make_prompts(1), n=1)
    refit(engine, ranks[:1], 0, 0)
