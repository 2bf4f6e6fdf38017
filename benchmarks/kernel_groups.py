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
    (OPTIMIZER, r"adam|multi_tensor"),
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
    """(milliseconds by group, a text with the kernels of each and what the host did). Groups that run at the same time
    overlap; `idle` is what of the step no kernel ran in."""
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    events = profile.events()
    host = [e for e in events if e.device_type == cpu]
    kernels = [e for e in events if e.device_type == cuda and not e.is_user_annotation]
    groups: dict[str, Counter[str]] = defaultdict(Counter)
    # Extensions launch kernels outside of any operator: what stays here after the operators took theirs.
    unclaimed: Counter[str] = Counter()
    for kernel in kernels:
        unclaimed[kernel.name] += kernel.time_range.elapsed_us()
    for event in host:
        ops, parent = [], event
        while parent is not None:
            ops.append(parent.name)
            parent = parent.cpu_parent
        work = [(k.name, k.duration) for k in event.kernels] if kernels else [(event.name, event.self_cpu_time_total)]
        for name, duration in work:
            groups[group_of(name, ops)][name] += duration
            unclaimed[name] -= duration
    if kernels:
        for name, duration in unclaimed.items():
            groups[group_of(name, ())][name] += max(duration, 0)
    total = {group: sum(names.values()) / 1e3 for group, names in groups.items()}
    if kernels:
        spans = [(e.time_range.start, e.time_range.end) for e in kernels]
        total["idle"] = seconds * 1e3 - busy(spans) / 1e3
        groups["host, its own time"] = Counter()
        for event in host:
            groups["host, its own time"][event.name] += event.self_cpu_time_total
    total = dict(sorted(total.items(), key=lambda item: -item[1]))
    calls = Counter(e.name for e in host)
    lines = [f"step {seconds * 1e3:.1f} ms (profiled), {len(kernels)} kernels"]
    for group in [*total, *(groups.keys() - total.keys())]:
        lines.append(f"\n{group}: {total[group]:.2f} ms" if group in total else f"\n{group}")
        top = groups[group].most_common(25 if group not in total else 12)
        lines += [f"  {us / 1e3:9.3f} ms {calls[name] or '':>6}  {name[:140]}" for name, us in top]
    return {group: round(ms, 2) for group, ms in total.items()}, "\n".join(lines) + "\n"
