"""What a run leaves behind when it fails: one message, an exit code, and `failure.json` for whoever started it."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from megatron_fapo.observe.files import write_atomically
from megatron_fapo.processes import ProcessDiedError
from megatron_fapo.training.signals import EXIT_LOST

FILE = "failure.json"
EXIT_FAILED = 1

log = logging.getLogger(__name__)


def forget_failure(run_dir: Path) -> None:
    """Remove what an earlier attempt left."""
    (run_dir / FILE).unlink(missing_ok=True)


def report_failure(run_dir: Path, error: Exception, step: int) -> int:
    """Say what ended the run after `step` finished steps: in the driver's log, on the terminal and in failure.json.

    Returns the exit code: 76 when a process or node is gone, else 1.
    """
    code = EXIT_LOST if isinstance(error, ProcessDiedError) and error.lost else EXIT_FAILED
    where: dict[str, Any] = {"role": "driver", "rank": 0, "node": None, "node_index": 0, "address": None}
    log_path: Path | None = run_dir / "logs" / "driver-0.log"
    what = f"{type(error).__name__}: {error}"
    if isinstance(error, ProcessDiedError):
        process, what, log_path = error.process, error.what, error.process.log_path
        node = process.node
        where = {"role": process.role, "rank": process.rank, "node": node.name or None}
        where |= {"node_index": node.index, "address": node.address}
    facts = {"what": what, "log_path": log_path and str(log_path), "exit_code": code, "step": step, "time": time.time()}
    write_atomically(run_dir / FILE, json.dumps(where | facts, indent=2) + "\n")
    log.error("%s", error)
    if code == EXIT_LOST:
        log.error("%d steps are finished; go on with --resume", step)
    return code
