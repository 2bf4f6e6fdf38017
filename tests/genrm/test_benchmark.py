"""The faults of benchmarks/reward_loop.py at a size for a test: real processes hang, die, and talk nonsense."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "reward_loop.py"
CASES = ["burst", "hang", "killed", "babbler", "tail"]


def test_no_fault_loses_a_verdict_or_makes_one_wrong(tmp_path: Path) -> None:
    size = ["--quick", "--problems", "150", "--p50-ms", "20"]
    out = tmp_path / "rows.json"
    command = [sys.executable, str(SCRIPT), "--systems", "megatron_fapo", "--cases", *CASES, *size, "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {row["case"]: row for row in json.loads(out.read_text())}
    fates = {case: (row["lost"], row["wrong"], row["ended"]) for case, row in rows.items()}
    assert fates == dict.fromkeys(CASES, (0, 0, True)), done.stdout
    assert rows["babbler"]["notes"][0]["genrm/unparsable"] >= 1
    for case in ("hang", "killed"):
        assert any(name.startswith("genrm/failed/") for name in rows[case]["notes"][0]), case
