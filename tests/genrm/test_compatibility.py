"""compute_score functions as the recipe's users have them run unchanged in the real reward loop, through the gateway;
and where they take a failure for a sound solution, the sample is unscored."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web

from megatron_fapo.config.genrm import GenRMConfig
from megatron_fapo.config.reward import OverlongConfig, RewardConfig
from megatron_fapo.data.records import Sample
from megatron_fapo.data.tokenizer import build_testbed_tokenizer
from megatron_fapo.errors import UserError
from megatron_fapo.genrm.membership import PoolEmptyError
from megatron_fapo.genrm.reward_loop import RewardLoop
from megatron_fapo.genrm.sglang_api import NotSupportedError, from_completion, to_completion
from megatron_fapo.genrm.user_function import load_tokenizer
from tests.faults.fake_server import Behaviour, FakeServer, Script, body, breaks_off, hangs, says, status
from tests.genrm import recipe_functions
from tests.genrm.samples import make_sample

FLAWED = "The second step is wrong. \\boxed{1}"
SOUND = "All is well. \\boxed{-1}"


@pytest.fixture(scope="module")
def genrm(tmp_path_factory: pytest.TempPathFactory) -> GenRMConfig:
    path = tmp_path_factory.mktemp("tokenizer")
    build_testbed_tokenizer(path)
    return GenRMConfig(model_path=str(path), deadline_s=20.0, request_timeout_s=10.0, max_attempts=2)


def reward(function: str, **fields: object) -> RewardConfig:
    path = f"{Path(recipe_functions.__file__)}:{function}"
    return RewardConfig(compute_score=path, verifier_processes=1, overlong=OverlongConfig(enabled=False), **{**fields})


def sample(text: str = "\\boxed{2}", index: int = 0, split: str = "train") -> Sample:
    made = make_sample(text, index=index)
    info = {"split": split, "question": made.prompt.question, "index": index}
    return replace(made, prompt=replace(made.prompt, extra_info=info))


def completes(genrm: GenRMConfig, text: str, finish_reason: str = "stop", *, with_ids: bool = True) -> Behaviour:
    """vLLM's completion of a prompt of token ids or text."""
    tokenizer = load_tokenizer(genrm.model_path or "")

    async def behave(_server: FakeServer, _request: web.Request, _body: dict) -> web.StreamResponse:
        ids = tokenizer.encode(text)
        choice = {"index": 0, "text": text, "finish_reason": finish_reason, "stop_reason": None}
        choice |= {"token_ids": ids} if with_ids else {}
        usage = {"prompt_tokens": 9, "completion_tokens": len(ids)}
        return web.json_response({"id": "cmpl-1", "choices": [choice], "usage": usage})

    return behave


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not within 10 s")


def always(behaviour: Behaviour) -> Script:
    return lambda _body, _number: behaviour


def run(
    scripts: list[Script],
    reward: RewardConfig,
    genrm: GenRMConfig,
    test: Callable[[RewardLoop, list[FakeServer]], Awaitable[None]],
    context: int = 32768,
) -> None:
    async def main() -> None:
        servers = [await FakeServer(script, context).start() for script in scripts]
        try:
            async with RewardLoop(reward, genrm, [server.url for server in servers], max_response_tokens=10) as loop:
                await test(loop, servers)
                assert loop._gateway is not None
                assert loop._gateway._visits == {}
            assert [server.open for server in servers] == [0] * len(servers)
        finally:
            for server in servers:
                await server.stop()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


@pytest.mark.parametrize(("critique", "expected"), [(FLAWED, 0.0), (SOUND, 1.0)])
def test_token_ids_to_sglangs_generate(genrm: GenRMConfig, critique: str, expected: float) -> None:
    async def test(loop: RewardLoop, servers: list[FakeServer]) -> None:
        score = await loop.score(sample())
        assert (score.reward, score.correct, score.prediction) == (expected, True, "2")
        assert score.extra["is_flawed_positive"] is (expected == 0.0)
        (asked,) = servers[0].bodies
        tokenizer = load_tokenizer(genrm.model_path or "")
        prompt = tokenizer.decode(asked["prompt"])
        assert "What is 1+1? (0)" in prompt
        assert "\\boxed{2}" in prompt
        assert {k: asked[k] for k in ("model", "max_tokens", "temperature", "top_p", "top_k")} == {
            "model": "genrm", "max_tokens": 200, "temperature": 1.0, "top_p": 1.0, "top_k": -1,
        }  # fmt: skip
        (request,) = score.judging
        assert (request.server, request.outcome, request.text) == (servers[0].url, "answered", critique)
        assert request.completion_tokens == len(tokenizer.encode(critique))
        for other in (sample("\\boxed{3}"), sample(split="test")):
            score = await loop.score(other)
            assert score.judging == ()
            assert "critique_length" not in score.extra, "keys may differ between samples"
        assert len(servers[0].bodies) == 1, "the function decides what is judged"
        values = loop.metrics()
        assert (values["genrm/called"], values["genrm/answered"], values["genrm/servers_alive"]) == (1, 1, 1)

    run([always(completes(genrm, critique))], reward("by_generate"), genrm, test)


