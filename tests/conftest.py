"""How `make test` deals the tests to two processes: a folder is for one of them, since its tests share what they start.

The Slurm cluster waits most of the time, so it runs beside the others; then the folders with the longest real runs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

FIRST = ("slurm", "training", "policy", "rollout", "launch", "observe")


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in a hook of its own
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not hasattr(config, "workerinput"):  # one process: in the order of the files
        return
    folders = {item: item.path.relative_to(Path(__file__).parent).parts[0] for item in items}
    items.sort(key=lambda item: FIRST.index(folders[item]) if folders[item] in FIRST else len(FIRST))
    for item in items:
        item.add_marker(pytest.mark.xdist_group(folders[item]))
