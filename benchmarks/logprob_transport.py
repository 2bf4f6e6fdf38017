"""What vLLM's messages from its core to the engine's actor cost, with each token's log-probability and without.

    python benchmarks/logprob_transport.py [--sequences 512]

One message is what a decoding step of so many sequences gives. CPU time, microseconds a token: cutting the step's
log-probabilities into requests, packing the message (both in vLLM's core), unpacking it (in the actor). Medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import LogprobsLists
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

ROUNDS = 30


def microseconds(work: Callable[[], Any], tokens: int) -> float:
    """CPU time of one call, for each token."""
    times = []
    for _ in range(ROUNDS):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return statistics.median(times) / tokens * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=512)
    n = parser.parse_args().sequences
    step = LogprobsLists(np.arange(n)[:, None], np.full((n, 1), -1.5, np.float32), np.arange(n), None)
    encoder, decoder = MsgpackEncoder(), MsgpackDecoder(EngineCoreOutputs)
    print(f"{n} sequences   cut   pack  unpack   microseconds a token")
    for name, cut in (("with", lambda: [step.slice_request(i, 1) for i in range(n)]), ("without", lambda: [None] * n)):
        outputs = [EngineCoreOutput(f"sample-{i}", [i], new_logprobs=each) for i, each in enumerate(cut())]
        message = EngineCoreOutputs(outputs=outputs)
        packed = encoder.encode(message)
        rows = (cut, lambda m=message: encoder.encode(m), lambda p=packed: decoder.decode(p))
        print(f"{name:<13}" + "".join(f"{microseconds(work, n):6.1f}" for work in rows))


if __name__ == "__main__":
    main()
