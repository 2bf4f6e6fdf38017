"""The cluster of the Slurm tests: one for the session."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster, missing


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """Eight nodes of eight pretended GPUs. Skipped where Slurm is not installed, but never where changes are judged."""
    if why := missing():
        if os.environ.get("CI"):
            pytest.fail(f"the Slurm tests must run here: {why}")
        pytest.skip(why)
    cluster = SlurmCluster(Path(tempfile.mkdtemp(prefix="fs", dir="/tmp")), nodes=8)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(cluster.root, ignore_errors=True)
