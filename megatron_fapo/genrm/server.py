"""A GenRM server that we start: vLLM's OpenAI-compatible server as a process tree with a log file.

In: the `genrm` section. Out: a base URL that answers. Usable as a Ray actor (`ray.remote(GenRMServer)`), which gives
it its GPUs and its node, or directly. When its owner goes, however it goes, the whole tree goes (rollout/guard.py).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, Any

from megatron_fapo.config.genrm import GenRMConfig
from megatron_fapo.device import visible_cards
from megatron_fapo.errors import UserError
from megatron_fapo.rollout.environment import vllm_environment
from megatron_fapo.rollout.guard import Guard

_LOG_LINES = 40
_POLL_S = 0.2
_STOP_S = 10.0
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""A proxy cannot see our nodes. Made once: making one reads the machine's certificates, which took a quarter of a core
from a server that started."""
TURN_S = 120.0
"""For a server to fall asleep or to wake: its weights cross to the host's memory and back."""


class ServerStartError(UserError):
    """The server did not come up; the message has the end of its log."""

    def __init__(self, message: str, *, lost: bool = False) -> None:
        """`lost`: a signal ended it or it was too slow, so that another attempt may go well; False: it gave up."""
        super().__init__(message)
        self.lost = lost


class ServerTurnError(RuntimeError):
    """A server did not fall asleep or wake when it was its turn."""


