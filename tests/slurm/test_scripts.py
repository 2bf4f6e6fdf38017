"""The scripts that users submit: accepted by a real controller at full size, and true to their configurations."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from megatron_fapo.config.load import load_config
from tests.slurm.cluster import SlurmCluster

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "slurm").glob("*.sbatch"))


def test_all_of_them_are_here() -> None:
    named = ["baseline_32b", "baseline_7b", "fapo_32b", "fapo_7b", "genrm_4b", "genrm_serve"]
    assert [f"{name}.sbatch" for name in named] == SCRIPTS


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_controller_accepts_it_at_full_size(slurm_cluster: SlurmCluster, name: str) -> None:
    out = slurm_cluster.run("sbatch", "--test-only", str(ROOT / "slurm" / name))
    assert re.search(r"Job \d+ to start at", out), out
    refused = slurm_cluster.run("sbatch", "--test-only", "--nodes=9", str(ROOT / "slurm" / name), check=False)
    assert "allocation failure" in refused


@pytest.mark.parametrize("name", SCRIPTS)
def test_nodes_and_files_are_those_of_the_configuration(name: str) -> None:
    text = (ROOT / "slurm" / name).read_text()
    config = load_config([ROOT / re.search(r"^exec .* -c (\S+)", text, re.M).group(1)], []).config  # type: ignore[union-attr]
    assert int(re.search(r"--nodes=(\d+)", text).group(1)) == config.cluster.nodes  # type: ignore[union-attr]
    assert f"--gpus-per-node={config.cluster.gpus_per_node} " in text
    assert "--requeue" in text
    assert "--signal=B:USR1@" in text
    assert "--open-mode=append" in text


@pytest.mark.parametrize("path", [*(f"slurm/{name}" for name in SCRIPTS), "slurm/lib/job.sh"])
def test_shell_reads_it(path: str) -> None:
    subprocess.run(["bash", "-n", ROOT / path], check=True)
