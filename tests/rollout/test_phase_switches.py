"""Policy and engine in turns leave nothing behind: a short run of benchmarks/phase_switches.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.phase_switches import Held, Reading, residue, switches
from megatron_fapo.config.root import Config
from megatron_fapo.training.cluster import Cluster, make_policy
from tests.rollout.conftest import Engine, run

HELD = Held("ray::RolloutEngine", 500.0, 70, 35, 1)
READING = Reading({7: HELD}, 1, 0.0, {"memory/train/optimizer_gib": 1.0, "memory/train/host_gib": 2.0})


@pytest.mark.parametrize(
    ("late", "named"),
    [
        (replace(READING, processes={7: replace(HELD, resident_mib=626.0)}), "(7) has 126 MiB resident more"),
        (replace(READING, processes={7: replace(HELD, files=115)}), "has 45 files more"),
        (replace(READING, processes={7: replace(HELD, shared_maps=2)}), "has 1 shared_maps more"),
        (replace(READING, processes={7: HELD, 9: HELD}), "(9) is new"),
        (replace(READING, stored_objects=46), "object store has 45 objects more"),
        (replace(READING, stored_mib=2.6), "object store has 2.6 MiB more"),
        (
            replace(READING, ledger=READING.ledger | {"memory/train/optimizer_gib": 1.001}),
            "optimizer_gib has 1.02",
        ),
    ],
)
def test_what_a_switch_leaves_behind_is_named(late: Reading, named: str) -> None:
    (found,) = residue(READING, late)
    assert named in found


def test_what_settles_is_not_called_residue() -> None:
    settled = replace(HELD, resident_mib=530.0, files=71, threads=30)
    assert residue(READING, replace(READING, processes={7: settled}, stored_objects=2, stored_mib=0.002)) == []


def test_fifteen_switches_leave_nothing_behind(engine: Engine, tmp_path: Path) -> None:
    config = Config.model_validate(
        {
            "run_dir": str(tmp_path),
            "device": "cpu",
            "policy": {"model_path": str(engine.checkpoints[1]), "offload": True},
            "rollout": {"colocated": True},
        }
    )
    policy = make_policy(config, "cpu")

    async def scenario() -> tuple[Reading, Reading]:
        try:
            await policy.start(device="cpu", dtype="float32")
            rounds, early, late = await switches(Cluster(config, "cpu", policy, engine.pool), 15, 5)
        finally:
            await policy.shutdown()
        assert rounds[-1]["memory/rollout/parameters_gib"] == 0 < rounds[-1]["memory/refit/parameters_gib"]
        return early, late

    early, late = run(scenario())
    assert residue(early, late) == []
    assert any("Policy" in held.title for held in late.processes.values()), "the test means to look at policy ranks"
