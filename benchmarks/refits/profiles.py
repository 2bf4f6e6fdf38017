"""What vLLM's workers do during a refit, operation by operation: functions to run on them, before it and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def begin_profile(worker: Any) -> None:
    """Record from now on, in the thread in which vLLM calls its workers."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if worker.device.type == "cuda" else []
    worker.refit_profile = torch.profiler.profile(activities=activities)
    worker.refit_profile.__enter__()


def end_profile(worker: Any, directory: str, engine: int) -> None:
    """Write what was recorded: a table of operations, and a trace for chrome://tracing."""
    worker.refit_profile.__exit__(None, None, None)
    own = "self_device_time_total" if worker.device.type == "cuda" else "self_cpu_time_total"
    stem = Path(directory) / f"engine-{engine}-worker-{worker.rank}"
    stem.with_suffix(".txt").write_text(worker.refit_profile.key_averages().table(sort_by=own, row_limit=40))
    worker.refit_profile.export_chrome_trace(str(stem.with_suffix(".json")))
    del worker.refit_profile
