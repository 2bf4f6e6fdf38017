"""A run directory as a real run writes it, from numbers that are known."""

from __future__ import annotations

import math
import random
from pathlib import Path

from megatron_fapo.config.load import load_config
from megatron_fapo.config.show import dump_yaml
from megatron_fapo.data.records import Prompt, Sample, SampleKey, Score, ScoredSample, Verdict
from megatron_fapo.observe.metrics import MetricsWriter
from megatron_fapo.observe.samples import write_samples

PHASES = {"rollout": 6.0, "score tail": 1.0, "logprobs": 1.5, "train": 4.0, "refit": 0.5, "checkpoint": 0.3}


def make_sample(
    index: int, kind: str, text: str = "First, 2 + 2 = 4.\n\nSo 4 + 3 = 8.\n\nThe answer is \\boxed{7}."
) -> ScoredSample:
    """One scored sample; `kind` is sound, flawed, wrong or unscored."""
    question = f"What is {index} + 7?"
    prompt = Prompt(f"testbed/{index // 4}", "testbed", ({"role": "user", "content": question},), "7", question, (1, 2))
    key = SampleKey(prompt.prompt_id, 0, index % 4)
    sample = Sample(key, prompt, tuple(range(20 + index)), (-0.5,) * (20 + index), text, "stop", 3)
    verdict = Verdict({"flawed": 1}.get(kind, -1), f"Checked sample {index}: {kind}.", "http://a/v1", 0.25, 1, 40)
    if kind == "unscored":
        return ScoredSample(sample, Score(None, True, "7", unscored_reason="genrm_deadline"))
    if kind == "wrong":
        return ScoredSample(sample, Score(-1.0, False, "9"))
    return ScoredSample(sample, Score({"sound": 1.0, "flawed": 0.0}[kind], True, "7", verdict))


def make_run(run_dir: Path, steps: int = 30, seed: int = 0, penalised: bool = True, samples: int = 24) -> Path:
    """Metrics, samples of every tenth step and config.yaml of a run whose accuracy rises."""
    noise = random.Random(seed)
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(
        dump_yaml(load_config([], [f"reward.flawed_penalty={float(penalised)}"]).config)
    )
    with MetricsWriter(run_dir) as writer:
        writer.write(0, {"eval/held_out/avg@4": 0.2})
        for step in range(1, steps + 1):
            share = step / steps
            accuracy = 0.2 + 0.6 * share + noise.uniform(-0.03, 0.03)
            flawed = (0.45 - 0.35 * share if penalised else 0.45 + 0.1 * share) + noise.uniform(-0.03, 0.03)
            metrics = {
                "reward/mean": 2 * accuracy - 1 - penalised * accuracy * flawed,
                "score/accuracy": accuracy,
                "score/flawed_positive_ratio": flawed,
                "score/flawed_share": accuracy * flawed,
                "score/sound_share": accuracy * (1 - flawed),
                "score/wrong_share": 1 - accuracy,
                "score/learning_progress": accuracy * (1 - flawed) / (1 - accuracy),
                "score/unscored": float(step % 7 == 0),
                "score/unscored/genrm_deadline": float(step % 7 == 0),
                "response/tokens_mean": 40 + 10 * share,
                "response/tokens_p95": 70 + 10 * share,
                "trace/idle_share/policy": 0.4 + noise.uniform(0, 0.1),
                "genrm/latency_p50_s": 0.3 + noise.uniform(0, 0.1),
                "genrm/latency_p95_s": 0.8 + noise.uniform(0, 0.3),
                "mismatch/abs_mean": 1e-3 * math.exp(noise.uniform(-0.2, 0.2)),
                "mismatch/kl_k3": 1e-5 * math.exp(noise.uniform(-0.2, 0.2)),
                "policy/entropy": 1.2 - 0.6 * share,
                **{f"phase_s/{name}": seconds * noise.uniform(0.9, 1.1) for name, seconds in PHASES.items()},
                "phase_s/total": sum(PHASES.values()),
            }
            if step % 10 == 0:
                metrics["eval/held_out/avg@4"] = accuracy + 0.02
                kinds = ["sound", "wrong", "flawed", "unscored"]
                write_samples(run_dir, step, [make_sample(i, kinds[i % 4]) for i in range(samples)])
            writer.write(step, metrics)
    return run_dir
