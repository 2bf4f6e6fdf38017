"""Experiments: order, what is refused before anything is submitted, and the script of a task."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_fapo.errors import UserError
from megatron_fapo.launch.experiment import (
    Task,
    TaskSpec,
    check_tasks,
    read_tasks,
    refuse_rewritten_paths,
    script,
    task_spec,
)
from tests.config.test_preflight import write_model

EXAMPLES = Path(__file__).parents[2] / "examples" / "experiments"


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration that preflight accepts, and its directory as the current one."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "base.yaml").write_text(
        "device: cpu\ndata: {train: [train.jsonl], eval: {a: train.jsonl}, max_prompt_tokens: 128}\n"
        "policy: {model_path: model}\nrollout: {max_response_tokens: 384}\nreward: {overlong: {enabled: false}}\n"
        "genrm: {model_path: model}\ntraining: {checkpoint: {best_metric: eval/a/f1}}\n"
    )
    return tmp_path


def chain(**changes: dict[str, Any]) -> list[TaskSpec]:
    """GenRM training, its export, and the policy that is judged by it; listed in no order."""
    tasks: dict[str, dict[str, Any]] = {
        "policy": {
            "verb": "train",
            "config": ["base.yaml"],
            "overrides": ["run_dir=p", "genrm.model_path=g/hf"],
            "after": ["export"],
        },
        "export": {"verb": "convert", "source": "g/checkpoints/best", "target": "g/hf", "after": ["genrm"]},
        "genrm": {"verb": "genrm train", "config": ["base.yaml"], "overrides": ["run_dir=g"]},
    }
    return [TaskSpec.model_validate({"name": name, **task, **changes.get(name, {})}) for name, task in tasks.items()]


def refusal(specs: list[TaskSpec], *, look_for_gpu: bool = False) -> str:
    with pytest.raises(UserError) as refused:
        check_tasks(specs, look_for_gpu=look_for_gpu)
    return str(refused.value)


def test_a_chain_is_put_in_order_and_may_name_models_that_are_not_there_yet(base: Path) -> None:
    tasks = check_tasks(chain(), look_for_gpu=True)
    assert [task.spec.name for task in tasks] == ["genrm", "export", "policy"]
    genrm, export, policy = tasks
    assert genrm.config.reward.task == "critic"
    assert policy.config.genrm.model_path == "g/hf"
    assert export.config == genrm.config
    assert not (base / "g").exists()
    late = {"name": "late", "verb": "train", "config": ["base.yaml"], "after": ["policy"]}
    late["overrides"] = ["run_dir=l", "genrm.model_path=g/hf"]  # written by a task that it waits for indirectly
    assert len(check_tasks([TaskSpec.model_validate(late), *chain()], look_for_gpu=True)) == 4


def test_a_model_that_is_to_come_is_checked_by_what_stands_in_for_it(base: Path) -> None:
    (base / "model" / "model.safetensors").unlink()
    assert refusal(chain()).count("lacks model.safetensors") == 3  # what either trains, and the policy's GenRM


def test_a_model_nobody_writes_is_missing() -> None:
    changed = chain(policy={"overrides": ["run_dir=p", "genrm.model_path=g/other"]})
    assert "task policy: genrm.model_path: no config.json in g/other" in refusal(changed)


def test_a_model_of_a_task_that_is_not_waited_for() -> None:
    text = refusal(chain(policy={"after": ["genrm"]}))
    assert "task policy: genrm.model_path = g/hf is written by task export: name it in `after`" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "elsewhere/best"}, "is in the run_dir of no training that comes before"),
        ({"after": []}, "is in the run_dir of no training that comes before"),
        ({"target": "hf"}, "target = hf is not in g, the run_dir of its training"),
        ({"target": "g"}, "target = g is not in g, the run_dir of its training"),
        ({"target": None}, "`verb: convert` needs source"),
        ({"overrides": ["seed=1"]}, "config and overrides belong to trainings"),
    ],
)
def test_conversions_that_are_refused(change: dict[str, Any], message: str) -> None:
    text = refusal(chain(export=change))
    assert "task export: " in text
    assert message in text


def test_the_best_checkpoint_needs_a_metric() -> None:
    changed = chain(genrm={"overrides": ["run_dir=g", "training.checkpoint.best_metric=null"]})
    assert "task genrm has no training.checkpoint.best_metric" in refusal(changed)
    changed[1] = changed[1].model_copy(update={"source": Path("g/checkpoints/step_000010")})
    assert len(check_tasks(changed, look_for_gpu=True)) == 3


def test_everything_that_is_wrong_is_said_at_once() -> None:
    text = refusal(
        chain(
            genrm={"overrides": ["run_dir=g", "polcy.model_path=x"], "after": ["policy"]},
            policy={"overrides": ["run_dir=p", "seed=-1"], "after": ["export", "nobody"]},
        )
    )
    assert text.startswith("5 problems")
    for part in (
        "task policy: after: no task nobody; there are policy, export, genrm",
        "tasks wait for one another: ",
        "task policy: seed = -1",
        "task genrm: polcy",
    ):
        assert part in text
    assert "task genrm: named twice" in refusal([chain()[2], chain()[2]])
    same = chain(policy={"overrides": ["run_dir=./g", "genrm.model_path=g/hf"]})
    assert "task policy: run_dir is that of task genrm" in refusal(same)


def test_gpus_are_looked_for_only_where_the_task_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    specs = [task_spec("train", [Path("base.yaml")], ["device=gpu"])]
    assert "device: gpu, but PyTorch sees no GPU" in refusal(specs, look_for_gpu=True)
    (task,) = check_tasks(specs, look_for_gpu=False)
    assert task.config.device == "gpu"
    assert task.gpus_per_node == 8
    (task,) = check_tasks([task_spec("train", [Path("base.yaml")], [])], look_for_gpu=False)
    assert task.gpus_per_node is None


def test_nodes_are_those_of_the_configuration() -> None:
    roles = ["cluster.train_nodes=2", "cluster.rollout_nodes=3"]

    def task(*overrides: str) -> Task:
        return check_tasks([task_spec("train", [Path("base.yaml")], overrides)], look_for_gpu=False)[0]

    assert task(*roles).nodes(None) == task(*roles).nodes(5) == 5
    with pytest.raises(UserError, match=r"--nodes 4, and .* give roles to 5"):
        task(*roles).nodes(4)
    assert (task().nodes(None), task().nodes(4)) == (1, 4)
    assert check_tasks(chain(), look_for_gpu=False)[1].nodes(4) == 1


def test_files_are_read_relative_to_themselves_and_overrides_go_to_trainings(base: Path) -> None:
    (base / "sub").mkdir()
    file = base / "sub" / "two.yaml"
    file.write_text(
        "tasks:\n  - {name: a, verb: train, config: [../base.yaml], overrides: [run_dir=a]}\n"
        "  - {name: b, verb: convert, source: a/checkpoints/best, target: a/hf, after: [a]}\n"
    )
    tasks = check_tasks(read_tasks(file, ["seed=7"]), look_for_gpu=False)
    assert [task.config.seed for task in tasks] == [7, 7]
    assert tasks[0].spec.overrides == ["run_dir=a", "seed=7"]
    file.write_text("tasks:\n  - {name: a.b, verb: serve, colour: red}\n")
    with pytest.raises(UserError) as refused:
        read_tasks(file, [])
    assert all(f"tasks.0.{key}: " in str(refused.value) for key in ("name", "verb", "colour"))
    with pytest.raises(UserError, match="cannot be read"):
        read_tasks(base / "none.yaml", [])


@pytest.mark.parametrize(
    ("name", "order"),
    [("genrm_then_policy", ["genrm", "export", "policy"]), ("baseline_and_fapo", ["fapo", "baseline"])],
)
def test_the_examples_lack_nothing_but_models_and_data(name: str, order: list[str]) -> None:
    specs = read_tasks(EXAMPLES / f"{name}.yaml", [])
    problems = refusal(specs).splitlines()[1:]
    assert problems
    assert [p for p in problems if "no config.json in models/" not in p and ": no file data/" not in p] == []
    assert [spec.name for spec in specs] == order


def test_a_script_quotes_what_it_is_given(base: Path) -> None:
    """Run with a Python that only says what it was asked."""
    python = base / "say"
    python.write_text('#!/bin/sh\nfor word in "$@"; do echo "[$word]"; done; echo "$NOTE"\n')
    python.chmod(0o755)
    spec = task_spec("genrm train", [Path("my file.yaml")], ["data.train=[$HOME, 'a b']"])
    text = script(spec, environment={"NOTE": "it's $5"}, directory=base, python=str(python))
    here = subprocess.run(["bash", "-c", text], text=True, capture_output=True, check=True).stdout.splitlines()
    same = ["[-c]", "[my file.yaml]", "[data.train=[$HOME, 'a b']]", "it's $5"]
    assert here == ["[-m]", "[megatron_fapo.cli]", "[genrm]", "[train]", "[--resume]", "[auto]", *same]
    slurm = subprocess.run(
        ["bash", "-c", text], text=True, capture_output=True, check=True,
        env={"FAPO_EXECUTOR": "slurm", "FAPO_PID_FILE": str(base / "pid"), "PATH": "/usr/bin:/bin"},
    ).stdout.splitlines()  # fmt: skip
    assert slurm == ["[-m]", "[megatron_fapo.launch.job]", "[genrm]", "[train]", *same]
    assert (base / "pid").read_text().strip().isdigit()


def test_a_conversion_replaces_its_target_only_when_it_is_complete(base: Path) -> None:
    """With a Python that writes the target and then succeeds or not."""
    task = check_tasks(chain(), look_for_gpu=False)[1]
    python = base / "python"
    python.write_text('#!/bin/sh\nmkdir -p "$8" && echo new > "$8/file" && exit $(cat code)\n')
    python.chmod(0o755)
    (base / "g" / "hf").mkdir(parents=True)
    (base / "g" / "hf" / "file").write_text("old\n")
    text = script(task, environment={}, directory=base, python=str(python))
    for code, left in (("1", "old\n"), ("0", "new\n")):
        (base / "code").write_text(code)
        assert subprocess.run(["bash", "-c", text], check=False).returncode == int(code)
        assert (base / "g" / "hf" / "file").read_text() == left


def test_paths_that_nemo_run_would_rewrite_are_refused() -> None:
    refuse_rewritten_paths(["/data/me/.nemo_run/experiments"])
    with pytest.raises(UserError, match="rewrites every /nemo_run"):
        refuse_rewritten_paths(["/data/me", "/scratch/nemo_run/x"])
