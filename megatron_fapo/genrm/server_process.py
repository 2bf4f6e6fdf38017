"""The process of a GenRM server: vLLM's OpenAI-compatible server on a socket that its parent has bound.

    python -m megatron_fapo.genrm.server_process SOCKET_FD CONTROL_FD [options of vllm serve]

`vllm serve` wants a port number; whoever picks a free one can lose it before the server binds it, minutes later. Here
the parent binds port 0 and hands the socket down, and with it one end of a pair over which it says `sleep` and `wake`.
vLLM has HTTP endpoints for that too, in a development mode that gives whoever reaches the port calls into the workers.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
from typing import Any


async def obey(control: socket.socket, llm: Any, *, frees_memory: bool) -> None:
    """Fall asleep and wake as the parent says, a line each; the answer is `done`, or what went wrong.

    Args:
        llm: vLLM's AsyncLLM.
        frees_memory: weights sleep in host memory (vLLM's level 1). False, on CPUs: only the scheduler stops (level 0).
    """
    reader, writer = await asyncio.open_unix_connection(sock=control)
    while order := (await reader.readline()).decode().strip():
        try:
            if order == "sleep":
                await llm.sleep(1 if frees_memory else 0)
            else:
                await llm.wake_up(None if frees_memory else ["scheduling"])
            answer = "done"
        except Exception as error:  # for the parent to raise
            answer = " ".join(f"{type(error).__name__}: {error}".split())
        writer.write(f"{answer}\n".encode())
        await writer.drain()


async def serve(listener: socket.socket, control: socket.socket, args: argparse.Namespace) -> None:
    """Serve until SIGTERM or until the engine dies."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.openai.api_server import build_and_serve, decorate_logs, set_ulimit
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    decorate_logs("APIServer", skip_if_decorated=True)
    set_ulimit()
    engine_args = AsyncEngineArgs.from_cli_args(args)
    config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    llm = AsyncLLM.from_vllm_config(config, disable_log_stats=engine_args.disable_log_stats)
    obeying = asyncio.create_task(obey(control, llm, frees_memory=engine_args.enable_sleep_mode))
    try:
        host, port = listener.getsockname()[:2]
        finished = await build_and_serve(llm, f"http://{host}:{port}", listener, args)
    finally:
        obeying.cancel()
        llm.shutdown()
    await finished


def main() -> None:
    """Parse vLLM's own options and serve."""
    import uvloop
    from vllm.entrypoints.openai.api_server import FlexibleArgumentParser, make_arg_parser, validate_parsed_serve_args

    parser = make_arg_parser(FlexibleArgumentParser(prog="GenRM server"))
    args = parser.parse_args(sys.argv[3:])
    validate_parsed_serve_args(args)
    listener, control = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    uvloop.run(serve(listener, control, args))


if __name__ == "__main__":
    main()
