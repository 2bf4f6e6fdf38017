"""The process of a GenRM server: vLLM's OpenAI-compatible server on a socket that its parent has bound.

    python -m megatron_fapo.genrm.server_process SOCKET_FD [options of vllm serve]

`vllm serve` wants a port number; whoever picks a free one can lose it before the server binds it, minutes later. Here
the parent binds port 0 and hands the socket down.
"""

from __future__ import annotations

import argparse
import socket
import sys


async def serve(listener: socket.socket, args: argparse.Namespace) -> None:
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
    try:
        host, port = listener.getsockname()[:2]
        finished = await build_and_serve(llm, f"http://{host}:{port}", listener, args)
    finally:
        llm.shutdown()
    await finished


def main() -> None:
    """Parse vLLM's own options and serve."""
    import uvloop
    from vllm.entrypoints.openai.api_server import FlexibleArgumentParser, make_arg_parser, validate_parsed_serve_args

    parser = make_arg_parser(FlexibleArgumentParser(prog="GenRM server"))
    args = parser.parse_args(sys.argv[2:])
    validate_parsed_serve_args(args)
    uvloop.run(serve(socket.socket(fileno=int(sys.argv[1])), args))


if __name__ == "__main__":
    main()
