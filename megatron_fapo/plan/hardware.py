"""The cluster and what its parts can do: every rate with its unit and its source.

`--calibrate` replaces rates by name, from a JSON file or fitted to a run. Where a source says `assumed`, it is a guess
that nobody measured here; the plan lists those that its answer rests on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_fapo.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Rates:
    """Of one GPU (or of one process, for `cpu`)."""

    memory_gib: float
    """Memory that the driver reports."""
    context_gib: float
    """Of it, what CUDA, libraries and communicators take outside PyTorch's allocator."""
    peak_tflops: float
    """Dense bfloat16."""
    train_mfu: float
    """Share of the peak that forward and backward reach, recomputed FLOPs counted, tensor communication not."""
    forward_mfu: float
    """Likewise of log-probability passes."""
    logit_train_s: float
    """Seconds of each logit of a tensor rank, forward and backward: its float32 softmax is bound by memory."""
    logit_forward_s: float
    """Likewise, forward alone."""
    memory_gbs: float
    """GB/s of device memory."""
    link_gbs: float
    """GB/s between GPUs of a node, in collectives and refits, each way."""
    network_gbs: float
    """GB/s of a GPU to another node, likewise."""
    decode_base_s: float
    """Seconds of an engine's decoding step beside reading weights and KV: launches, scheduling."""
    decode_sequence_s: float
    """Seconds that each running sequence adds to it: sampling, detokenisation, streaming."""
    judge_factor: float
    """A GenRM server's decoding step against that of an engine of its size: streaming over HTTP, shared processors."""
    prefill_mfu: float
    """Share of the peak that an engine reaches on prompts and, per sequence, in decoding."""
    rule_s: float
    """Seconds of one answer in a verifier process."""
    update_s: float
    """Seconds of an optimizer update beside its GPU work: dealing samples, launches."""
    refit_s: float
    """Seconds of a refit beside its transfers: pausing, post-load steps, checks, cache reset."""


_H100 = Rates(
    memory_gib=79.0, context_gib=3.6, peak_tflops=989.0, train_mfu=0.72, forward_mfu=0.72, logit_train_s=70e-12,
    logit_forward_s=33e-12, memory_gbs=3350.0, link_gbs=340.0, network_gbs=45.0,
    decode_base_s=0.004, decode_sequence_s=35e-6, judge_factor=1.0, prefill_mfu=0.4,
    rule_s=0.0025, update_s=0.22, refit_s=0.5,
)  # fmt: skip
KINDS: dict[str, Rates] = {
    "H100": _H100,
    "H200": dataclasses.replace(_H100, memory_gib=139.0, memory_gbs=4800.0),
    "A100": dataclasses.replace(
        _H100, peak_tflops=312.0, logit_train_s=115e-12, logit_forward_s=54e-12, memory_gbs=2039.0, link_gbs=230.0,
        network_gbs=22.0,
    ),
    "cpu": Rates(
        memory_gib=8.0, context_gib=0.5, peak_tflops=0.1, train_mfu=0.3, forward_mfu=0.3, logit_train_s=0.0,
        logit_forward_s=0.0, memory_gbs=10.0, link_gbs=1.0, network_gbs=1.0,
        decode_base_s=0.005,
        decode_sequence_s=63e-6, judge_factor=1.0, prefill_mfu=0.3, rule_s=0.0025, update_s=0.02, refit_s=0.05,
    ),
}  # fmt: skip

_SHEET, _GUESS, _FITTED = "data sheet", "assumed", "fitted to one H100 (benchmarks/results/plan_check_h100.json)"
SOURCES: dict[str, str] = {
    "memory_gib": _SHEET,
    "context_gib": _FITTED,
    "peak_tflops": _SHEET,
    "train_mfu": _FITTED,
    "forward_mfu": _FITTED,
    "logit_train_s": _FITTED,
    "logit_forward_s": _FITTED,
    "memory_gbs": _SHEET,
    "link_gbs": "assumed: three quarters of NVLink's data sheet",
    "network_gbs": "assumed: nine tenths of 400 (A100: 200) Gbit/s",
    "decode_base_s": _GUESS,
    "decode_sequence_s": _GUESS,
    "judge_factor": _GUESS,
    "prefill_mfu": _GUESS,
    "rule_s": "measured: p50 0.0023 s (benchmarks/results/one_gpu_qwen2.5_coder_0.5b.json)",
    "update_s": _FITTED,
    "refit_s": _GUESS,
}
"""Of the H100's rates. Other kinds take over the fitted shares and times (logits scaled by memory bandwidth), the CPU's
rates are all assumed."""


@dataclass(frozen=True)
class Hardware:
    """A cluster of equal nodes."""

    nodes: int
    gpus_per_node: int
    kind: str
    rates: Rates
    sources: Mapping[str, str] = field(default_factory=lambda: SOURCES)

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def is_cpu(self) -> bool:
        return self.kind == "cpu"

    def __str__(self) -> str:
        return f"{self.nodes}x{self.gpus_per_node}x{self.kind}"


def parse_cluster(text: str) -> Hardware:
    """`8x8xH100`: nodes x GPUs of a node x kind.

    Raises:
        UserError: not of that form, or an unknown kind.
    """
    parts = text.split("x", 2)
    kinds = {name.lower(): name for name in KINDS}
    if len(parts) != 3 or not all(p.isdigit() and int(p) > 0 for p in parts[:2]) or parts[2].lower() not in kinds:
        raise UserError(f"--cluster {text}: write nodes x GPUs x kind, as in 8x8xH100; kinds: {', '.join(KINDS)}")
    kind = kinds[parts[2].lower()]
    return Hardware(int(parts[0]), int(parts[1]), kind, KINDS[kind])


def calibrated(hardware: Hardware, rates: Mapping[str, float], source: str) -> Hardware:
    """The cluster with some of its rates replaced.

    Raises:
        UserError: a name that is no rate, or a value that is not a positive number.
    """
    known = {f.name for f in dataclasses.fields(Rates)}
    if unknown := sorted(set(rates) - known):
        raise UserError(f"{source}: no rate is called {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    if bad := sorted(n for n, v in rates.items() if not isinstance(v, int | float) or isinstance(v, bool) or v <= 0):
        raise UserError(f"{source}: {', '.join(bad)} must be numbers above 0")
    return dataclasses.replace(
        hardware,
        rates=dataclasses.replace(hardware.rates, **{name: float(value) for name, value in rates.items()}),
        sources=dict(hardware.sources) | dict.fromkeys(rates, f"from {source}"),
    )
