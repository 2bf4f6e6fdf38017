from __future__ import annotations

import pytest

from megatron_fapo.weight_sync.protocol import (
    EngineState,
    EngineVersion,
    RefitError,
    StaleEngineError,
    share_to_verify,
)


def test_an_engine_serves_only_whole_versions():
    engine = EngineVersion(3)
    assert engine.require_fresh() == 3
    engine.begin()
    with pytest.raises(StaleEngineError, match=r"updating.*version 3"):
        engine.require_fresh()
    engine.complete(4)
    assert engine.require_fresh() == 4


def test_a_failure_leaves_it_stale_until_a_whole_refit():
    engine = EngineVersion(3)
    engine.begin()
    engine.fail()
    with pytest.raises(StaleEngineError, match="stale"):
        engine.require_fresh()
    with pytest.raises(RefitError, match="no refit is under way"):
        engine.complete(4)
    engine.begin()
    engine.complete(4)
    assert (engine.state, engine.version) == (EngineState.FRESH, 4)


def test_refits_do_not_overlap():
    engine = EngineVersion(0)
    with pytest.raises(RefitError, match="no refit"):
        engine.require_updating()
    engine.begin()
    with pytest.raises(RefitError, match="under way"):
        engine.begin()


def test_the_first_refit_is_always_verified_whole():
    assert [share_to_verify(i, 0, 0.1) for i in range(4)] == [1, 0.1, 0.1, 0.1]
    assert [share_to_verify(i, 2, 0.1) for i in range(5)] == [1, 0.1, 1, 0.1, 1]
