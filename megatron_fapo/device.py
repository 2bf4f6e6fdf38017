"""Where tensors live: the one place that decides between CPU and GPU.

Everything else asks here or is told; nothing above `policy/cpu_backend.py` knows that it runs without CUDA.
"""

from __future__ import annotations

import os

from megatron_fapo.errors import UserError


def choose_device(requested: str) -> str:
    """`auto`, `cpu` or `gpu` of the configuration -> `cpu` or `gpu`.

    Raises:
        UserError: `gpu` was asked for and PyTorch sees none.
    """
    import torch

    present = torch.cuda.is_available()
    if requested == "gpu" and not present:
        raise UserError("device: gpu, but PyTorch sees no GPU; use device: cpu, or check the driver with nvidia-smi")
    if requested == "auto":
        return "gpu" if present else "cpu"
    return requested


def choose_dtype(requested: str, device: str) -> str:
    """`auto` -> float32 on CPU (exact and as fast), bfloat16 on GPU."""
    if requested != "auto":
        return requested
    return "bfloat16" if device == "gpu" else "float32"


def visible_cards(device: str) -> list[str]:
    """Ray's ids of the GPUs that this process sees; none on CPUs."""
    return [] if device == "cpu" else os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
