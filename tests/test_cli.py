"""The `fapo` command as a person meets it: exit codes, messages, and what reaches the code behind a verb."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from megatron_fapo import __version__, cli
from megatron_fapo.config import Config
from megatron_fapo.errors import UserError
from megatron_fapo.processes import Process, ProcessDiedError
from tests.config.test_preflight import write_model
from tests.observe.synthetic import make_run


def fapo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_fapo.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def behind(monkeypatch: pytest.MonkeyPatch, module: str, name: str, result: Any) -> list[tuple[tuple, dict]]:
    """Put a recorder in the place of a verb's implementation; `result` is returned, or raised."""
    calls: list[tuple[tuple, dict]] = []

    def record(*args: Any, **kwargs: Any) -> int:
        calls.append((args, kwargs))
        if isinstance(result, Exception):
            raise result
        return result

    stand_in = types.ModuleType(module)
    setattr(stand_in, name, record)
    monkeypatch.setitem(sys.modules, module, stand_in)
    return calls


@pytest.fixture
def run_file(tmp_path) -> Path:
    """A configuration that preflight accepts."""
    write_model(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "run.yaml").write_text(
        f"run_dir: {tmp_path / 'run'}\n"
        f"data: {{train: ['{tmp_path / 'train.jsonl'}'], eval: {{a: '{tmp_path / 'train.jsonl'}'}},"
        " max_prompt_tokens: 128}\n"
        f"policy: {{model_path: '{tmp_path / 'model'}'}}\n"
        "rollout: {max_response_tokens: 384}\n"
        "reward: {overlong: {enabled: false}}\n"
        "genrm: {enabled: false}\n"
    )
    return tmp_path / "run.yaml"


def test_version_and_help():
    assert fapo("--version").stdout == f"fapo {__version__}\n"
    assert "train" in fapo("--help").stdout


def test_bad_input_is_one_message_without_a_traceback():
    result = fapo("train", "sede=1", "rollout.replicas=0")
    assert result.returncode == 2
    assert "did you mean seed?" in result.stderr
    assert "rollout.replicas = 0 (command line)" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_problems_of_the_configuration_and_of_its_files_come_together():
    result = fapo("train", "training.prompts_per_step=7", "data.train=[absent.jsonl]")
    assert result.returncode == 2
    for part in (
        "training.prompts_per_step = 7",
        "no file absent.jsonl",
        "policy.model_path is empty",
        "name a GenRM",
    ):
        assert part in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [["train", "--frobnicate"], ["train", "word"], ["convert", "sideways"], ["convert", "hf-to-megatron"], []],
)
def test_wrong_arguments_exit_with_2(arguments):
    assert fapo(*arguments).returncode == 2


@pytest.mark.parametrize("code", [0, 1, 75, 76])
def test_train_passes_its_exit_code_on(run_file, monkeypatch, code):
    calls = behind(monkeypatch, "megatron_fapo.training.loop", "train_command", code)
    assert cli.main(["train", "seed=5", "-c", str(run_file), "training.steps=3", "--resume", "gpu_share=0.5"]) == code
    (((config,), kwargs),) = calls
    assert isinstance(config, Config)
    assert (config.seed, config.training.steps, config.gpu_share, kwargs) == (5, 3, 0.5, {"resume": "newest"})


@pytest.mark.parametrize(
    ("arguments", "resume", "seed"),
    [
        (["--resume", "auto"], "auto", 0),
        (["--resume", "auto", "seed=3"], "auto", 3),
        (["--resume=auto"], "auto", 0),
        (["--resume", "seed=3"], "newest", 3),
        (["seed=3", "--resume"], "newest", 3),
        (["seed=3"], None, 3),
    ],
)
def test_resume_takes_auto_and_no_override_for_its_value(run_file, monkeypatch, arguments, resume, seed):
    calls = behind(monkeypatch, "megatron_fapo.training.loop", "train_command", 0)
    assert cli.main(["train", "-c", str(run_file), *arguments]) == 0
    assert cli.main(["train", *arguments, "-c", str(run_file)]) == 0
    assert [(kwargs["resume"], config.seed) for (config,), kwargs in calls] == [(resume, seed)] * 2


