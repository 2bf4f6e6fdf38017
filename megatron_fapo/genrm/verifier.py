"""The rule, and the user's function in its place, under a deadline and in processes that can be killed.

A hang or a crash costs one worker, which is killed and replaced, and one sample, which is unscored. Threads could not
be stopped, and alarm signals do not work off the main thread.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pickle
import signal
import sys
from collections import deque
from typing import Any

from megatron_fapo.config.reward import RewardConfig
from megatron_fapo.data.records import Sample
from megatron_fapo.errors import UserError
from megatron_fapo.genrm.rules import RuleResult
from megatron_fapo.genrm.user_function import (
    COMPUTE_SCORE,
    UserScore,
    describe_error,
    is_async,
    load_function,
    read_score,
)
from megatron_fapo.genrm.verdict import Reason, Unscored
from megatron_fapo.genrm.verifier_worker import HEADER_BYTES

log = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
"""For imports and warm-up of a worker."""
START_ATTEMPTS = 3


class VerifierUnavailable(UserError):
    """Workers do not start; says why."""


class _Worker:
    """One child process. Its own session, so that one kill also reaches what a user's function started."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, setup: dict[str, Any]) -> _Worker:
        search_path = os.pathsep.join(path or os.getcwd() for path in sys.path)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "megatron_fapo.genrm.verifier_worker", str(os.getpid())),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": search_path},
            start_new_session=True,
        )
        worker = cls(process)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                ready = await worker.call(pickle.dumps(setup))
            if "error" in ready:
                raise VerifierUnavailable(f"a verifier worker cannot start:\n{ready['error']}")
        except (TimeoutError, OSError, EOFError) as error:
            code = await worker.kill()
            raise VerifierUnavailable(
                f"a verifier worker did not start within {START_TIMEOUT_S:g} s (exit code {code}): see its stderr"
            ) from error
        except BaseException:
            await worker.kill()
            raise
        return worker

    async def call(self, payload: bytes) -> dict[str, Any]:
        """Sends a request and waits for the reply. Raises OSError or EOFError when the process is gone."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(len(payload).to_bytes(HEADER_BYTES, "big") + payload)
        await stdin.drain()
        length = int.from_bytes(await stdout.readexactly(HEADER_BYTES), "big")
        reply: dict[str, Any] = json.loads(await stdout.readexactly(length))
        return reply

    async def kill(self) -> int:
        """Kills the process and what it started; its exit code (of its own, if it was dead already)."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            log.debug("worker %d was gone already", self._process.pid)
        return await self._process.wait()


class Verifier:
    """Scores final answers by rule, or whole samples by the user's function. Belongs to one event loop."""

    def __init__(self, config: RewardConfig) -> None:
        """Raises UserError when `reward.compute_score` cannot be used."""
        self._config = config
        kwargs, path = config.compute_score_kwargs, config.compute_score
        self._function = None if path is None else load_function(path, COMPUTE_SCORE, kwargs)
        self._in_loop = self._function is not None and is_async(self._function)
        self._setup = {"verifier": config.verifier, "compute_score": path, "kwargs": kwargs}
        self._idle: deque[_Worker | VerifierUnavailable] = deque()
        self._places = asyncio.Semaphore(0)  # counts _idle; an asyncio.Queue would let newcomers overtake who waits
        self._workers: set[_Worker] = set()
        self._replacing: set[asyncio.Task[None]] = set()
        self._closed = False
        self.replaced = 0
        """Workers killed and replaced so far."""

    async def start(self) -> None:
        """Starts and warms up the workers. Raises VerifierUnavailable when one does not start."""
        count = 0 if self._in_loop else self._config.verifier_processes
        started = await asyncio.gather(*(self._add_worker() for _ in range(count)), return_exceptions=True)
        errors = [outcome for outcome in started if outcome is not None]
        if errors:
            await self.close()
            raise errors[0]

    async def verify(self, solution: str, ground_truth: str) -> RuleResult | Unscored:
        """Whether the solution's final answer is right, by `reward.verifier`."""
        reply = await self._call((solution, ground_truth), Reason.VERIFIER_CRASH)
        return reply if isinstance(reply, Unscored) else RuleResult(**reply)

    async def compute_score(self, sample: Sample) -> UserScore | Unscored:
        """The user's score of a sample."""
        arguments = {
            "data_source": sample.prompt.data_source,
            "solution_str": sample.text,
            "ground_truth": sample.prompt.ground_truth,
            "extra_info": dict(sample.prompt.extra_info),
        }
        if not self._in_loop:
            reply = await self._call(arguments, Reason.COMPUTE_SCORE_ERROR)
            return reply if isinstance(reply, Unscored) else UserScore(**reply)
        assert self._function is not None
        deadline = asyncio.timeout(self._config.verifier_timeout_s)
        try:
            async with deadline:
                return read_score(await self._function(**arguments, **self._config.compute_score_kwargs))
        except Exception as error:
            if deadline.expired():
                return self._timed_out()
            return Unscored(Reason.COMPUTE_SCORE_ERROR, describe_error(error))

    async def close(self) -> None:
        """Leaves no process behind. Whoever still waits for a worker gets VerifierUnavailable."""
        self._closed = True
        self._idle.clear()
        self._offer(VerifierUnavailable("the verifier is closed"))
        for task in self._replacing:
            task.cancel()
        await asyncio.gather(*self._replacing, return_exceptions=True)
        await asyncio.gather(*(worker.kill() for worker in self._workers))
        self._workers.clear()

    async def _call(self, request: Any, on_error: Reason) -> dict[str, Any] | Unscored:
        payload = pickle.dumps(request)
        await self._places.acquire()
        worker = self._idle.popleft()
        if isinstance(worker, VerifierUnavailable):
            self._offer(worker)  # for the next one who asks
            raise worker
        healthy = False
        try:
            async with asyncio.timeout(self._config.verifier_timeout_s):
                reply = await worker.call(payload)
            healthy = True
        except TimeoutError:
            return self._timed_out()
        except (OSError, EOFError):
            return Unscored(Reason.VERIFIER_CRASH, f"the worker died with exit code {await worker.kill()}")
        finally:  # also when cancelled: the worker is still busy with a sample that nobody wants
            if healthy and not self._closed:
                self._offer(worker)
            else:
                self._replace(worker)
        return Unscored(on_error, reply["error"]) if "error" in reply else reply

    def _timed_out(self) -> Unscored:
        return Unscored(Reason.VERIFIER_TIMEOUT, f"no result within {self._config.verifier_timeout_s:g} s")

    def _replace(self, worker: _Worker) -> None:
        if self._closed:
            return
        self.replaced += 1
        task = asyncio.create_task(self._kill_and_replace(worker), name="replace verifier worker")
        self._replacing.add(task)
        task.add_done_callback(self._replacing.discard)

    async def _kill_and_replace(self, worker: _Worker) -> None:
        await worker.kill()
        self._workers.discard(worker)
        for attempts_left in reversed(range(START_ATTEMPTS)):
            try:
                return await self._add_worker()
            except VerifierUnavailable as error:
                log.warning("%s", error)
                if attempts_left == 0:
                    self._offer(error)  # raised in whoever asks next: without workers the run cannot go on

    async def _add_worker(self) -> None:
        worker = await _Worker.start(self._setup)
        self._workers.add(worker)
        self._offer(worker)

    def _offer(self, worker: _Worker | VerifierUnavailable) -> None:
        self._idle.append(worker)
        self._places.release()
