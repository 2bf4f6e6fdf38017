"""The pure parts of a step: scored samples to groups, groups to training samples and mini-batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_fapo.algorithm.advantage import group_advantages, has_signal
from megatron_fapo.config.root import Config
from megatron_fapo.data.records import Group, Prompt, ScoredSample
from megatron_fapo.policy.batch import TrainSample

Taken = Sequence[tuple[Prompt, int]]
"""(prompt, epoch) pairs, as the data cursor hands them out."""


def make_groups(taken: Taken, scored: Iterable[ScoredSample]) -> list[Group]:
    """Groups in the order of `taken`, samples in the order of their index: what finished first does not matter.

    Raises:
        ValueError: a sample came twice or belongs to no prompt of the step.
    """
    members: dict[tuple[str, int], dict[int, ScoredSample]] = {(p.prompt_id, epoch): {} for p, epoch in taken}
    for each in scored:
        key = each.sample.key
        group = members.get((key.prompt_id, key.epoch))
        if group is None or key.sample_index in group:
            raise ValueError(f"sample {key} came twice or was not asked for")
        group[key.sample_index] = each
    return [
        Group(prompt, epoch, tuple(sample for _, sample in sorted(members[prompt.prompt_id, epoch].items())))
        for prompt, epoch in taken
    ]


def training_samples(groups: Sequence[Group], config: Config) -> list[list[TrainSample]]:
    """One list per group: its scored samples with their advantages. Unscored samples are not trained on."""
    result = []
    for group in groups:
        advantages = group_advantages([s.score.reward for s in group.samples], config.algorithm.normalize_std)
        if config.algorithm.drop_uniform_groups and not has_signal(advantages):
            advantages = [None] * len(advantages)
        result.append(
            [
                TrainSample(
                    prompt_ids=each.sample.prompt.token_ids,
                    response_ids=each.sample.token_ids,
                    advantage=advantage,
                    behaviour_logprobs=each.sample.logprobs,
                    versions=each.sample.versions,
                )
                for each, advantage in zip(group.samples, advantages, strict=True)
                if advantage is not None
            ]
        )
    return result


def mini_batches(by_group: Sequence[Sequence[TrainSample]], prompts_per_mini_batch: int) -> list[list[TrainSample]]:
    """Consecutive groups, `prompts_per_mini_batch` at a time; a mini-batch left without samples is dropped."""
    starts = range(0, len(by_group), prompts_per_mini_batch)
    batches = [[s for group in by_group[i : i + prompts_per_mini_batch] for s in group] for i in starts]
    return [batch for batch in batches if batch]