def test_chat_completions_under_any_model_name_and_keywords_of_the_configuration(genrm: GenRMConfig) -> None:
    async def test(loop: RewardLoop, servers: list[FakeServer]) -> None:
        score = await loop.score(sample())
        assert (score.reward, score.extra["critique"]) == (0.0, FLAWED)
        assert servers[0].bodies[0]["model"] == "genrm"
        assert servers[0].bodies[0]["max_tokens"] == 16384

    function = reward("by_chat", compute_score_kwargs={"keep_critique": True})
    run([always(says(FLAWED))], function, genrm, test)


def test_synchronous_functions_ask_from_their_worker_process(genrm: GenRMConfig) -> None:
    async def test(loop: RewardLoop, servers: list[FakeServer]) -> None:
        score = await loop.score(sample())
        assert (score.reward, score.extra["ended"]) == (0.0, "stop")
        assert servers[0].bodies[0]["stop"] == ["###"]
        assert servers[0].bodies[0]["temperature"] == 0.6
        assert score.judging[0].text == FLAWED

    run([always(completes(genrm, FLAWED))], reward("synchronous"), genrm, test)


FAULTS = {
    "500": (status(500), "genrm_unreachable"),
    "context": (status(400, "maximum context length is 9 tokens"), "genrm_context"),
    "refused": (status(422, "no such field"), "genrm_refused"),
    "broken": (breaks_off(), "genrm_unreachable"),
    "garbage": (body("{"), "genrm_unreachable"),
    "hangs": (hangs(), "genrm_unreachable"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("function", ["by_generate", "by_chat", "by_chat_with_retries"])
def test_what_functions_take_for_sound_is_unscored(genrm: GenRMConfig, function: str, fault: str) -> None:
    async def test(loop: RewardLoop, _servers: list[FakeServer]) -> None:
        score = await loop.score(sample())
        assert (score.reward, score.unscored_reason) == (None, FAULTS[fault][1])
        assert len(score.judging) >= 1
        assert all(request.outcome != "answered" for request in score.judging)

    quick = genrm.model_copy(update={"request_timeout_s": 0.3})
    run([always(FAULTS[fault][0])] * 2, reward(function), quick, test)


def test_completions_without_token_ids_are_no_answers_to_generate(genrm: GenRMConfig) -> None:
    async def test(loop: RewardLoop, _servers: list[FakeServer]) -> None:
        score = await loop.score(sample())
        assert score.unscored_reason == "genrm_unreachable"
        assert "token_ids" in score.extra["unscored_detail"]

    run([always(completes(genrm, SOUND, with_ids=False))], reward("by_generate"), genrm, test)


def test_another_server_is_asked_and_the_function_hears_nothing_of_it(genrm: GenRMConfig) -> None:
    async def test(loop: RewardLoop, servers: list[FakeServer]) -> None:
        scores = await asyncio.gather(*(loop.score(sample(index=i)) for i in range(20)))
        assert [score.reward for score in scores] == [0.0] * 20
        assert len(servers[1].bodies) == 20
        kinds = {request.outcome for score in scores for request in score.judging}
        assert kinds == {"http_5xx", "answered"}

    run([always(status(500)), always(says(FLAWED))], reward("by_chat"), genrm, test)


def test_a_request_repeated_by_the_function_counts_and_one_beside_it_does_not(genrm: GenRMConfig) -> None:
    async def test(loop: RewardLoop, _servers: list[FakeServer]) -> None:
        score = await loop.score(sample())
        assert (score.reward, len(score.judging)) == (0.0, 3), "two failed attempts, then the function's own retry"

    patient = genrm.model_copy(update={"max_attempts": 2})
    run([lambda _b, n: status(500) if n < 3 else says(FLAWED)], reward("by_chat_with_retries"), patient, test)

    async def one_of_three_fails(loop: RewardLoop, _servers: list[FakeServer]) -> None:
        score = await loop.score(sample())
        assert (score.reward, score.unscored_reason) == (None, "genrm_refused")

    run([lambda _b, n: status(422) if n == 2 else says(SOUND)], reward("several"), genrm, one_of_three_fails)


def test_a_critique_that_does_not_fit_gets_the_room_that_is_left(genrm: GenRMConfig) -> None:
    def full(asked: dict, _number: int) -> Behaviour:
        if asked.get("max_tokens", 0) + len(asked.get("prompt", "")) > context:
            return status(400, f"This model's maximum context length is {context} tokens")
        return says(FLAWED) if "messages" in asked else completes(genrm, FLAWED)

    context = 250

    async def test(loop: RewardLoop, servers: list[FakeServer]) -> None:
        assert (await loop.score(sample())).reward == 0.0
        assert "max_tokens" not in servers[0].bodies[1]

    run([full], reward("by_chat"), genrm, test, context)

    async def test_ids(loop: RewardLoop, servers: list[FakeServer]) -> None:
        assert (await loop.score(sample())).reward == 0.0
        first, second = servers[0].bodies
        assert first["max_tokens"] == 200
        assert len(second["prompt"]) + second["max_tokens"] == context

    run([full], reward("by_generate"), genrm, test_ids, context)

    async def cut(loop: RewardLoop, _servers: list[FakeServer]) -> None:
        score = await loop.score(sample())
        assert score.unscored_reason == "genrm_context", "the critique ended with the context, not by itself"

    run(
        [lambda b, _n: status(400, "context length is 9") if "max_tokens" in b else says(FLAWED, "length")],
        reward("by_chat"),
        genrm,
        cut,
    )


def test_errors_of_the_function_itself_are_named(genrm: GenRMConfig) -> None:
    async def test(loop: RewardLoop, _servers: list[FakeServer]) -> None:
        score = await loop.score(sample())
        assert score.unscored_reason == "compute_score_error"
        assert "what the author forgot" in score.extra["unscored_detail"]

    run([always(says(SOUND))], reward("explodes"), genrm, test)


def test_waiting_for_the_judge_is_not_on_the_functions_clock(genrm: GenRMConfig) -> None:
    async def test(loop: RewardLoop, _servers: list[FakeServer]) -> None:
        assert (await loop.score(sample())).reward == 0.0

    slow = says(FLAWED, after_s=1.5)
    run([always(slow)], reward("by_chat", verifier_timeout_s=0.5), genrm, test)


def test_an_empty_pool_ends_the_run_and_scores_nothing(genrm: GenRMConfig) -> None:
    async def test(loop: RewardLoop, servers: list[FakeServer]) -> None:
        await servers[0].stop()
        with pytest.raises(PoolEmptyError):
            await loop.score(sample())
        await servers[0].start()

    run([always(says(SOUND))], reward("by_chat"), genrm.model_copy(update={"pool_empty_timeout_s": 0.5}), test)


def test_requests_at_a_server_are_bounded_and_those_of_a_cancelled_function_are_taken_back(genrm: GenRMConfig) -> None:
    async def test(loop: RewardLoop, servers: list[FakeServer]) -> None:
        asking = [asyncio.create_task(loop.score(sample(index=i))) for i in range(12)]
        await until(lambda: servers[0].open == 4)
        await asyncio.sleep(0.2)
        assert (servers[0].most_open, loop.metrics()["genrm/queued"]) == (4, 8)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await until(lambda: servers[0].open == 0 and loop.metrics()["genrm/queued"] == 0)

    run([always(hangs())], reward("by_chat"), genrm.model_copy(update={"max_concurrent_per_server": 4}), test)


def test_functions_get_what_there_is_and_say_what_they_lack(genrm: GenRMConfig) -> None:
    def loop(function: str, genrm: GenRMConfig, *urls: str, **fields: object) -> RewardLoop:
        return RewardLoop(reward(function, **fields), genrm, urls, max_response_tokens=10)

    url = "http://127.0.0.1:9/v1"
    with pytest.raises(UserError, match=r"reward_router_address.*name the GenRM"):
        loop("by_generate", genrm)
    with pytest.raises(UserError, match=r"set genrm.model_path"):
        loop("by_generate", GenRMConfig(), url)
    assert loop("by_chat", genrm)._gateway is None, "the address has a default"
    assert loop("baseline", GenRMConfig(enabled=False), url)._gateway is None
    assert loop("baseline", genrm, url)._gateway is not None, "**kwargs take all there is"
    own = {"reward_router_address": "elsewhere:1", "reward_model_tokenizer": None}
    assert loop("by_generate", GenRMConfig(enabled=False), compute_score_kwargs=own)._gateway is None


def test_generate_in_terms_of_completions() -> None:
    asked = {
        "input_ids": [1, 2], "stream": False, "rid": "x",
        "sampling_params": {"max_new_tokens": 5, "n": 1, "top_k": 20, "stop": None, "min_new_tokens": 2},
    }  # fmt: skip
    assert to_completion(asked) == {
        "prompt": [1, 2], "max_tokens": 5, "min_tokens": 2, "temperature": 1.0, "top_p": 1.0, "top_k": 20,
        "return_token_ids": True,
    }  # fmt: skip
    for wrong in ({}, {"text": "a", "input_ids": [1]}, {"input_ids": []}, {"text": ["a", "b"]}, {"input_ids": [[1]]}):
        with pytest.raises(NotSupportedError, match="one prompt"):
            to_completion(wrong)
    with pytest.raises(NotSupportedError, match=r"stream, sampling_params\.regex"):
        to_completion({"text": "a", "stream": True, "sampling_params": {"regex": "x"}})
    choice = {"text": "ab", "token_ids": [3, 4], "finish_reason": "length", "stop_reason": None}
    assert from_completion({"id": "c", "choices": [choice], "usage": {"prompt_tokens": 2}}) == {
        "text": "ab",
        "output_ids": [3, 4],
        "meta_info": {
            "id": "c", "finish_reason": {"type": "length", "length": 2}, "prompt_tokens": 2, "completion_tokens": 2,
        },
    }  # fmt: skip
