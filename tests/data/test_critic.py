"""Critic rows: what they become, and that no row whose label cannot be trusted gets through unnoticed."""

from __future__ import annotations

import copy

import pytest

from megatron_fapo.config.data import DataConfig
from megatron_fapo.data.critic import critic_row
from megatron_fapo.data.datasets import DatasetError, load_prompts, prompt_row, write_prompts
from megatron_fapo.genrm.prompts import judge_messages

DATA = DataConfig(max_prompt_tokens=4096)


def published(problem: str = "What is 1 + 1?", label: int = -1, steps: int = 3):
    """A row with the keys of FAPO-Critic as published: no index, no question."""
    solution = "\n\n".join(f"Step {number}." for number in range(steps))
    messages = judge_messages(problem, "2", solution, "tagged")
    return critic_row("fapo_critic", messages, label, steps, question_index=7, split="train")


def load(path, tokenizer, data=DATA, **kwargs):
    return load_prompts([path], tokenizer, data, task="critic", **kwargs)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_published_rows_become_prompts(tmp_path, tokenizer, suffix):
    path = tmp_path / f"critic.{suffix}"
    write_prompts(path, [published(), published("What is\n\n2?", 2)])
    first, second = load(path, tokenizer).prompts
    assert [p.prompt_id for p in (first, second)] == ["fapo_critic/0", "fapo_critic/1"]
    assert (first.ground_truth, second.ground_truth) == ("-1", "2")
    assert (first.question, second.question) == ("What is 1 + 1?", "What is\n\n2?")
    assert second.extra_info == {"question_index": 7, "split": "train", "total_steps": 3}
    assert type(second.extra_info["total_steps"]) is int
    assert "<paragraph_2>\nStep 2.\n</paragraph_2>" in tokenizer.decode(second.token_ids)


def test_an_index_names_the_row_and_positions_count_bad_rows_too(tmp_path, tokenizer):
    path = tmp_path / "critic.parquet"
    rows = [published("a"), published("b", label=3), published("c"), published("d")]
    rows[3]["extra_info"]["index"] = 40  # In parquet the other rows have the column too, as null.
    write_prompts(path, rows)
    ids = [p.prompt_id for p in load(path, tokenizer, DATA.model_copy(update={"bad_rows": "skip"})).prompts]
    assert ids == ["fapo_critic/0", "fapo_critic/2", "fapo_critic/40"]


def test_a_prompt_without_tags_or_sections_is_taken_at_its_word(tmp_path, tokenizer):
    path = tmp_path / "critic.jsonl"
    bare = critic_row("own", [{"role": "user", "content": "Judge: 1 = 2."}], 0, 5, question_index=0, split="test")
    write_prompts(path, [bare])
    (prompt,) = load(path, tokenizer).prompts
    assert (prompt.question, prompt.ground_truth) == ("Judge: 1 = 2.", "0")


def malformed_rows():
    def broken(number, change):
        row = copy.deepcopy(published(f"problem {number}"))
        change(row)
        return row

    def retag(row, old, new):
        message = row["prompt"][0]
        message["content"] = message["content"].replace(old, new)

    changes = [
        ("data_source", lambda r: r.pop("data_source")),
        ("prompt must be", lambda r: r.pop("prompt")),
        ("extra_info must be an object", lambda r: r.pop("extra_info")),
        ("reward_model must be an object", lambda r: r.pop("reward_model")),
        ("reward_model.ground_truth must be an integer, got '1'", lambda r: r["reward_model"].update(ground_truth="1")),
        ("ground_truth must be an integer, got True", lambda r: r["reward_model"].update(ground_truth=True)),
        ("ground_truth must be an integer, got 1.0", lambda r: r["reward_model"].update(ground_truth=1.0)),
        ("must be in -1..2, got 3", lambda r: r["reward_model"].update(ground_truth=3)),
        ("must be in -1..2, got -2", lambda r: r["reward_model"].update(ground_truth=-2)),
        ("total_steps must be an integer, got None", lambda r: r["extra_info"].pop("total_steps")),
        ("total_steps must be positive, got 0", lambda r: r["extra_info"].update(total_steps=0)),
        ("total_steps is 4, and the prompt has 3", lambda r: r["extra_info"].update(total_steps=4)),
        ("<paragraph_1> is number 0", lambda r: retag(r, "<paragraph_0>", "<paragraph_1>")),
        ("<paragraph_7> is number 2", lambda r: retag(r, "<paragraph_2>", "<paragraph_7>")),
        ("extra_info.index must be an integer, got '5'", lambda r: r["extra_info"].update(index="5")),
    ]
    return [words for words, _ in changes], [broken(number, change) for number, (_, change) in enumerate(changes)]


