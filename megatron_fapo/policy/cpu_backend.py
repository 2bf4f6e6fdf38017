"""megatron-core on a CPU: what CUDA would answer, answered by the CPU.

mcore 0.19 trains on gloo once about a hundred places that name CUDA get a CPU answer. `install()` gives these answers
by replacing functions of `torch.cuda` and the tensor factories, in this process only, before megatron is imported. It
is called once at the start of a policy worker without a GPU and touches nothing of megatron's mathematics; the tests
hold TP1 = TP2+SP = PP2 = DP2 on it.

| what mcore asks                               | the answer here                                   |
|-----------------------------------------------|---------------------------------------------------|
| current_device(), device="cuda", .cuda()      | the CPU                                           |
| CUDA random state                             | the CPU generator's state                         |
| streams, events, synchronize, nvtx, empty_cache | nothing to do                                   |
| param.type() == "torch.cuda.FloatTensor"      | the name with `cuda.`                             |
| torch.compile of fused helpers                | off (compilation costs more than it saves here)   |
| which parameters are the device's (hybrid optimizer) | all, until it copies them for the host     |
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

import torch

_FACTORIES = (
    "tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint", "as_tensor", "empty_strided",
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like",
)  # fmt: skip

_installed = False


def _is_cuda(device: Any) -> bool:
    return isinstance(device, int) or (device is not None and str(device).startswith("cuda"))


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The factory, with any CUDA `device=` read as the CPU and pinned memory as plain memory."""

    @functools.wraps(function)
    def factory(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return factory


class _Stream:
    """A stream or event on a device that has no queues: everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None

    def record_event(self) -> _Stream:
        return self

    def query(self) -> bool:
        return True


def _answer(value: Any) -> Callable[..., Any]:
    """A new function that returns `value`. New each time: dynamo keeps rules by identity and refuses one function
    under two names, which is also why torch.cuda.manual_seed must not simply be torch.manual_seed."""
    return lambda *args, **kwargs: value


def _rng_getter() -> Callable[..., torch.Tensor]:
    return lambda *args, **kwargs: torch.get_rng_state()


def _rng_setter() -> Callable[..., None]:
    return lambda new_state, *args, **kwargs: torch.set_rng_state(new_state)


def _seeder() -> Callable[[int], None]:
    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    return manual_seed


def _hybrid_groups(self: Any, fraction: float) -> tuple[Any, ...]:
    """The parameters of mcore's hybrid optimizer: the first `fraction` as copies for the "host", the others for the
    "device". mcore tells the two by `is_cuda`, and here would take all for the host's and miss their copies."""
    budget = fraction * sum(parameter.numel() for group in self.param_groups for parameter in group["params"])
    copies: dict[Any, Any] = {}
    wide: dict[Any, Any] = {}
    groups: tuple[list[Any], list[Any]] = ([], [])
    for group in self.param_groups:
        halves: tuple[list[Any], list[Any]] = ([], [])
        for original in group["params"]:
            on_host = budget > 0
            parameter = original.detach().clone() if on_host else original
            if self.param_update_in_fp32 and original.dtype != torch.float32:
                wide[original] = parameter = parameter.detach().clone().float()
            if on_host:
                budget -= original.numel()
                copies[original] = parameter
            halves[not on_host].append(parameter)
        for side, half in zip(groups, halves, strict=True):
            if half:
                side.append({**group, "params": half})
    return *groups, copies, {copy: original for original, copy in copies.items()}, wide


def _split_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """How many tokens go to each expert rank: mcore makes numbers of them only on the way from a GPU."""
    del record_stream
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def install() -> None:
    """Make this process answer for CUDA with the CPU. Call before importing megatron; a second call does nothing.

    Raises:
        RuntimeError: a GPU is present; hiding it would train on the wrong device.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise RuntimeError("policy.cpu_backend.install() on a machine with a GPU; set device: gpu or hide the GPU")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"

    cuda: Any = torch.cuda
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, _answer(None))
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        setattr(cuda, name, _answer(0))
    cuda.current_device = _answer(torch.device("cpu"))
    cuda.is_current_stream_capturing = _answer(False)
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream, cuda.default_stream = _answer(_Stream()), _answer(_Stream())
    cuda.stream, cuda.device = _answer(contextlib.nullcontext()), _answer(contextlib.nullcontext())
    cuda.nvtx.range_push, cuda.nvtx.range_pop = _answer(None), _answer(None)
    cuda.get_rng_state, cuda.set_rng_state = _rng_getter(), _rng_setter()
    cuda.manual_seed = _seeder()

    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *a, **k: self
    torch.nn.Module.cuda = lambda self, *a, **k: self
    plain_type, plain_to = tensor.type, tensor.to

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """mcore's optimizer accepts parameters by the type name `torch.cuda.*Tensor` only."""
        name = plain_type(self, *args, **kwargs)
        return name.replace("torch.", "torch.cuda.") if isinstance(name, str) else name

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if args and _is_cuda(args[0]):
            args = ("cpu", *args[1:])
        return plain_to(self, *args, **kwargs)

    tensor.type, tensor.to = type_name, to
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))

    # random.py of mcore reaches into the CUDA generators with functions of its own.
    import megatron.core.tensor_parallel.random as mcore_random

    mcore_random._get_cuda_rng_state = _rng_getter()
    mcore_random._set_cuda_rng_state = _rng_setter()

    from megatron.core.transformer.moe import token_dispatcher

    token_dispatcher.maybe_move_tensor_to_cpu = _split_sizes

    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    HybridDeviceOptimizer._get_sub_optimizer_param_groups = _hybrid_groups
    _installed = True
