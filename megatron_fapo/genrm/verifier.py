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
from collections.abc import Sequence
from typing import Any

from megatron_fapo.config.reward import RewardConfig
from megatron_fapo.data.records import Sample
from megatron_fapo.errors import UserError
from megatron_fapo.genrm.deadlines import Deadline
from megatron_fapo.genrm.gateway import Visit
from megatron_fapo.genrm.rules import OTHER_RULE, RuleResult
from megatron_fapo.genrm.user_function import (
    COMPUTE_SCORE,
    ROUTER,
    TOKENIZER,
    UserScore,
    accepts,
    describe_error,
    is_async,
    load_function,
    load_tokenizer,
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
                await worker.send(setup)
                ready = await worker.receive()
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

    async def send(self, request: Any) -> None:
        """Raises OSError when the process is gone."""
        stdin, payload = self._process.stdin, pickle.dumps(request)
        assert stdin is not None
        stdin.write(len(payload).to_bytes(HEADER_BYTES, "big") + payload)
        await stdin.drain()

    async def receive(self) -> dict[str, Any]:
        """The next reply. Raises OSError or EOFError when the process is gone."""
        stdout = self._process.stdout
        assert stdout is not None
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

    def __init__(self, config: RewardConfig, offered: Sequence[str] = (), tokenizer: str | None = None) -> None:
        """
        Args:
            offered: what the run has for `reward.compute_score`; see user_function.offers.
            tokenizer: path of the GenRM's.

        Raises UserError when `reward.compute_score` cannot be used.
        """
        self._config = config
        kwargs, path = config.compute_score_kwargs, config.compute_score
        function = self._function = None if path is None else load_function(path, COMPUTE_SCORE, kwargs, offered)
        self.given = {each for each in offered if function is not None and accepts(function, each)}
        """What of `offered` the function gets."""
        self._in_loop = function is not None and is_async(function)
        tokenizer = tokenizer if TOKENIZER in self.given else None
        rules = [config.verifier, OTHER_RULE[config.verifier]][: 1 + config.compare_rules]
        self._replies = len(rules) if path is None else 1
        self._setup: dict[str, Any] = {"rules": rules, "compute_score": path, "kwargs": kwargs, "tokenizer": tokenizer}
        self._tokenizer: dict[str, Any] = {}
        self._idle: deque[_Worker | VerifierUnavailable] = deque()
        self._places = asyncio.Semaphore(0)  # counts _idle; an asyncio.Queue would let newcomers overtake who waits
        self._workers: set[_Worker] = set()
        self._replacing: set[asyncio.Task[None]] = set()
        self._closed = False
        self.replaced = 0
        """Workers killed and replaced so far."""

    async def start(self) -> None:
        """Starts and warms up the workers. Raises VerifierUnavailable when one does not start."""
        if self._in_loop and TOKENIZER in self.given:
            self._tokenizer[TOKENIZER] = await asyncio.to_thread(load_tokenizer, self._setup["tokenizer"])
        count = 0 if self._in_loop else self._config.verifier_processes
        started = await asyncio.gather(*(self._add_worker() for _ in range(count)), return_exceptions=True)
        errors = [outcome for outcome in started if outcome is not None]
        if errors:
            await self.close()
            raise errors[0]

    async def verify(self, solution: str, ground_truth: str) -> RuleResult | Unscored:
        """Whether the solution's final answer is right, by `reward.verifier`; and by the other rule, which costs a
        worker at most, not the sample."""
        replies = await self._call((solution, ground_truth), Reason.VERIFIER_CRASH)
        if isinstance(replies, Unscored):
            return replies
        return RuleResult(**replies[0])._replace(other=replies[1].get("correct") if len(replies) > 1 else None)

    async def compute_score(self, sample: Sample, visit: Visit | None = None) -> UserScore | Unscored:
        """The user's score of a sample. What the function asks of the GenRM by way of `visit` is not on its clock."""
        arguments: dict[str, Any] = {
            "data_source": sample.prompt.data_source,
            "solution_str": sample.text,
            "ground_truth": sample.prompt.ground_truth,
            "extra_info": dict(sample.prompt.extra_info),
        }
        if visit is not None:
            arguments[ROUTER] = visit.address
        if not self._in_loop:
            replies = await self._call(arguments, Reason.COMPUTE_SCORE_ERROR, visit)
            return replies if isinstance(replies, Unscored) else UserScore(**replies[0])
        assert self._function is not None
        limit = asyncio.timeout(None)
        try:
            async with limit:
                self._start_clock(limit, visit)
                given = arguments | self._tokenizer | self._config.compute_score_kwargs
                return read_score(await self._function(**given))
        except Exception as error:
            if limit.expired():
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

    async def _call(
        self, request: Any, on_error: Reason, visit: Visit | None = None
    ) -> list[dict[str, Any]] | Unscored:
        """The replies, of which the first one counts: what comes after it may be missing."""
        await self._places.acquire()
        worker = self._idle.popleft()
        if isinstance(worker, VerifierUnavailable):
            self._offer(worker)  # for the next one who asks
            raise worker
        replies: list[dict[str, Any]] = []
        failed: Unscored | None = None
        try:
            async with asyncio.timeout(None) as limit:
                self._start_clock(limit, visit)
                await worker.send(request)
                while len(replies) < self._replies:
                    replies.append(await worker.receive())
        except TimeoutError:
            failed = self._timed_out()
        except (OSError, EOFError):
            failed = Unscored(Reason.VERIFIER_CRASH, f"the worker died with exit code {await worker.kill()}")
        finally:  # also when cancelled: the worker is still busy with a sample that nobody wants
            if len(replies) == self._replies and not self._closed:
                self._offer(worker)
            else:
                self._replace(worker)
        if failed is not None and not replies:
            return failed
        return Unscored(on_error, replies[0]["error"]) if "error" in replies[0] else replies

    def _start_clock(self, limit: asyncio.Timeout, visit: Visit | None) -> None:
        clock = Deadline(limit, self._config.verifier_timeout_s, paused=False)
        clock.start()
        if visit is not None:
            visit.clock = clock

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
