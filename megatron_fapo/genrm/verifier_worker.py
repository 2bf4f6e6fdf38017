"""The child process of the verifier: `python -m megatron_fapo.genrm.verifier_worker <pid of the parent>`.

Reads pickled requests from stdin and writes JSON replies to stdout, each after its length: one for each thing that is
asked about a sample, so that what was found is known when the next hangs. Imports nothing heavy before it knows what it
is for. Dies with its parent, in whatever state either is.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

from megatron_fapo.genrm.user_function import (
    COMPUTE_SCORE,
    ROUTER,
    TOKENIZER,
    describe_error,
    load_function,
    load_tokenizer,
    read_score,
)

HEADER_BYTES = 8
RULE_MEMORY_BYTES = 8 << 30
"""Address space of a rule worker: an answer like 10^{10^{10}} must not take the machine's memory with it."""
_PR_SET_PDEATHSIG = 1


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):  # the parent died before the line above
        return
    requests, replies = _take_over_pipes()
    try:
        answers = _handlers(_receive(requests))
        for answer in answers:
            answer(None)  # imports and caches are paid for here, not under the first sample's deadline
    except Exception:
        _send(replies, {"error": traceback.format_exc()})
        return
    _send(replies, {})
    while (request := _receive(requests)) is not None:
        for answer in answers:
            try:
                reply = answer(request)
            except Exception as error:
                reply = {"error": describe_error(error)}
            _send(replies, reply)


def _handlers(setup: dict[str, Any]) -> list[Callable[[Any], dict[str, Any]]]:
    """Request -> reply, one for each reply; the request None is the warm-up."""
    if setup["compute_score"] is None:
        from megatron_fapo.genrm import rules

        _limit_memory()
        warm_up = ("so $\\boxed{\\frac{2}{4}}$", "1/2")

        def handler(name: str) -> Callable[[Any], dict[str, Any]]:
            return lambda request: rules.RULES[name](*(request or warm_up))._asdict()

        return [handler(name) for name in setup["rules"]]

    tokenizer = {} if setup["tokenizer"] is None else {TOKENIZER: load_tokenizer(setup["tokenizer"])}
    given = tokenizer | setup["kwargs"]
    function = load_function(setup["compute_score"], COMPUTE_SCORE, given, (ROUTER,))
    return [lambda request: read_score(function(**request | given))._asdict() if request else {}]


def _take_over_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The two pipes, moved away from fds 0 and 1: a user's print() must not speak the protocol."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return requests, replies


def _limit_memory() -> None:
    import logging

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeouts are off
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = RULE_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(RULE_MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _receive(pipe: BinaryIO) -> Any:
    header = pipe.read(HEADER_BYTES)
    return pickle.loads(pipe.read(int.from_bytes(header, "big"))) if header else None


def _send(pipe: BinaryIO, reply: dict[str, Any]) -> None:
    payload = json.dumps(reply).encode()
    pipe.write(len(payload).to_bytes(HEADER_BYTES, "big") + payload)
    pipe.flush()


if __name__ == "__main__":
    main()
