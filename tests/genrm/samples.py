"""Samples for the reward tests."""

from __future__ import annotations

from megatron_fapo.data.records import Prompt, Sample, SampleKey


def make_sample(text: str = "\\boxed{2}", ground_truth: str = "2", index: int = 0, tokens: int = 3) -> Sample:
    prompt = Prompt(
        prompt_id=f"test/{index}",
        data_source="test",
        messages=({"role": "user", "content": "What is 1+1?"},),
        ground_truth=ground_truth,
        question=f"What is 1+1? ({index})",
        extra_info={"split": "train"},
    )
    key = SampleKey(prompt.prompt_id, 0, 0)
    return Sample(key, prompt, tuple(range(tokens)), (0.0,) * tokens, text, "stop", 0)
