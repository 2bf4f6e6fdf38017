"""Demonstrations of the testbed for `fapo warmup`: careless solutions for a policy, worked critiques for a GenRM.

python benchmarks/testbed_demonstrations.py OUT [--rows N] [--seed N]    # OUT/policy.jsonl, OUT/genrm.jsonl
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from megatron_fapo.data.datasets import write_prompts
from megatron_fapo.data.demonstrations import genrm_sft_examples, policy_sft_examples
from megatron_fapo.genrm.prompts import judge_messages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    policy = policy_sft_examples(args.rows, args.seed + 1)
    genrm = genrm_sft_examples(args.rows, args.seed + 2, functools.partial(judge_messages, form="tagged"))
    for name, examples in (("policy", policy), ("genrm", genrm)):
        rows = ({"messages": messages, "response": response} for messages, response in examples)
        write_prompts(args.out / f"{name}.jsonl", rows)


if __name__ == "__main__":
    main()
