"""Refits of a real vLLM engine from another process: whole, proven, and never half served."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from megatron_fapo.weight_sync.protocol import RefitError, StaleEngineError
from tests.rollout.conftest import make_prompts, run
from tests.rollout.test_engine import reference_logprobs


class Rank:
    """A policy rank as far as a refit sees it: another process that has tensors."""

    def __init__(self):
        from megatron_fapo.weight_sync.sender import WeightSender

        self.sender = WeightSender(bucket_mb=1)

    def open(self, checkpoint, stage=0, stages=1, verify=True, leave_out=(), damage=None):
        from dataclasses import replace

        tensors = load_file(checkpoint / "model.safetensors")
        # The worst order: what vLLM fuses into one tensor comes in different buckets, far apart.
        names = sorted(tensors, key=lambda name: name.split(".")[-2:])
        chosen = {name: tensors[name] for name in names[stage::stages] if name not in leave_out}
        if damage == "unknown":
            chosen["model.layers.9.mlp.up_proj.weight"] = torch.zeros(4, 4)
        if damage == "shape":
            chosen["model.norm.weight"] = torch.zeros(64)
        self.sender.open(chosen.items(), owner=True, verify=verify)
        self.alter = lambda bucket: bucket
        if damage == "bytes":
            self.alter = self._damage_bytes
        if damage == "gone":
            self.alter = lambda bucket: self.sender.close() or bucket
        if damage == "short":
            self.alter = lambda bucket: replace(bucket, nbytes=bucket.nbytes + 4096)
        if damage == "host":
            self.alter = lambda bucket: replace(bucket, host="elsewhere")

    def _damage_bytes(self, bucket):
        self.sender._buffers[self.sender._turn].data[bucket.entries[-1].offset + 3] ^= 1
        return bucket

    def next(self):
        bucket = self.sender.next()
        return bucket and self.alter(bucket)

    def close(self):
        self.sender.close()


@pytest.fixture(scope="module")
def ranks(local_ray):
    """Two policy processes."""
    handles = [local_ray.remote(Rank).options(num_cpus=0).remote() for _ in range(2)]
    yield handles
    for handle in handles:
        local_ray.kill(handle)


def refit(engine, ranks, which, version, **options):
    """Put one of the two checkpoints into the engine, each rank sending its stage."""
    import ray

    stages = len(ranks)
    checkpoint = engine.checkpoints[which]
    ray.get([rank.open.remote(checkpoint, stage, stages, **options) for stage, rank in enumerate(ranks)])
    return run(engine.pool.refit([lambda rank=rank: rank.next.remote() for rank in ranks], version, timeout_s=60))


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
    assert metrics["weight_sync/buckets"] > 1, "the test means to cross bucket borders within layers"
    assert metrics["weight_sync/bytes"] == sum(
        t.nbytes for t in load_file(engine.checkpoints[1] / "model.safetensors").values()
    )
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
def test_two_stages_send_side_by_side(engine, ranks, tmp_path):
    refit(engine, ranks, 1, 3)
    held, sent = exported(engine, tmp_path / "held"), load_file(engine.checkpoints[1] / "model.safetensors")
    assert all(torch.equal(held[name], sent[name]) for name in sent)


MISSING = "model.layers.2.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leave_out": (MISSING,)}, f"1 of 47 tensors were never sent: {MISSING}"),
        ({"damage": "unknown"}, "model.layers.9.mlp.up_proj.weight is not in the engine's checkpoint"),
        ({"damage": "shape"}, "model.norm.weight has shape"),
        ({"damage": "bytes"}, "arrived with other bytes than were sent"),
        ({"damage": "gone"}, "has its policy rank ended|was given back before"),
        ({"damage": "short"}, "bytes where its manifest says"),
        ({"damage": "host"}, "another node"),
    ],
    ids=["missing", "unknown", "shape", "bytes", "gone", "short", "host"],
)
def test_failed_refit_leaves_the_engine_stale_and_a_retry_works(engine, ranks, options, message):
    with pytest.raises(RefitError, match=message):
        refit(engine, ranks[:1], 1, 5, **options)
    with pytest.raises(StaleEngineError, match="stale"):
        run(engine.pool.versions())
    with pytest.raises(StaleEngineError, match="serves nothing"):
        engine.generate(make_prompts(1))
    refit(engine, ranks[:1], 0, 0)
    assert engine.standard_run() == engine.first_run


def test_no_refit_under_samples_in_flight(engine, ranks):
    async def main():
        import ray

        stream = engine.stream(make_prompts(8), n=4, max_tokens=300)
        await anext(stream)
        ray.get(ranks[0].open.remote(engine.checkpoints[0]))
        with pytest.raises(RefitError, match="in flight"):
            await engine.pool.refit([lambda: ranks[0].next.remote()], 2, timeout_s=60)
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
