"""Log-probabilities of the policy against transformers on a real checkpoint: how far apart, in float32 and bfloat16.

    python benchmarks/logprob_agreement.py --model DIR --data FILE.jsonl [--samples 16]

Rows of FILE have `question` and `answer`; the answer's tokens are compared, packed into micro-batches on our side, one
unpadded sequence at a time on the other. Differences are absolute, in nats, over all response tokens. The last row is
transformers against itself: what bfloat16 alone does.
"""

from __future__ import annotations

import argparse
import json
import socket
from pathlib import Path

import torch

from megatron_fapo.config.algorithm import AlgorithmConfig
from megatron_fapo.config.policy import PolicyConfig
from megatron_fapo.device import choose_device
from megatron_fapo.policy.batch import TrainSample
from megatron_fapo.policy.packing import CostModel, schedule_for
from megatron_fapo.policy.parallel import Rank
from megatron_fapo.policy.worker import PolicyWorker

DTYPES = ("float32", "bfloat16")


def read_samples(model: str, data: Path, count: int) -> list[TrainSample]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()[:count]]
    return [
        TrainSample(tuple(tokenizer.encode(row["question"] + "\n")), tuple(tokenizer.encode(row["answer"])))
        for row in rows
    ]


def of_policy(model: str, samples: list[TrainSample], dtype: str) -> torch.Tensor:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    cfg = PolicyConfig(model_path=model, micro_batch_tokens=4096)
    device = choose_device("auto")
    worker = PolicyWorker(Rank(0, 1, "127.0.0.1", port), cfg, AlgorithmConfig(), device=device, dtype=dtype, seed=0)
    plan = schedule_for(cfg.parallel, CostModel.from_shape(worker.shape), [s.tokens for s in samples], 4096)
    (packs,) = plan.micro_batches
    results = worker.logprobs([[samples[i] for i in pack] for pack in packs])
    assert results is not None
    found = {i: values for pack, part in zip(packs, results, strict=True) for i, values in zip(pack, part, strict=True)}
    worker.close()
    return torch.tensor([x for i in range(len(samples)) for x in found[i]])


@torch.no_grad()
def of_transformers(model: str, samples: list[TrainSample], dtype: str) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).to(
        "cuda" if choose_device("auto") == "gpu" else "cpu"
    )
    parts = []
    for s in samples:
        ids = torch.tensor(s.token_ids[None], device=reference.device).long()
        # The softmax in float64: float32's sum over the vocabulary is off by more than the models differ.
        logits = reference(ids).logits[0, len(s.prompt_ids) - 1 : -1].double()
        target = torch.tensor(s.response_ids, device=reference.device).long()
        parts.append(logits.log_softmax(-1).gather(1, target[:, None])[:, 0].cpu())
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="HF checkpoint directory")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=16)
    args = parser.parse_args()
    samples = read_samples(args.model, args.data, args.samples)
    # The policy's CPU backend changes torch for good, so transformers computes first.
    theirs = {dtype: of_transformers(args.model, samples, dtype) for dtype in DTYPES}
    ours = {dtype: of_policy(args.model, samples, dtype) for dtype in DTYPES}
    pairs = {
        "policy float32 - transformers float32": ours["float32"] - theirs["float32"],
        "policy bfloat16 - transformers bfloat16": ours["bfloat16"] - theirs["bfloat16"],
        "policy bfloat16 - transformers float32": ours["bfloat16"] - theirs["float32"],
        "transformers bfloat16 - transformers float32": theirs["bfloat16"] - theirs["float32"],
    }
    for name, difference in pairs.items():
        apart = difference.abs()
        row = {"pair": name, "tokens": len(apart), "max": float(apart.max()), "mean": float(apart.mean())}
        print(json.dumps(row))


if __name__ == "__main__":
    main()
