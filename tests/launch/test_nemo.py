"""`fapo launch` and the NeMo-Run entry point as their users run them, on this machine; jobs are in tests/slurm, a whole
run that is stopped and goes on in tests/training/test_end_to_end.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.tiny import policy_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEMORUN_HOME", raising=False)
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | environment,
    )


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return command("megatron_fapo.cli", "launch", *arguments, **environment)


def test_a_failed_task_ends_the_experiment_with_its_code(tmp_path: Path) -> None:
    """What preflight cannot see: a prompt file without rows."""
    config = policy_config(tmp_path, steps=1)
    (tmp_path / "data" / "train.jsonl").write_text("{}\n")
    file = tmp_path / "two.yaml"
    file.write_text(
        f"tasks:\n  - {{name: one, verb: train, config: [{config}], overrides: [run_dir={tmp_path}/one]}}\n"
        f"  - {{name: two, verb: train, config: [{config}], overrides: [run_dir={tmp_path}/two], after: [one]}}\n"
    )
    result = launch("--executor", "local", "--experiment", str(file))
    assert result.returncode == 2, result.stdout + result.stderr
    assert not (tmp_path / "two").exists()


def test_a_dry_run_shows_configuration_and_scripts_and_leaves_nothing(tmp_path: Path) -> None:
    config = policy_config(tmp_path, steps=1)
    file = tmp_path / "two.yaml"
    file.write_text(
        f"tasks:\n  - {{name: one, verb: train, config: [{config}], overrides: [run_dir={tmp_path}/one]}}\n"
        "  - {name: two, verb: convert, source: %s/one/checkpoints/best, target: %s/one/hf, after: [one]}\n"
        % (tmp_path, tmp_path)
    )
    best = ["training.checkpoint.best_metric=eval/testbed/score/accuracy"]
    options = ["--partition=big", "--time=8:00:00", "--dependency=singleton", "--sbatch=hold", "--sbatch=qos=a b"]
    result = launch(
        "--executor=slurm",
        "--dry-run",
        "--experiment",
        str(file),
        *options,
        "device=gpu",
        *best,
        "cluster.train_nodes=4",
    )
    assert result.returncode == 0, result.stderr
    out = result.stdout
    assert re.search(r"train_nodes: 4 +# command line", out)
    one, two = out.split("##### two: script")
    flags = set(re.findall(r"^#SBATCH (\S+.*)", one, re.MULTILINE))
    assert {
        "--nodes=4", "--gpus-per-node=8", "--exclusive", "--requeue", "--signal=B:USR1@900", "--open-mode=append",
        "--kill-on-invalid-dep=yes", "--partition=big", "--time=8:00:00", "--hold", "--qos='a b'",
        "--dependency=singleton", "--job-name=fapo.one",
    } <= flags  # fmt: skip
    assert f"megatron_fapo.launch.job train -c {config}" in one
    assert "##### two: sbatch --requeue --parsable --dependency=afterok:JOB-OF-one" in two
    assert "--nodes=1" in two
    assert "singleton" not in two
    for script in re.findall(r"(?s)^#!.*?(?=^#####|\Z)", out, re.MULTILINE):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert not list((tmp_path / ".nemo_run").glob("experiments/*/*"))
    assert not (tmp_path / "one").exists()


def test_a_container_holds_what_the_job_starts_and_the_conversion_itself(tmp_path: Path) -> None:
    config = policy_config(tmp_path, steps=1)
    file = tmp_path / "two.yaml"
    file.write_text(
        f"tasks:\n  - {{name: one, verb: train, config: [{config}]}}\n"
        "  - {name: two, verb: convert, source: RUN/checkpoints/step_000001, target: RUN/hf, after: [one]}\n".replace(
            "RUN", str(tmp_path / "runs" / "policy")
        )
    )
    out = launch(
        "--executor=slurm", "--dry-run", "--experiment", str(file), "--container=img", "--mounts=/a:/a"
    ).stdout  # fmt: skip
    one, two = out.split("##### two: script")
    assert "export FAPO_CONTAINER=img" in one
    assert "export FAPO_MOUNTS=/a:/a" in one
    assert "--container-image" not in one
    assert re.search(rf"--container-image img --container-mounts {ROOT}:{ROOT},/a:/a,", two)
    assert "python3 -m megatron_fapo.cli convert" in two


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--executor=local"], "either --experiment FILE or -c FILE"),
        (["--executor=local", "--nodes=2", "--detach", "-c", "CONFIG"], "--nodes, --detach only with --executor slurm"),
        (["--executor=local", "--env=A", "-c", "CONFIG"], "write KEY=VALUE, not A"),
        (["--executor=slurm", "-c", "CONFIG"], "no sbatch on this machine"),
        (["--executor=slurm", "--dry-run", "-c", "CONFIG", "seed=-1"], "task train: seed = -1"),
        (["--executor=slurm", "--dry-run", "-c", "CONFIG", "--env=A=/nemo_run/x"], "rewrites every /nemo_run"),
    ],
)
def test_bad_input(arguments: list[str], message: str, tmp_path: Path) -> None:
    config = str(policy_config(tmp_path, steps=1))
    result = launch(*(config if a == "CONFIG" else a for a in arguments), PATH="/nowhere")
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "runs").exists()


def test_the_entry_point_of_nemo_run(tmp_path: Path) -> None:
    """`nemo fapo train` finds it through the metadata of an installed package, which is written here for it."""
    config = policy_config(tmp_path, steps=1)
    info = tmp_path / "site" / "megatron_fapo-0.dist-info"
    info.mkdir(parents=True)
    group = re.search(r"(?s)\nnemo_run.cli =\n *(\S+ = \S+)", (ROOT / "setup.cfg").read_text())
    assert group is not None
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-fapo\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[nemo_run.cli]\n{group[1]}\n")
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    arguments = [f"config={config}", "overrides=seed=3 cluster.train_nodes=2", "run.executor=fapo_slurm"]
    nemo = str(Path(sys.executable).with_name("nemo"))
    for start in ([nemo, "fapo", "train"], [sys.executable, "-m", "megatron_fapo.launch.nemo"]):
        result = subprocess.run(
            [*start, "--yes", "--dryrun", *arguments, "run.executor.partition=big"],
            capture_output=True, text=True, check=False, cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path, "NEMORUN_HOME": str(tmp_path / "home"), "COLUMNS": "200"},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        for flag in ("--partition=big", "--nodes=2", "--signal=B:USR1@900"):
            assert f"#SBATCH {flag}" in result.stdout, result.stdout
        assert result.stdout.count("Entering Experiment") == 1
