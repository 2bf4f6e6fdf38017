from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.weight_sync.vllm_ranks import VllmRanks


@pytest.fixture(scope="package")
def vllm_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmRanks]:
    """Shared: importing vLLM is the dear part."""
    ranks = VllmRanks(tmp_path_factory.mktemp("rendezvous"))
    yield ranks
    ranks.close()
