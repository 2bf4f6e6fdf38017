"""The GenRM servers that we start: their actors, and each of them started again when it ends.

In: actors with their places. Out: base URLs, and word whenever they change. A server whose actor or node is gone cannot
be started again; the pool goes on without it. Servers that take turns on others' GPUs are not started again: there is
no room for a start while the others work.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from megatron_fapo.errors import UserError
from megatron_fapo.genrm.server import TURN_S, ServerStartError, ServerTurnError
from megatron_fapo.observe.stall import WAITS
from megatron_fapo.observe.trace import TRACER
from megatron_fapo.processes import Process, ProcessDiedError, how_lost, is_lost, log_end

log = logging.getLogger(__name__)

CHECK_S = 1.0
"""How often each server's process is looked at."""
ALIVE_S = 30.0
"""For a server's actor to say that it lives; on a node that hangs it never does."""
STOP_S = 30.0
"""For all servers to stop; then they are killed."""
SHORT_LIFE_S, SHORT_LIVES = 60.0, 3
"""A server that ends so soon after its start, so many times in a row, is not started again."""


class ServerDiedError(ProcessDiedError):
    """A GenRM server of ours is gone: samples could not be scored, or soon cannot."""


@dataclass
class Servers:
    """Of one pool. Those that are up have a URL."""

    processes: list[Process] = field(default_factory=list)
    actors: list[Any] = field(default_factory=list)
    up: dict[int, str] = field(default_factory=dict)
    """Rank -> base URL."""
    keepers: list[asyncio.Task[ServerDiedError]] = field(default_factory=list)
    """Each ends with the server, when that cannot be started again."""

    def add(self, process: Process, actor: Any) -> None:
        self.processes.append(process)
        self.actors.append(actor)

    @property
    def urls(self) -> list[str]:
        return [self.up[rank] for rank in sorted(self.up)]

    async def start(self) -> None:
        """
        Raises:
            ServerDiedError, UserError: one did not start.
        """
        urls = await asyncio.gather(*map(start_server, self.processes, self.actors))
        self.up = {process.rank: url for process, url in zip(self.processes, urls, strict=True)}

    def keep(self, changed: Callable[[], None], *, restart: bool = True) -> None:
        """From now on, start each again when it ends; `changed` is called when `urls` are others."""
        self.keepers = [
            asyncio.create_task(self._keep(process, actor, changed, restart), name=f"keep {process}")
            for process, actor in zip(self.processes, self.actors, strict=True)
        ]

    async def turn(self, order: str) -> None:
        """All `sleep` or `wake`."""
        await asyncio.gather(*map(partial(_turn, order), self.processes, self.actors))

    def lost(self) -> list[ServerDiedError]:
        """Why each that is gone for good is."""
        return [keeper.result() for keeper in self.keepers if keeper.done()]

    async def all_lost(self) -> ServerDiedError:
        """Waits until none is left; returns why the last is gone."""
        left = set(self.keepers)
        while left:
            done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()

    async def stop(self) -> None:
        """Stop all at once; whoever does not within STOP_S is killed."""
        import ray

        for keeper in self.keepers:
            keeper.cancel()
        await asyncio.gather(*self.keepers, return_exceptions=True)
        stopping = [asyncio.ensure_future(actor.stop.remote()) for actor in self.actors]
        if stopping:
            await asyncio.wait(stopping, timeout=STOP_S)
        for each in stopping:
            each.cancel()
        await asyncio.gather(*stopping, return_exceptions=True)  # of servers that are gone
        for actor in self.actors:
            ray.kill(actor)

    async def _keep(self, process: Process, actor: Any, changed: Callable[[], None], restart: bool) -> ServerDiedError:
        began, short_lives = time.monotonic(), 0
        while True:
            await asyncio.sleep(CHECK_S)
            died, actor_lives = await how_ended(process, actor)
            if died is None:
                continue
            short_lives = short_lives + 1 if time.monotonic() - began < SHORT_LIFE_S else 0
            self.up.pop(process.rank, None)
            changed()
            if not restart or not actor_lives or short_lives >= SHORT_LIVES:
                log.error("%s", died)
                return died
            log.error("%s has ended and is started again; %s", process, log_end(process.log_path))
            try:
                await actor.stop.remote()
                self.up[process.rank] = await start_server(process, actor)
            except Exception as error:
                again = error if isinstance(error, ServerDiedError) else await _died(process, error)
                log.error("%s", again)
                return again
            began = time.monotonic()
            log.info("%s is back at %s", process, self.up[process.rank])
            changed()


async def start_server(process: Process, actor: Any) -> str:
    """Its base URL.

    Raises:
        ServerDiedError: it did not start, or its process or node is gone.
        UserError: it cannot, as configured.
    """
    try:
        with WAITS.on("genrm.start", process):
            url, cards = str(await actor.start.remote()), await actor.cards.remote()
    except Exception as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, ServerStartError):
            raise ServerDiedError(process, "did not start", lost=cause.lost, detail=str(cause)) from None
        if isinstance(cause, UserError):
            raise cause from None
        raise await _died(process, error) from error
    WAITS.processes[url] = process
    TRACER.register(process, cards, url)
    return url


async def how_ended(process: Process, actor: Any) -> tuple[ServerDiedError | None, bool]:
    """Why the server has ended, None while it runs; and whether its actor lives, which could start it again."""
    # Not in WAITS: it is asked all the time, which is no progress, and has a deadline of its own.
    try:
        alive = await asyncio.wait_for(actor.alive.remote(), ALIVE_S)
    except TimeoutError:
        return ServerDiedError(process, f"has not answered for {ALIVE_S:g} s", lost=True), False
    except Exception as error:
        died = await _died(process, error)
        died.__cause__ = error
        return died, False
    return (None if alive else ServerDiedError(process, "it has ended", lost=True)), True


async def _turn(order: str, process: Process, actor: Any) -> None:
    """Have a server `sleep` or `wake`. One that is gone holds no memory: whatever needs it next reports it."""
    try:
        with WAITS.on(f"genrm.{order}", process):
            await asyncio.wait_for(getattr(actor, order).remote(), TURN_S + ALIVE_S)
    except TimeoutError:
        raise ServerDiedError(process, f"did not {order} within {TURN_S + ALIVE_S:g} s", lost=True) from None
    except Exception as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, ServerTurnError):
            raise ServerDiedError(process, f"did not {order}", lost=True, detail=str(cause)) from None
        died = await _died(process, error)
        if order == "wake" or not died.lost:
            raise died from error
        log.warning("%s", died)


async def _died(process: Process, error: BaseException) -> ServerDiedError:
    lost = is_lost(error)
    what = await how_lost(process.node, error) if lost else "failed"
    return ServerDiedError(process, what, lost=lost, detail=str(getattr(error, "cause", None) or error))