def test_every_bad_row_is_named_at_once_or_left_out_and_counted(tmp_path, tokenizer):
    path = tmp_path / "critic.jsonl"
    words, rows = malformed_rows()
    write_prompts(path, [published("good"), *rows])
    with pytest.raises(DatasetError) as refusal:
        load(path, tokenizer)
    header, *listed = str(refusal.value).splitlines()
    assert header.startswith(f"{len(rows)} problems")
    for number, (line, expected) in enumerate(zip(listed, words, strict=True), start=2):
        assert f"{path}:{number}: " in line
        assert expected in line

    skipping = load(path, tokenizer, DATA.model_copy(update={"bad_rows": "skip"}))
    assert [p.question for p in skipping.prompts] == ["good"]
    assert list(skipping.skipped_bad) == [line.strip() for line in listed]
    (note,) = skipping.left_out()
    assert note.splitlines() == [f"{len(rows)} malformed rows were left out:", *listed]


def test_duplicates_are_bad_rows_that_name_the_first(tmp_path, tokenizer):
    path = tmp_path / "critic.jsonl"
    other_label, elsewhere, indexed = published("a", label=1), published("a"), [published("b"), published("c")]
    elsewhere["data_source"] = "another"
    for row in indexed:
        row["extra_info"]["index"] = 9
    write_prompts(path, [published("a"), other_label, published("a"), elsewhere, *indexed])
    with pytest.raises(DatasetError) as refusal:
        load(path, tokenizer)
    listed = [line.strip() for line in str(refusal.value).splitlines()[1:]]
    assert listed == [
        f"{path}:2: the same data_source and prompt as {path}:1",
        f"{path}:3: the same data_source and prompt as {path}:1",
        f"{path}:6: the same data_source and extra_info.index as {path}:5",
    ]
    # Merging takes what is the same in every respect, and no second opinion on the label.
    merging = DATA.model_copy(update={"bad_rows": "skip", "merge_repeats": True})
    loaded = load(path, tokenizer, merging)
    assert (len(loaded.prompts), loaded.merged_repeats, len(loaded.skipped_bad)) == (3, 1, 2)


def test_rows_of_the_other_task_say_so(tmp_path, tokenizer):
    critic, policy = tmp_path / "critic.jsonl", tmp_path / "policy.jsonl"
    write_prompts(critic, [published()])
    write_prompts(policy, [prompt_row("toy", "How much?", "7", "train", 0)])
    with pytest.raises(DatasetError, match=r"critic\.jsonl:1: a critic's row in a policy's dataset: set reward\.task"):
        load_prompts([critic], tokenizer, DATA)
    with pytest.raises(DatasetError, match=r"policy\.jsonl:1: a policy's row in a critic's dataset: set reward\.task"):
        load(policy, tokenizer)
    with pytest.raises(DatasetError, match="question_key is for a policy's plain rows"):
        load(critic, tokenizer, DataConfig(question_key="q", answer_key="a"))


def test_limit_and_length_apply_to_critic_rows(tmp_path, tokenizer):
    path = tmp_path / "critic.jsonl"
    write_prompts(path, [published("long " * 2000), published("b"), published("c")])
    loaded = load(path, tokenizer, limit=2)
    assert ([p.question for p in loaded.prompts], loaded.dropped_overlong) == (["b"], 1)
