"""SGLang's `/generate` in terms of vLLM's `/v1/completions`: pure. Functions written for SGLang servers ask so.

Anything that has no counterpart is refused by name: a setting that is silently left out changes what is judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What holds unless the request says otherwise; vLLM would take the checkpoint's own sampling defaults.
_DEFAULTS = {"max_tokens": 128, "temperature": 1.0, "top_p": 1.0, "top_k": -1}
_NAMES = {
    each: each
    for each in (
        *("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"),
        *("stop", "stop_token_ids", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens"),
    )
} | {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "no_stop_trim": "include_stop_str_in_output",
    "sampling_seed": "seed",
}
_WITHOUT_EFFECT = {"n": 1, "stream": False, "return_logprob": False, "return_text_in_logprobs": False}


class NotSupportedError(ValueError):
    """The request has no counterpart; says why."""


def to_completion(request: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a completion request, without `model`."""
    request = {name: value for name, value in request.items() if value is not None and name != "rid"}
    sampling = dict(request.pop("sampling_params", {}))
    prompts = [request.pop(name) for name in ("text", "input_ids") if name in request]
    if len(prompts) != 1 or not _is_one(prompts[0]):
        raise NotSupportedError("/generate takes one prompt here: `text`, a string, or `input_ids`, a list of integers")
    body: dict[str, Any] = {**_DEFAULTS, "prompt": prompts[0], "return_token_ids": True}
    unknown = [name for name, value in request.items() if value != _WITHOUT_EFFECT.get(name)]
    for name, value in sampling.items():
        if value is None or value == _WITHOUT_EFFECT.get(name):
            continue
        if name not in _NAMES:
            unknown.append(f"sampling_params.{name}")
        else:
            body[_NAMES[name]] = value
    if unknown:
        raise NotSupportedError(f"/generate has no counterpart here of {', '.join(unknown)}: leave it out")
    return body


def from_completion(reply: Mapping[str, Any]) -> dict[str, Any]:
    """What `/generate` answers. Raises ValueError when the server is not one that names its tokens, as vLLM does."""
    choice = reply["choices"][0]
    if choice.get("token_ids") is None:
        raise ValueError("the server's completion has no token_ids, which callers of /generate read: it must be vLLM")
    usage, reason = reply.get("usage") or {}, choice.get("finish_reason")
    tokens = len(choice["token_ids"])
    ended = {"type": reason, "length": tokens} if reason == "length" else {"type": reason}
    if choice.get("stop_reason") is not None:
        ended["matched"] = choice["stop_reason"]
    return {
        "text": choice["text"],
        "output_ids": choice["token_ids"],
        "meta_info": {
            "id": reply.get("id"),
            "finish_reason": ended,
            "prompt_tokens": usage.get("prompt_tokens"),
            "completion_tokens": tokens,
        },
    }


def _is_one(prompt: Any) -> bool:
    return isinstance(prompt, str) or (
        isinstance(prompt, list) and len(prompt) > 0 and all(type(token) is int for token in prompt)
    )
