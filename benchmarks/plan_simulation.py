"""How far `fapo plan`'s simulated steps are from measured ones.

    python benchmarks/plan_simulation.py RUN_OR_RECORDS -c CONFIG [--record FILE] [section.key=value ...]

Rates are fitted to some steps of a run and the phases of the others are predicted, from the lengths of their samples:
once first half -> second half, once odd -> even steps. The second leaves out that the machine itself became faster or
slower during the run. `--record` writes every second step's lengths and phases to a small file, which is read likewise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.run_table import machine
from megatron_fapo.config.load import load_config
from megatron_fapo.config.root import asks_genrm
from megatron_fapo.plan.calibrate import fit
from megatron_fapo.plan.hardware import parse_cluster
from megatron_fapo.plan.layouts import Planner
from megatron_fapo.plan.lengths import find_lengths, read_records, write_records
from megatron_fapo.plan.shapes import find_shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("-c", "--config", type=Path, required=True, help="what the run ran with")
    parser.add_argument("--cluster", default="1x2xcpu")
    parser.add_argument("--record", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    config, records = load_config([args.config], args.overrides).config, read_records(args.run)
    shape, _ = find_shape(config.policy.model_path, "policy.model_path")
    judges = asks_genrm(config) and config.genrm.servers > 0
    judge = find_shape(config.genrm.model_path or "", "genrm.model_path")[0] if judges else None
    planner = Planner(config, shape, judge, parse_cluster(args.cluster), find_lengths(None, config, judges))
    half = len(records) // 2
    for name, known, unseen in (
        ("first half -> second half", records[:half], records[half:]),
        ("odd steps -> even steps", records[::2], records[1::2]),
    ):
        errors = fit(planner, known, str(args.run)).errors(unseen)
        print(f"{name:<27}" + "  ".join(f"{phase} {error:+.1%}" for phase, error in errors.items()))
    if args.record:
        about = {"machine": str(machine()), "run": " ".join([args.config.name, *args.overrides])}
        write_records(records[::2], args.record, about)


if __name__ == "__main__":
    main()
