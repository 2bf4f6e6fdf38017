"""Flawed-Aware Policy Optimization on Megatron-Core and vLLM.

Importing this package imports neither: `policy/` imports megatron, `rollout/`, `genrm/server` and the engine side of
`weight_sync/` import vllm, each inside the process that needs it.
"""

__version__ = "0.1.0"
