from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.policy.models import write_model
from tests.policy.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes shared by all tests of the policy: importing megatron is the dear part."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(Path(tmp_path_factory.mktemp("qwen3")))
