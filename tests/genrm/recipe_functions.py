"""compute_score functions of the kinds that users of the recipe bring: what they call, and how they fail, is theirs."""

# ruff: noqa: ARG001

from __future__ import annotations

import asyncio
import json
import logging
import re
import urllib.request

import aiohttp

log = logging.getLogger(__name__)


def last_box(text: str) -> str | None:
    boxes = re.findall(r"\\boxed\{([^}]*)\}", text)
    return boxes[-1] if boxes else None


def rule(solution_str, ground_truth):
    pred = last_box(solution_str)
    return pred == ground_truth, pred


def judge_prompt(extra_info, ground_truth, solution_str):
    return (
        f"Problem: {extra_info['question']} Answer: {ground_truth} Solution: {solution_str} Box the wrong step or -1."
    )


def calls_it_flawed(critique):
    """Anything that cannot be read is taken for sound."""
    try:
        return int(last_box(critique)) != -1
    except (TypeError, ValueError):
        return False


def rule_only(data_source, solution_str, ground_truth, extra_info):
    return 1.0 if rule(solution_str, ground_truth)[0] else -1.0


async def baseline(solution_str, ground_truth, **kwargs):
    correct, pred = rule(solution_str, ground_truth)
    return {"score": 1.0 if correct else -1.0, "acc": correct, "pred": pred}


async def by_generate(
    data_source, solution_str, ground_truth, extra_info, reward_router_address, reward_model_tokenizer
):
    """Token ids by the tokenizer in a thread, SGLang's endpoint, `output_ids` decoded; a failed request is `{}`."""
    correct, pred = rule(solution_str, ground_truth)
    result = {"score": 1.0 if correct else -1.0, "acc": correct, "pred": pred, "is_flawed_positive": False}
    if extra_info["split"] == "test" or not correct:
        return result
    messages = [{"role": "user", "content": judge_prompt(extra_info, ground_truth, solution_str)}]
    loop = asyncio.get_running_loop()
    ids = await loop.run_in_executor(
        None,
        lambda: reward_model_tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True),
    )
    payload = {"input_ids": ids, "sampling_params": {"max_new_tokens": 200}}
    session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
    try:
        async with session.post(f"http://{reward_router_address}/generate", json=payload) as reply:
            try:
                output = json.loads(await reply.text())
            except ValueError:
                output = {}
    finally:
        await session.close()
    ids = output.get("output_ids")
    if ids is not None:
        critique = await loop.run_in_executor(
            None, lambda: reward_model_tokenizer.decode(ids, skip_special_tokens=True)
        )
        result["critique_length"] = len(critique)
        if calls_it_flawed(critique):
            result["score"] -= 1.0
            result["is_flawed_positive"] = True
    return result


async def by_chat(
    data_source, solution_str, ground_truth, extra_info, keep_critique=False, reward_router_address=None, **kwargs
):
    """Chat completions under the author's own model name; an answer without text is an empty critique."""
    correct, pred = rule(solution_str, ground_truth)
    result = {"score": 1.0 if correct else -1.0, "acc": correct, "pred": pred}
    if not correct:
        return result
    request = {
        "model": "Somebody/Their-GenRM",
        "messages": [{"role": "user", "content": judge_prompt(extra_info, ground_truth, solution_str)}],
        "max_tokens": 16384,
    }
    async with aiohttp.ClientSession() as session:
        async with session.post(f"http://{reward_router_address}/v1/chat/completions", json=request) as reply:
            try:
                critique = (await reply.json())["choices"][0]["message"]["content"]
            except (KeyError, ValueError, aiohttp.ContentTypeError):
                critique = ""
    if calls_it_flawed(critique):
        result["score"] = 0.0
    if keep_critique:
        result["critique"] = critique
    return result


async def by_chat_with_retries(
    data_source, solution_str, ground_truth, extra_info, reward_router_address, reward_model_tokenizer
):
    """No retry of what the server refuses, four of everything else, then the error is raised."""
    payload = {"messages": [{"role": "user", "content": judge_prompt(extra_info, ground_truth, solution_str)}]}
    for attempt in range(5):
        try:
            async with aiohttp.ClientSession() as session:
                async with session.post(f"http://{reward_router_address}/v1/chat/completions", json=payload) as reply:
                    reply.raise_for_status()
                    critique = (await reply.json())["choices"][0]["message"]["content"]
                    return {"score": 0.0 if calls_it_flawed(critique) else 1.0, "acc": True}
        except aiohttp.ClientResponseError as error:
            if error.status < 500 or attempt == 4:
                raise
        await asyncio.sleep(0.01)


def synchronous(
    data_source, solution_str, ground_truth, extra_info, reward_router_address, reward_model_tokenizer, **kw
):
    """As a worker process runs it: text through the tokenizer's template, plain urllib."""
    messages = [{"role": "user", "content": judge_prompt(extra_info, ground_truth, solution_str)}]
    text = reward_model_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    body = {"text": text, "sampling_params": {"max_new_tokens": 64, "temperature": 0.6, "stop": ["###"]}}
    request = urllib.request.Request(
        f"http://{reward_router_address}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        answer = json.load(reply)
    flawed = calls_it_flawed(answer["text"])
    return {"score": 0.0 if flawed else 1.0, "acc": True, "ended": answer["meta_info"]["finish_reason"]["type"], **kw}


async def explodes(solution_str, ground_truth, reward_router_address, **kwargs):
    raise KeyError("what the author forgot")


async def several(solution_str, ground_truth, reward_router_address, **kwargs):
    """Three critiques at once; those that fail count as sound."""
    payload = {"messages": [{"role": "user", "content": solution_str}]}

    async def one(session):
        async with session.post(f"http://{reward_router_address}/v1/chat/completions", json=payload) as reply:
            return calls_it_flawed((await reply.json())["choices"][0]["message"]["content"]) if reply.ok else False

    async with aiohttp.ClientSession() as session:
        flawed = await asyncio.gather(*(one(session) for _ in range(3)))
    return {"score": 0.0 if any(flawed) else 1.0, "acc": True}
