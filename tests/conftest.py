"""How `make test` deals the tests to two processes: a folder is for one of them, since its tests share what they start.

The Slurm cluster waits most of the time, so it runs beside the others; then the folders with the longest real runs.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

# Ray's actors have a niceness of 15: beside the ranks of tests/policy on both cores, a run would take minutes to start.
os.environ.setdefault("RAY_worker_niceness", "0")
FIRST = ("slurm", "training", "policy", "weight_sync", "rollout", "genrm", "observe", "launch", "faults")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # else one process, in the order of the files
        items.sort(key=lambda item: FIRST.index(folder) if (folder := _folder(item.nodeid)) in FIRST else len(FIRST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole folders. Marks of groups would say the same, but pytest 9.2 does not show them to xdist 3.8."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFolder(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _folder(nodeid)

    return ByFolder(config, log)


def _folder(nodeid: str) -> str:
    return nodeid.split("/")[1]
