"""The process environment that every vLLM of a run starts with: engines and GenRM servers alike.

vLLM reads it at import and at process start, and its child processes inherit it, so it must be complete before
`import vllm`. Facts below were read in and measured with vLLM 0.26.
"""

from __future__ import annotations


def vllm_environment(device: str, *, start_timeout_s: float = 600.0) -> dict[str, str]:
    """Environment variables for a process that will run vLLM.

    Args:
        device: `cpu` or `gpu`.
        start_timeout_s: how long vLLM's front end waits for its engine core.
    """
    environment = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(int(start_timeout_s)),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cpu":
        environment |= {
            # One thread per process: several engines, servers and policy ranks share the cores of a small machine,
            # and thread pools that fight over them made everything ten times slower. It also keeps sums in one order.
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            # The default binds threads to cores that other processes of the run have been bound to as well.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # Keeps the model in the engine core's process: otherwise the CPU platform adds a worker process, and with
            # it one more import of vLLM (20 s).
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            # vLLM compiles small helpers with inductor on first use: seconds of g++ in the middle of a rollout.
            "TORCHDYNAMO_DISABLE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
    return environment
