"""A real vLLM engine: what it samples, how it streams, and that it can be repeated to the last bit."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch

from megatron_fapo.errors import UserError
from tests.rollout.conftest import MAX_MODEL_LEN, make_prompts, run


def reference_logprobs(checkpoint, sample, temperature):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokens = torch.tensor([sample.prompt.token_ids + sample.token_ids])
    with torch.no_grad():
        logits = model(tokens).logits[0, len(sample.prompt.token_ids) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_sampling_distribution(engine, temperature):
    samples = engine.generate(make_prompts(3), n=2, temperature=temperature)
    for sample in samples.values():
        expected = reference_logprobs(engine.checkpoints[0], sample, temperature)
        torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=2e-5, rtol=0)


def test_a_second_run_is_equal_to_the_last_bit(engine):
    again = engine.standard_run()
    assert again == engine.first_run
    assert len({sample.token_ids for sample in again.values()}) == len(again), "each sample has a seed of its own"


def test_a_rollout_does_not_depend_on_the_ones_before(engine):
    """What is in the prefix cache is not read again: a batch of 2 tokens in place of 130 rounds differently."""
    prompt = replace(make_prompts(1)[0], prompt_id="test/long", token_ids=make_prompts(1)[0].token_ids * 13)
    first = engine.generate([prompt], n=1)
    assert engine.generate([prompt], n=1) == first


def test_every_sample_once_with_identity_and_version(engine):
    samples = engine.first_run
    assert set(samples) == {(p.prompt_id, 0, i) for p in make_prompts(12) for i in range(4)}
    for sample in samples.values():
        assert len(sample.logprobs) == len(sample.token_ids) <= 48
        assert sample.weight_version == 0
        assert all(logprob <= 0 for logprob in sample.logprobs)


def test_finish_reasons_and_text(engine):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(engine.checkpoints[0])
    reasons = set()
    for sample in engine.generate(make_prompts(16), n=8, max_tokens=100).values():
        reasons.add(sample.finish_reason)
        if sample.finish_reason == "stop":
            assert sample.token_ids[-1] == tokenizer.eos_token_id
        else:
            assert len(sample.token_ids) == 100
        assert tokenizer.eos_token_id not in sample.token_ids[:-1]
        assert sample.text == tokenizer.decode(sample.token_ids, skip_special_tokens=True)
    assert reasons == {"stop", "length"}


def test_samples_arrive_while_others_still_generate(engine):
    async def main():
        lengths, in_flight_at_first = [], None
        async for sample in engine.stream(make_prompts(16), n=8, max_tokens=100):
            if in_flight_at_first is None:
                in_flight_at_first = await engine.handle.in_flight.remote()
            lengths.append(len(sample.token_ids))
        return lengths, in_flight_at_first

    lengths, in_flight = run(main())
    assert in_flight > 0
    # All started together, so a sample that is shorter by far than another arrives before it.
    assert lengths.index(min(lengths)) < lengths.index(max(lengths))
    assert lengths[-1] == max(lengths)


def test_a_closed_stream_aborts_its_requests(engine):
    async def main():
        stream = engine.pool.generate(make_prompts(16), [0] * 16, n=8, sampling=_sampling(), max_tokens=400)
        await anext(stream)
        await stream.aclose()
        for _ in range(100):
            if not await engine.handle.in_flight.remote():
                return
            await asyncio.sleep(0.05)
        pytest.fail("the engine still generates for a stream that was closed 5 s ago")

    run(main())
    assert engine.standard_run() == engine.first_run


def test_paused_engine_holds_its_requests(engine):
    async def main():
        await engine.pool.pause()
        stream = engine.pool.generate(make_prompts(1), [0], n=1, sampling=_sampling(), max_tokens=8)
        first = asyncio.ensure_future(anext(stream))
        _, waiting = await asyncio.wait([first], timeout=1.0)
        assert waiting
        await engine.pool.resume()
        assert (await first).key == ("test/0", 0, 0)
        await stream.aclose()

    run(main())


def test_prompt_that_does_not_fit_is_named(engine):
    long = replace(make_prompts(1)[0], prompt_id="test/long", token_ids=make_prompts(1)[0].token_ids * 40)
    with pytest.raises(UserError, match=rf"test/long has 400 tokens.*{MAX_MODEL_LEN}"):
        engine.generate([*make_prompts(1), long], max_tokens=200)


def _sampling():
    from megatron_fapo.config.rollout import SamplingConfig

    return SamplingConfig()
