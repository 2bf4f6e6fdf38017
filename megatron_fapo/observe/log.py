"""One logging set-up for every process of a run: `logs/<role>-<rank>.log`, and the terminal for the driver."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TextIO

LOGGER = "megatron_fapo"


class _Terminal(logging.Handler):
    """Writes to whatever sys.stderr is now: a live display replaces it while it is on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        stream: TextIO = sys.stderr
        stream.write(self.format(record) + "\n")
        stream.flush()


def setup_logging(run_dir: Path, role: str, rank: int = 0, terminal: bool = False) -> Path:
    """Send what this process logs under `megatron_fapo` to its own file (appended to, so that a resumed run keeps what
    went before), and with `terminal` to stderr too. Calling it again replaces the earlier set-up. Returns the file."""
    path = run_dir / "logs" / f"{role}-{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger(LOGGER)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {role}-{rank} %(name)s: %(message)s"))
    logger.addHandler(file)
    if terminal:
        handler = _Terminal()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    # The root logger belongs to the libraries: handlers that vLLM and Ray put there would print every line again.
    logger.propagate = False
    return path
