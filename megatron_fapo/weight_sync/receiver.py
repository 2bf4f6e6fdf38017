"""The engine's side of a refit, inside vLLM's worker process."""

from __future__ import annotations


class RefitReceiver:
    """Mixed into vLLM's worker (`worker_extension_cls`); its methods are called by name through `collective_rpc`."""
