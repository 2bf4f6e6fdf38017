"""Imported once, by the process that `vllm_ranks` forks its ranks from: importing vLLM is the dear part."""

import os

from megatron_fapo.rollout.environment import vllm_environment

os.environ.update(vllm_environment("cpu") | {"VLLM_LOGGING_LEVEL": "ERROR"})

import vllm.engine.arg_utils
import vllm.model_executor.model_loader  # noqa: F401
