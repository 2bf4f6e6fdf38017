"""Where the time of a profiled step went, by groups of kernels (on a CPU: of operators)."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch

OUTPUT_LAYER, OPTIMIZER, COMMUNICATION = "output layer", "optimizer", "communication"
KERNELS = (
    (COMMUNICATION, r"nccl|gloo|c10d"),
    ("attention", r"fmha|flash|attention|attn|sdpa|cudnn.*softmax"),
    ("gemm", r"gemm|cutlass|cublas|nvjet|xmma|splitk|aten::(mm|addmm|bmm|matmul|linear|baddbmm)$"),
)
"""What a kernel does, from its name; the first that matches, else it is a norm or elementwise."""
OTHER = "norm, elementwise, copies"


def group_of(kernel: str, ops: Iterable[str]) -> str:
    """Of a kernel that the operators `ops` launched, inner ones first. The output layer and the optimizer are told by
    who launched: their kernels have names that others have too."""
    if re.search(KERNELS[0][1], kernel, re.IGNORECASE):
        return COMMUNICATION
    for op in ops:
        if op.startswith("_LogprobEntropy"):
            return OUTPUT_LAYER
        if op == OPTIMIZER:
            return OPTIMIZER
    return next((group for group, names in KERNELS if re.search(names, kernel, re.IGNORECASE)), OTHER)


def busy(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of the spans."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def summarize(profile: Any, seconds: float) -> tuple[dict[str, float], str]:
    """(milliseconds by group, a text with the kernels of each). Groups that run at the same time overlap; `idle` is
    what of the step no kernel ran in."""
    groups: dict[str, Counter[str]] = defaultdict(Counter)
    spans = []
    events = profile.events()
    on_gpu = any(e.device_type == torch.autograd.DeviceType.CUDA for e in events)
    for event in events:
        if on_gpu and event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            spans.append((event.time_range.start, event.time_range.end))
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        ops, parent = [], event
        while parent is not None:
            ops.append(parent.name)
            parent = parent.cpu_parent
        work = [(k.name, k.duration) for k in event.kernels] if on_gpu else [(event.name, event.self_cpu_time_total)]
        for name, duration in work:
            groups[group_of(name, ops)][name] += duration
    total = {group: sum(names.values()) / 1e3 for group, names in groups.items()}
    if on_gpu:
        total["idle"] = seconds * 1e3 - busy(spans) / 1e3
    total = dict(sorted(total.items(), key=lambda item: -item[1]))
    lines = [f"step {seconds * 1e3:.1f} ms (profiled)"]
    for group, ms in total.items():
        lines.append(f"\n{group}: {ms:.2f} ms")
        lines += [f"  {us / 1e3:9.3f} ms  {name[:150]}" for name, us in groups[group].most_common(12)]
    return {group: round(ms, 2) for group, ms in total.items()}, "\n".join(lines) + "\n"
