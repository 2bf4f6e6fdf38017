from __future__ import annotations

import pickle

import pytest

from megatron_fapo.weight_sync.protocol import (
    Bucket,
    Coverage,
    EngineState,
    EngineVersion,
    Place,
    RefitError,
    StaleEngineError,
    TensorEntry,
    choose_transports,
    verify_due,
)


def entry(name, shape=(2, 2)):
    return TensorEntry(name, "float32", shape, 0, 16)


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


def test_coverage_wants_every_tensor_once_in_its_shape():
    coverage = Coverage({"a": (2, 2), "b": (4,)}, frozenset({"lm_head.weight"}))
    coverage.add([entry("a"), entry("lm_head.weight", (9, 9))])
    with pytest.raises(RefitError, match="1 of 2 tensors were never sent: b"):
        coverage.require_complete()
    with pytest.raises(RefitError, match="a was sent twice"):
        coverage.add([entry("a")])
    with pytest.raises(RefitError, match=r"b has shape \(2, 2\).*\(4,\)"):
        coverage.add([entry("b")])
    with pytest.raises(RefitError, match="c is not in the engine's checkpoint"):
        coverage.add([entry("c")])
    coverage.add([entry("b", (4,))])
    coverage.require_complete()


def test_long_lists_of_missing_tensors_are_shortened():
    with pytest.raises(RefitError, match=r"12 of 12 .*: t00, t01, t02, t03, t04 and 7 more$"):
        Coverage({f"t{i:02}": (1,) for i in range(12)}).require_complete()


def test_a_bucket_survives_the_wire():
    bucket = Bucket("host", "cuda_ipc", ("uuid", b"\x00\xff", 3, True), 16, (entry("a"),), 0.5)
    wire = bucket.to_wire() | {"handle": list(bucket.handle)}  # msgpack makes lists of tuples
    wire["entries"] = [e | {"shape": list(e["shape"])} for e in wire["entries"]]
    assert Bucket.from_wire(wire) == bucket
    assert len(pickle.dumps(bucket)) < 500


A, B = "node-a", "node-b"


@pytest.mark.parametrize(
    ("senders", "engines", "transports"),
    [
        ([Place(A, ("GPU-1",))], [Place(A, ("GPU-1",))], [["cuda_ipc"]]),
        ([Place(A, ("GPU-1",))] * 2, [Place(A, ("GPU-1", "GPU-1"))], [["cuda_ipc"], ["cuda_ipc"]]),
        ([Place(A, ("GPU-1",))], [Place(A, ("GPU-2",))], [["shm"]]),
        ([Place(A, ("GPU-1",))], [Place(A, ("GPU-1",)), Place(A, ("GPU-2",))], [["shm", "shm"]]),
        ([Place(A, ("",))], [Place(A, ("",))], [["shm"]]),
        ([Place(A, ("",))], [Place(B, ("",)), Place(A, ("",))], [["network", "shm"]]),
        ([Place(A, ("GPU-1",))], [Place(B, ("GPU-1",))], [["network"]]),
        ([Place(A, ("GPU-1",))], [Place(A, ("GPU-1",)), Place(B, ("GPU-1",))], [["shm", "network"]]),
        ([Place(A, ("",)), Place(B, ("",))], [Place(A, ("",))] * 2, [["shm", "shm"], ["network", "network"]]),
    ],
)
def test_memory_is_shared_on_a_node_and_device_memory_on_one_card(senders, engines, transports):
    assert choose_transports(senders, engines) == transports


def test_the_first_refit_is_always_verified():
    assert [verify_due(i, 0) for i in range(4)] == [True, False, False, False]
    assert [verify_due(i, 2) for i in range(5)] == [True, False, True, False, True]
