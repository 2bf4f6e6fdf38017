from __future__ import annotations

import json

import pytest

from megatron_fapo.config.data import DataConfig
from megatron_fapo.data.datasets import DatasetError, load_prompts, prompt_row, write_prompts, write_testbed


def row(index: int = 0, question: str = "Mia has 7 figs.", answer: str = "7"):
    return prompt_row("toy", question, answer, "train", index)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_recipe_rows_round_trip(tmp_path, tokenizer, suffix):
    path = tmp_path / "deep" / f"rows.{suffix}"
    write_prompts(path, [row(0), row(1, "Züge – 3?", "-1/2")])
    first, second = load_prompts([path], tokenizer, DataConfig()).prompts
    assert (first.prompt_id, second.prompt_id) == ("toy/0", "toy/1")
    assert (second.question, second.ground_truth, second.data_source) == ("Züge – 3?", "-1/2", "toy")
    assert second.extra_info == {"split": "train", "index": 1, "question": "Züge – 3?"}
    text = tokenizer.decode(second.token_ids)
    assert text.startswith("<|im_start|>user\nZüge – 3?\n\nPlease reason step by step")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_plain_rows(tmp_path, tokenizer):
    path = tmp_path / "gsm.jsonl"
    write_prompts(
        path,
        [
            {"question": "How much?", "answer": "first 1,000\n#### 1,234"},
            {"question": "Which point?", "answer": "(1,2)"},
        ],
    )
    data = DataConfig(question_key="question", answer_key="answer", instruction="Box it.")
    first, second = load_prompts([path], tokenizer, data, split="test").prompts
    assert first.messages == ({"role": "user", "content": "How much?\n\nBox it."},)
    assert (first.ground_truth, second.ground_truth) == ("1234", "(1,2)")
    assert (first.prompt_id, second.prompt_id) == ("gsm/0", "gsm/1")
    assert first.extra_info == {"split": "test", "index": 0, "question": "How much?"}


def test_question_key_without_answer_key_is_refused(tmp_path, tokenizer):
    with pytest.raises(DatasetError, match="go together"):
        load_prompts([tmp_path / "x.jsonl"], tokenizer, DataConfig(question_key="question"))


def test_repeated_rows_keep_ids_unique(tmp_path, tokenizer):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    write_prompts(paths[0], [row(0), row(1)] * 2)
    write_prompts(paths[1], [row(1)])
    ids = [prompt.prompt_id for prompt in load_prompts(paths, tokenizer, DataConfig()).prompts]
    assert ids == ["toy/0", "toy/1", "toy/0#1", "toy/1#1", "toy/1#2"]


def test_every_malformed_row_is_named_at_once(tmp_path, tokenizer):
    def broken(change):
        bad = json.loads(json.dumps(row()))
        change(bad)
        return json.dumps(bad)

    lines = [
        json.dumps(row()),
        "{not json",
        "[1, 2]",
        "",
        broken(lambda r: r.pop("data_source")),
        broken(lambda r: r.update(prompt="a string")),
        broken(lambda r: r.update(prompt=[{"role": "user"}])),
        broken(lambda r: r.pop("reward_model")),
        broken(lambda r: r["reward_model"].update(ground_truth=None)),
        broken(lambda r: r["extra_info"].update(index="0")),
        broken(lambda r: r["extra_info"].update(question=" ")),
    ]
    path, other = tmp_path / "bad.jsonl", tmp_path / "other.jsonl"
    path.write_bytes("\n".join(lines).encode() + b'\n{"data_source": "\xff"}\n')
    other.write_text("null\n")
    with pytest.raises(DatasetError) as refusal:
        load_prompts([path, other], tokenizer, DataConfig())
    header, *listed = str(refusal.value).splitlines()
    assert header.startswith("11 problems")
    expected = {
        2: "not a JSON object",
        3: "not list",
        5: "data_source",
        6: "prompt must be",
        7: "role and content",
        8: "reward_model",
        9: "ground_truth",
        10: "extra_info.index",
        11: "extra_info.question",
        12: "UTF-8",
    }
    for line, (number, words) in zip(listed[:-1], expected.items(), strict=True):
        assert f"{path}:{number}: " in line
        assert words in line
    assert f"{other}:1: " in listed[-1]


