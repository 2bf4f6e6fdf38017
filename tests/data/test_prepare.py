"""Published data sets in miniature, in the kinds of files they come in, prepared and loaded."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import subprocess
import sys

import pyarrow.parquet
import pytest

from megatron_fapo import cli
from megatron_fapo.config.data import DataConfig
from megatron_fapo.data.critic import critic_row
from megatron_fapo.data.datasets import DatasetError, load_prompts, write_prompts
from megatron_fapo.data.prepare import NOT_GIVEN, SETS, prepare
from megatron_fapo.genrm.prompts import judge_messages

STEPS = ["First, $1 + 1 = 2$.\n\nThat was easy.", "So the answer is \\boxed{\\frac{4}{2}}."]


def bench_row(number, label=-1, correct=True, **further):
    row = {"id": f"omnimath-{number}", "generator": "m", "problem": f"Problem {number}?", "steps": STEPS}
    return row | {"final_answer_correct": correct, "label": label} | further


def gpqa_row(number):
    options = {"Correct Answer": f"right {number}\n"} | {f"Incorrect Answer {n}": f"wrong {n}" for n in (1, 2, 3)}
    return {"Question": f"Which of {number}?", **options}


def write_sources(root):
    """One source for each set, by set: parquet, JSONL, JSON, CSV, single files and folders."""
    dapo, gsm8k, gpqa = root / "dapo", root / "gsm8k", root / "gpqa"
    questions = [{"prompt": " What is $2$? ", "solution": "2"}, {"prompt": "And 3?", "solution": "34"}]
    write_prompts(dapo / "all" / "train-0.parquet", [*questions, questions[0], questions[1] | {"solution": "35"}])
    write_prompts(dapo / "cn" / "train-0.parquet", [{"prompt": "别的?", "solution": "1"}])
    write_prompts(gsm8k / "train.jsonl", [{"question": "How much?", "answer": "1 + 1\n#### 1,002"}])
    write_prompts(gsm8k / "test.jsonl", [{"question": "How many?", "answer": "#### 3"}])
    write_prompts(root / "aime24.parquet", [{"Problem": "P", "Solution": "worked", "Answer": 33}])
    (root / "aime25.json").write_text(json.dumps([{"problem": "Q", "solution": "070"}]))
    gpqa.mkdir()
    for name in ("gpqa_diamond.csv", "gpqa_main.csv"):
        with (gpqa / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, gpqa_row(0))
            writer.writeheader()
            writer.writerows(map(gpqa_row, range(12)))
    critic = critic_row("fapo_critic", judge_messages("q", "2", "a\n\nb", "tagged"), 1, 2, question_index=0, split="t")
    write_prompts(root / "critic" / "train.parquet", [critic])
    write_prompts(root / "critic" / "test.parquet", [critic])
    bench = root / "bench"
    bench.mkdir()
    (bench / "omnimath.json").write_text(
        json.dumps([bench_row(0), bench_row(1, 1), bench_row(2, 0, correct=False), bench_row(3, answer="2")])
    )
    mistakes = {"input": "1 + 1 =", "steps": ["Easy.", "It is 3."], "target": "2", "answer": "3", "mistake_index": 1}
    write_prompts(
        root / "mistakes" / "multistep_arithmetic.jsonl", [mistakes, mistakes | {"input": "=", "mistake_index": None}]
    )
    return {
        "dapo-math": dapo,
        "gsm8k": gsm8k,
        "aime24": root / "aime24.parquet",
        "aime25": root / "aime25.json",
        "gpqa-diamond": gpqa,
        "fapo-critic": root / "critic",
        "processbench": bench,
        "flawed-positive-bench": bench,
        "bigbench-mistake": root / "mistakes",
    }


@pytest.fixture
def sources(tmp_path):
    return write_sources(tmp_path / "sources")


def rows_of(path):
    return pyarrow.parquet.read_table(path).to_pylist()


def test_every_set_is_written_listed_and_loads(tmp_path, sources, tokenizer):
    assert sources.keys() == SETS.keys()
    out = tmp_path / "out"
    written = prepare([*SETS], out, sources, 1)
    assert json.loads((out / "manifest.json").read_text()) == written
    assert {path.name for path in out.iterdir()} == {*written, "manifest.json"}
    for file, entry in written.items():
        assert entry["sha256"] == hashlib.sha256((out / file).read_bytes()).hexdigest()
        task = "critic" if re.match("fapo-critic|processbench|flawed|bigbench", file) else "policy"
        loaded = load_prompts([out / file], tokenizer, DataConfig(), task=task)
        assert (len(loaded.prompts), loaded.left_out()) == (entry["rows"], [])
    assert {file: entry["rows"] for file, entry in written.items()} == {
        "dapo-math.parquet": 2,
        "gsm8k-test.parquet": 1,
        "gsm8k-train.parquet": 1,
        "aime24.parquet": 1,
        "aime25.parquet": 1,
        "gpqa-diamond.parquet": 12,
        "fapo-critic-test.parquet": 1,
        "fapo-critic-train.parquet": 1,
        "processbench.parquet": 4,
        "flawed-positive-bench.parquet": 3,
        "bigbench-mistake.parquet": 2,
    }


def test_the_same_sources_and_seed_give_the_same_bytes(tmp_path, sources):
    first, again, other = (
        prepare([*SETS], tmp_path / name, sources, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again
    for file in [*first, "manifest.json"]:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert [file for file in first if first[file]["sha256"] != other[file]["sha256"]] == ["gpqa-diamond.parquet"]


def test_policy_rows(tmp_path, sources):
    written = prepare(["dapo-math", "gsm8k", "aime24", "aime25"], tmp_path, sources, 0)
    dapo = rows_of(tmp_path / "dapo-math.parquet")
    assert dapo[0] == {
        "data_source": "math-dapo",
        "prompt": [
            {
                "role": "user",
                "content": "What is $2$?\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
            }
        ],
        "ability": "Math",
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"split": "train", "index": 0, "question": "What is $2$?"},
    }
    assert (dapo[1]["extra_info"]["index"], dapo[1]["reward_model"]["ground_truth"]) == (1, "34")
    assert written["dapo-math.parquet"]["dropped"] == {"repeated prompt": 1, "another answer to a prompt": 1}
    answers = {
        name: [row["reward_model"]["ground_truth"] for row in rows_of(tmp_path / f"{name}.parquet")]
        for name in ("gsm8k-train", "gsm8k-test", "aime24", "aime25")
    }
    assert answers == {"gsm8k-train": ["1002"], "gsm8k-test": ["3"], "aime24": ["33"], "aime25": ["70"]}
    assert rows_of(tmp_path / "gsm8k-test.parquet")[0]["extra_info"]["split"] == "test"


def test_gpqa_letters_name_the_right_option_wherever_the_seed_puts_it(tmp_path, sources):
    letters = {}
    for seed in (0, 1):
        prepare(["gpqa-diamond"], tmp_path, sources, seed)
        rows = rows_of(tmp_path / "gpqa-diamond.parquet")
        for number, row in enumerate(rows):
            question, letter = row["extra_info"]["question"], row["reward_model"]["ground_truth"]
            assert question.splitlines()[0] == f"Which of {number}?"
            assert dict(line.split(". ") for line in question.splitlines()[1:])[letter] == f"right {number}"
            ending = "put your final answer (only the choice letter) within \\boxed{}."
            assert row["prompt"][0]["content"] == f"{question}\n\nPlease reason step by step, and {ending}"
        letters[seed] = [row["reward_model"]["ground_truth"] for row in rows]
    assert letters[0] != letters[1]
    assert len({*letters[0]}) > 1


def test_a_question_keeps_its_option_order_when_others_leave(tmp_path, sources):
    prepare(["gpqa-diamond"], tmp_path / "all", sources, 0)
    write_prompts(tmp_path / "some.jsonl", map(gpqa_row, range(6, 12)))
    prepare(["gpqa-diamond"], tmp_path / "some", {"gpqa-diamond": tmp_path / "some.jsonl"}, 0)
    orders = [[r["prompt"] for r in rows_of(tmp_path / name / "gpqa-diamond.parquet")] for name in ("all", "some")]
    assert orders[0][6:] == orders[1]


def test_benchmark_rows_keep_step_indices_and_say_where_their_ground_truth_is_from(tmp_path, sources):
    prepare(["processbench", "flawed-positive-bench"], tmp_path, sources, 0)

    def facts(file):
        rows = rows_of(tmp_path / file)
        assert {row["extra_info"]["total_steps"] for row in rows} == {2}
        for row in rows:
            (message,) = row["prompt"]
            assert "<paragraph_0>\nFirst, $1 + 1 = 2$.\n\nThat was easy.\n</paragraph_0>" in message["content"]
        truths = [re.search(r"\[Ground Truth\]\n\n(.*)\n", row["prompt"][0]["content"])[1] for row in rows]
        origins = [row["extra_info"]["ground_truth_from"] for row in rows]
        labels = [row["reward_model"]["ground_truth"] for row in rows]
        return {row["data_source"] for row in rows}, [*zip(labels, truths, origins, strict=True)]

    # Half the rows with a ground truth would tell the judge which half is wrong.
    absent = (NOT_GIVEN, "nowhere")
    assert facts("processbench.parquet") == (
        {"ProcessBench/omnimath"},
        [(-1, *absent), (1, *absent), (0, *absent), (-1, "2", "source")],
    )
    own = ("\\frac{4}{2}", "solution")
    assert facts("flawed-positive-bench.parquet") == (
        {"FlawedPositiveBench/omnimath"},
        [(-1, *own), (1, *own), (-1, "2", "source")],
    )
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["flawed-positive-bench.parquet"]["dropped"] == {"final answer is wrong": 1}


def test_bigbench_mistake_rows(tmp_path, sources):
    prepare(["bigbench-mistake"], tmp_path, sources, 0)
    marked, unmarked = rows_of(tmp_path / "bigbench-mistake.parquet")
    assert (marked["data_source"], marked["reward_model"]["ground_truth"]) == (
        "BIGBenchMistake/multistep_arithmetic",
        1,
    )
    assert unmarked["reward_model"]["ground_truth"] == -1
    assert unmarked["extra_info"]["final_answer_correct"] is False


def test_all_bad_rows_of_all_sets_are_named_and_nothing_is_written(tmp_path, sources):
    aime, bench, gpqa = tmp_path / "aime.jsonl", tmp_path / "bench.jsonl", tmp_path / "gpqa.csv"
    aime.write_text('{"Problem": "P", "Answer": "1/2"}\n{"Problem": "P"}\nnonsense\n')
    write_prompts(
        bench,
        [
            bench_row(0, 2),
            bench_row(1, steps=[]),
            bench_row(2, steps="text"),
            bench_row(3, correct="yes"),
            bench_row(4, label=None),
            bench_row(5, problem=""),
        ],
    )
    gpqa.write_text(",".join(gpqa_row(0)) + "\nq,same,same,b,c\nq,a,b\n")
    broken = {"aime24": aime, "processbench": bench, "gpqa-diamond": gpqa, "gsm8k": tmp_path / "absent"}
    with pytest.raises(DatasetError) as refusal:
        prepare([*broken, "aime25"], tmp_path / "out", broken | {"aime25": sources["aime25"]}, 0)
    listed = [line.strip() for line in str(refusal.value).splitlines()[1:]]
    expected = [
        (f"{aime}:1: ", "integer from 0 to 999, got '1/2'"),
        (f"{aime}:2: ", "Answer or answer or solution must be text or a number, got None"),
        (f"{aime}:3: ", "not a JSON object"),
        (f"{bench}:1: ", "must be in -1..1, got 2"),
        (f"{bench}:2: ", "steps must be"),
        (f"{bench}:3: ", "steps must be"),
        (f"{bench}:4: ", "final_answer_correct"),
        (f"{bench}:5: ", "label must be an integer"),
        (f"{bench}:6: ", "problem must be non-empty text"),
        (f"{gpqa} row 1: ", "'same' is among the wrong ones"),
        (f"{gpqa} row 2: ", "Incorrect Answer 2"),
        ("gsm8k: ", "no such file, and no folder with main/*{.parquet,.jsonl,.json,.csv}"),
    ]
    for line, (place, words) in zip(listed, expected, strict=True):
        assert line.startswith(place)
        assert words in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["[1,", "[\xff]"])
def test_a_source_that_is_not_what_its_suffix_says(tmp_path, content):
    path = tmp_path / "aime.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(DatasetError, match=r"aime\.json: not a json file in UTF-8"):
        prepare(["aime24"], tmp_path / "out", {"aime24": path}, 0)


def test_an_empty_source_is_refused(tmp_path):
    (tmp_path / "aime.jsonl").write_text("")
    with pytest.raises(DatasetError, match=r"aime24\.parquet: no rows in"):
        prepare(["aime24"], tmp_path / "out", {"aime24": tmp_path / "aime.jsonl"}, 0)


def test_sets_prepared_later_join_the_manifest(tmp_path, sources):
    out = tmp_path / "out"
    for name in ("aime24", "aime25", "aime24"):
        prepare([name], out, sources, 0)
    assert [*json.loads((out / "manifest.json").read_text())] == ["aime24.parquet", "aime25.parquet"]


def test_command_line(tmp_path, sources, capsys):
    out = tmp_path / "out"
    assert (
        cli.main(["data", "prepare", "dapo-math", "-o", str(out), "--source", f"dapo-math={sources['dapo-math']}"]) == 0
    )
    left_out = "1 left out (repeated prompt), 1 left out (another answer to a prompt)"
    assert capsys.readouterr().out == f"{out}/dapo-math.parquet: 2 rows from {sources['dapo-math']}, {left_out}\n"
    words = ["data", "prepare", "dapo", "-o", str(out), "--source", "gsm8k=x", "--source", "aime24"]
    assert cli.main(words) == cli.EXIT_BAD_INPUT
    message = capsys.readouterr().err
    assert "no set 'dapo': the sets are dapo-math, gsm8k" in message
    assert "--source gsm8k: gsm8k is not among the sets" in message
    assert "--source aime24=: write SET=PATH" in message


def test_without_network_the_remedy_is_a_local_copy(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_fapo.cli", "data", "prepare", "gpqa-diamond", "bigbench-mistake"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "out")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == cli.EXIT_BAD_INPUT
    assert "gpqa-diamond: cannot download Idavidrein/gpqa (" in done.stderr
    assert "pass a copy as --source gpqa-diamond=PATH (a file or a folder)" in done.stderr
    assert "bigbench-mistake: this set is not on the Hugging Face hub: pass a copy" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_gate_and_a_downloaded_snapshot(tmp_path, sources, monkeypatch):
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def refuse(*_, **__):
        response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))
        raise GatedRepoError("403 Client Error.\nAccess is restricted", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(DatasetError, match=r"Idavidrein/gpqa is gated: accept its terms .* or pass a copy as --source"):
        prepare(["gpqa-diamond"], tmp_path / "out", {}, 0)

    asked = {}

    def snapshot(repo, *, repo_type, allow_patterns):
        asked.update(repo=repo, repo_type=repo_type, allow_patterns=allow_patterns)
        return str(sources["gpqa-diamond"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    written = prepare(["gpqa-diamond"], tmp_path / "out", {}, 0)
    assert written["gpqa-diamond.parquet"]["source"] == "Idavidrein/gpqa@gpqa"
    assert asked["repo_type"] == "dataset"
    assert "*diamond*.csv" in asked["allow_patterns"]