class GenRMServer:
    """One server. `start` and `stop` may be repeated; a new start takes a new port."""

    def __init__(self, config: GenRMConfig, *, device: str, dtype: str, log_path: str, host: str = "127.0.0.1") -> None:
        """
        Args:
            device: `cpu` or `gpu`.
            dtype: as vLLM names it: `float32`, `bfloat16`, or `auto` for the checkpoint's own.
            log_path: what the server writes; kept over restarts.
            host: the address to serve on: this node's, when the driver is on another.
        """
        self._config, self._device, self._dtype, self._host = config, device, dtype, host
        self._log = Path(log_path)
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: Guard | None = None
        self._control: socket.socket | None = None
        self._ordering = threading.Lock()  # answers come in the order of the orders

    def options(self) -> list[str]:
        """The command line of `vllm serve` that the configuration amounts to.

        Raises:
            UserError: no model, or `genrm.vllm` sets what another field sets.
        """
        config = self._config
        if config.model_path is None:
            raise UserError("genrm.model_path is not set: name the GenRM's checkpoint, or set genrm.servers: 0")
        values: dict[str, Any] = {
            "model": config.model_path,
            "served_model_name": config.served_model,
            "dtype": self._dtype,
            "max_model_len": config.max_model_len,
            "tensor_parallel_size": config.tensor_parallel,
            "distributed_executor_backend": "mp" if config.tensor_parallel > 1 else "uni",
            "enforce_eager": config.enforce_eager or self._device == "cpu",
            "disable_log_stats": True,
            "disable_uvicorn_access_log": True,
        }
        if self._device == "cpu":
            length = config.max_model_len or _model_length(config.model_path)
            values |= {
                "max_model_len": length,
                "kv_cache_memory_bytes": int(config.cpu_kv_cache_gb * 2**30),
                # Seeded requests kill vLLM's CPU engine when prompts are read in chunks (rollout/engine.py).
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(length, 4096),
            }
        else:
            values["gpu_memory_utilization"] = config.gpu_memory_utilization
            values["enable_sleep_mode"] = config.colocated
        if taken := sorted(values.keys() & config.vllm.keys()):
            raise UserError(f"genrm.vllm: {', '.join(taken)} is set by other fields of the configuration; use those")
        return [word for name, value in (values | config.vllm).items() for word in _option(name, value)]

    def start(self) -> str:
        """Start the server and wait until it answers; returns its base URL, `http://host:port/v1`.

        Raises:
            ServerStartError: it ended, or did not answer within genrm.start_timeout_s; nothing of it is left.
        """
        options = self.options()
        self._guard = guard = Guard()
        environment = vllm_environment(self._device, start_timeout_s=self._config.start_timeout_s)
        if self._config.api_key_env is not None:
            environment["VLLM_API_KEY"] = os.environ[self._config.api_key_env]
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with socket.socket() as listener, self._log.open("ab") as log:
            listener.bind((self._host, 0))
            port = listener.getsockname()[1]
            self._control, theirs = socket.socketpair()
            with theirs:
                fds = (listener.fileno(), theirs.fileno())
                self._process = process = self._spawn(fds, options, {**environment, **guard.environment}, log)
        address = f"http://{self._host}:{port}"
        deadline = time.monotonic() + self._config.start_timeout_s
        while not _answers(f"{address}/health"):
            code = process.poll()
            if code is not None or time.monotonic() > deadline:
                what = f"ended with exit code {code}" if code is not None else "did not answer in time"
                self.stop()
                raise ServerStartError(self._message(what), lost=code is None or code < 0)
            time.sleep(_POLL_S)
        return f"{address}/v1"

    @staticmethod
    def _spawn(
        fds: tuple[int, int], options: list[str], environment: dict[str, str], log: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        module = "megatron_fapo.genrm.server_process"
        return subprocess.Popen(
            [sys.executable, "-m", module, *map(str, fds), *options],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=fds,
            start_new_session=True,  # a Ctrl-C in the terminal is the driver's to handle
        )

    def _message(self, what: str) -> str:
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
        return f"the GenRM server for {self._config.model_path} {what}; the end of its log {self._log}:\n{tail}"

    def cards(self) -> list[str]:
        """Ray's ids of the GPUs that this process sees; none on CPUs."""
        return visible_cards(self._device)

    def alive(self) -> bool:
        """Whether the server's process runs."""
        return self._process is not None and self._process.poll() is None

    def sleep(self) -> None:
        """Give the memory on the GPU back: weights wait in the host's, the KV cache is dropped, nothing is answered
        until `wake`. On CPUs vLLM keeps its memory, and stops answering all the same. A server that has ended has none.

        Raises:
            ServerTurnError: it did not, within TURN_S.
        """
        if self.alive():
            self._order("sleep")

    def wake(self) -> None:
        """Take the memory again and answer.

        Raises:
            ServerTurnError: it did not, within TURN_S, or has ended.
        """
        self._order("wake")

    def _order(self, order: str) -> None:
        what = f"the GenRM server did not {order}"
        if self._control is None:
            raise ServerTurnError(f"{what}: it was not started")
        try:
            with self._ordering, self._control.makefile(encoding="utf-8") as answers:
                self._control.settimeout(TURN_S)
                self._control.sendall(f"{order}\n".encode())
                answer = answers.readline().strip()
        except OSError as error:
            raise ServerTurnError(f"{what}: {error}; its log is {self._log}") from error
        if answer != "done":
            raise ServerTurnError(f"{what}: {answer or 'it has ended'}; its log is {self._log}")

    def stop(self) -> None:
        """Stop the server, politely first; returns when none of its processes is left.

        May be called from another thread while `start` waits, which then raises.
        """
        process, guard, control = self._process, self._guard, self._control
        self._process = self._guard = self._control = None
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
        if guard is not None:
            guard.release()
        if process is not None:
            process.wait()
        if control is not None:
            control.close()


def _option(name: str, value: Any) -> list[str]:
    """One option of vLLM's command line: None is left out, booleans are flags, maps and lists are JSON."""
    flag = name.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", json.dumps(value) if isinstance(value, dict | list) else str(value)]


def _model_length(model_path: str) -> int:
    path = Path(model_path) / "config.json"
    if not path.exists():
        raise UserError(f"genrm.model_path: {path} does not exist; give the directory of a Hugging Face checkpoint")
    return int(json.loads(path.read_text())["max_position_embeddings"])


def _answers(url: str) -> bool:
    try:
        with _DIRECT.open(url, timeout=5.0) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False