def test_bad_rows_can_be_left_out_by_choice(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text("null\n" * 30)
    with pytest.raises(DatasetError, match=r"no prompts in .*: 30 malformed rows were left out:(?s:.*)and 10 more"):
        load_prompts([path], tokenizer, DataConfig(bad_rows="skip"))
    write_prompts(path, [row(0), {**row(1), "data_source": ""}, row(2), row(3, "figs?" * 100)])
    loaded = load_prompts([path], tokenizer, DataConfig(bad_rows="skip", max_prompt_tokens=60))
    assert [prompt.prompt_id for prompt in loaded.prompts] == ["toy/0", "toy/2"]
    assert (len(loaded.skipped_bad), loaded.dropped_overlong) == (1, 1)
    overlong, malformed = loaded.left_out()
    assert overlong == "1 prompts over data.max_prompt_tokens were left out"
    assert malformed.startswith(f"1 malformed rows were left out:\n  {path}:2: data_source must be non-empty text")
    # A prompt that is too long is not malformed: leaving it out is a choice of its own.
    with pytest.raises(DatasetError, match="1 problem in"):
        load_prompts([path], tokenizer, DataConfig(bad_rows="skip", overlong_prompts="error", max_prompt_tokens=60))


def test_repeated_rows_can_be_merged(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    write_prompts(path, [row(0), row(1), row(1, "Another question?"), row(1, answer="8")] * 3)
    loaded = load_prompts([path], tokenizer, DataConfig(merge_repeats=True))
    # The same index with another question or answer is no repetition.
    assert [prompt.prompt_id for prompt in loaded.prompts] == ["toy/0", "toy/1", "toy/1#1", "toy/1#2"]
    assert loaded.merged_repeats == 8
    assert loaded.left_out() == ["8 rows that repeat an earlier one were left out"]


def test_long_listings_are_capped_with_a_count(tmp_path, tokenizer):
    path = tmp_path / "bad.jsonl"
    path.write_text("null\n" * 50)
    with pytest.raises(DatasetError, match="and 30 more") as refusal:
        load_prompts([path], tokenizer, DataConfig())
    assert len(str(refusal.value).splitlines()) == 22


def test_parquet_rows_are_numbered(tmp_path, tokenizer):
    path = tmp_path / "bad.parquet"
    write_prompts(path, [row(), {**row(), "data_source": ""}])
    with pytest.raises(DatasetError, match=r"bad\.parquet row 2: data_source"):
        load_prompts([path], tokenizer, DataConfig())
    path.write_bytes(b"PAR0")
    with pytest.raises(DatasetError, match="not a readable parquet file"):
        load_prompts([path], tokenizer, DataConfig())


def test_all_unusable_files_are_named(tmp_path, tokenizer):
    with pytest.raises(DatasetError, match=r"(?s)a\.jsonl: no such file; check.*b\.csv: unknown suffix"):
        load_prompts([tmp_path / "a.jsonl", tmp_path / "b.csv"], tokenizer, DataConfig())
    with pytest.raises(DatasetError, match="unknown suffix"):
        write_prompts(tmp_path / "b.csv", [row()])


def test_plain_file_read_as_recipe_rows_explains_itself(tmp_path, tokenizer):
    path = tmp_path / "gsm.jsonl"
    write_prompts(path, [{"question": "How much?", "answer": "#### 1"}])
    with pytest.raises(DatasetError, match=r"columns: question, answer; plain rows need data\.question_key"):
        load_prompts([path], tokenizer, DataConfig())


def test_overlong_prompts(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    write_prompts(path, [row(0), row(1, "figs?" * 100), row(2)])
    dropped = load_prompts([path], tokenizer, DataConfig(max_prompt_tokens=60))
    assert ([prompt.prompt_id for prompt in dropped.prompts], dropped.dropped_overlong) == (["toy/0", "toy/2"], 1)
    with pytest.raises(DatasetError, match=r"rows\.jsonl:2: the prompt has \d+ tokens, over 60"):
        load_prompts([path], tokenizer, DataConfig(max_prompt_tokens=60, overlong_prompts="error"))
    with pytest.raises(DatasetError, match=r"max_prompt_tokens=5\): 3 prompts over"):
        load_prompts([path], tokenizer, DataConfig(max_prompt_tokens=5))


def test_empty_dataset_and_limit(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    write_prompts(path, [])
    with pytest.raises(DatasetError, match="no rows"):
        load_prompts([path], tokenizer, DataConfig())
    write_prompts(path, [row(i) for i in range(5)])
    assert len(load_prompts([path, path], tokenizer, DataConfig(), limit=3).prompts) == 3


def test_testbed_files(tmp_path, tokenizer):
    train, held_out = write_testbed(tmp_path, 200, 50, seed=3)
    train_prompts = load_prompts([train], tokenizer, DataConfig()).prompts
    eval_prompts = load_prompts([held_out], tokenizer, DataConfig()).prompts
    assert (len(train_prompts), len(eval_prompts)) == (200, 50)
    assert not {p.question for p in train_prompts} & {p.question for p in eval_prompts}
    assert {p.extra_info["split"] for p in eval_prompts} == {"test"}
    again = write_testbed(tmp_path / "again", 200, 50, seed=3)
    assert [path.read_bytes() for path in again] == [train.read_bytes(), held_out.read_bytes()]
