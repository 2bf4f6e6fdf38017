"""`fapo doctor --slurm` on a real cluster whose GPUs are pretended: the card that Slurm gives and nvidia-smi lacks."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.slurm.cluster import SlurmCluster


def test_every_node_reports(slurm_cluster: SlurmCluster, tmp_path):
    words = ["doctor", "--slurm", "--json", "--partition=batch", "--nodes=2", f"--dir={tmp_path}"]
    command = [sys.executable, "-m", "megatron_fapo.cli", *words]
    done = subprocess.run(command, env=slurm_cluster.env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    nodes = [report["node"] for report in told["reports"]]
    assert nodes == slurm_cluster.names[:2]
    assert all(report["measured"]["disk_write_mb_s"] > 0 for report in told["reports"])
    named = {problem["node"] for problem in told["problems"] if "8" in problem["what"] and "GPUs" in problem["what"]}
    assert named == set(nodes)
    assert list(tmp_path.iterdir()) == []