def test_an_error_for_the_user_from_inside_a_verb_exits_with_2(run_file, monkeypatch, capsys):
    behind(monkeypatch, "megatron_fapo.training.loop", "train_command", UserError("row 3 of x.jsonl has no prompt"))
    assert cli.main(["train", "-c", str(run_file)]) == 2
    assert capsys.readouterr().err == "fapo: row 3 of x.jsonl has no prompt\n"


@pytest.mark.parametrize(("lost", "code"), [(True, 76), (False, 1)])
def test_a_process_that_is_gone_is_one_message(run_file, monkeypatch, capsys, lost, code):
    gone = ProcessDiedError(Process("genrm", 2), "it has ended", lost=lost)
    behind(monkeypatch, "megatron_fapo.training.evaluation", "evaluate_command", gone)
    assert cli.main(["evaluate", "-c", str(run_file)]) == code
    assert "genrm-2 on node" in capsys.readouterr().err


def test_any_other_error_is_a_failure_with_its_traceback(run_file, monkeypatch):
    behind(monkeypatch, "megatron_fapo.training.loop", "train_command", RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        cli.main(["train", "-c", str(run_file)])


def test_the_other_verbs_get_typed_arguments(run_file, monkeypatch):
    evaluate = behind(monkeypatch, "megatron_fapo.training.evaluation", "evaluate_command", 0)
    to_megatron = behind(monkeypatch, "megatron_fapo.policy.convert", "hf_to_megatron", 0)
    demo = behind(monkeypatch, "megatron_fapo.demo", "demo_command", 0)
    warmup = behind(monkeypatch, "megatron_fapo.training.warmup", "warmup_command", 0)
    assert cli.main(["evaluate", "-c", str(run_file), "data.train=[]"]) == 0
    assert cli.main(["convert", "hf-to-megatron", "--hf", "a", "--out", "b", "--tp", "2", "--pp", "3"]) == 0
    to_hf = behind(monkeypatch, "megatron_fapo.policy.convert", "megatron_to_hf", 1)
    assert cli.main(["convert", "megatron-to-hf", "--megatron", "b", "--out", "c", "--verify"]) == 1
    assert cli.main(["demo", "--compare"]) == 0
    assert cli.main(["warmup", "-c", str(run_file), "--data", str(run_file), "--out", "o"]) == 0
    assert cli.main(["warmup", "-c", str(run_file), "--data", "absent.jsonl", "--out", "o"]) == 2
    assert isinstance(evaluate[0][0][0], Config)
    sizes = {"tensor": 2, "pipeline": 3, "expert": 1}
    assert to_megatron == [((Path("a"), Path("b")), {**sizes, "verify": False})]
    assert to_hf == [((Path("b"), Path("c")), {"verify": True})]
    assert demo == [((), {"out": Path("runs/demo"), "compare": True, "rebuild": False})]
    assert warmup[0][1] == {"data": run_file, "out": Path("o")}


def test_config_show_and_diff(run_file, capsys):
    assert cli.main(["config", "show", "-c", str(run_file), "seed=3"]) == 0
    shown = capsys.readouterr().out
    assert f"# {run_file}:1" in shown
    (run_file.parent / "run").mkdir()
    (run_file.parent / "run" / "config.yaml").write_text(shown)
    assert cli.main(["config", "diff", str(run_file), str(run_file.parent / "run")]) == 0
    assert capsys.readouterr().out.startswith("seed: 0 (default) -> 3 (")
    assert cli.main(["config", "show", "--docs"]) == 0
    assert "# Group size n." in capsys.readouterr().out


def test_report_writes_beside_the_run(tmp_path, capsys):
    run = make_run(tmp_path / "a", steps=2)
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out.endswith(f"\n{run / 'report.html'}\n")
    assert (run / "report.html").stat().st_size > 10_000
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "no metrics.jsonl" in capsys.readouterr().err


def test_the_command_starts_without_heavy_imports():
    heavy = "{'torch', 'vllm', 'ray', 'megatron', 'matplotlib'}"
    code = f"import sys; import megatron_fapo.cli; print({heavy} & {{*sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
