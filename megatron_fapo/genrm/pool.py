"""Which server is asked, and which servers count as alive: a pure state machine, with time passed in.

    HEALTHY --failure--> SUSPECT --third failure in a row--> DEAD --probe answers--> RECOVERING --answer--> HEALTHY
                                                              ^-------------failure---------'
    any --no longer in the list--> WITHDRAWN --in it again--> HEALTHY

Invariants, asserted by the tests
- A DEAD server gets no request; a RECOVERING one gets one at a time, so that a server which lists its models but never
  answers costs one request per recovery and not a flood.
- DEAD is left only through an answered probe, an answered request or withdrawal.
- A WITHDRAWN server gets no request, and what becomes of its last ones changes nothing.
- No server holds more than `max_concurrent` requests; outstanding counts return to zero when all requests ended.
- A server that failed this verdict before is not chosen while another usable one exists, even a full one.
- A server is called silent only while another one answers: when nobody does, the judge is slow and not the server.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum


class State(Enum):
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    DEAD = "dead"
    RECOVERING = "recovering"
    WITHDRAWN = "withdrawn"


class Effect(Enum):
    """What the end of a request says about its server."""

    ANSWERED = "answered"
    FAILED = "failed"
    GONE = "gone"
    """Nobody listens there any more: dead at once."""
    BUSY = "busy"
    """It asked to be left alone for a while; it is not ill."""
    NOTHING = "nothing"
    """Cancelled by us, or the request was at fault."""


FAILURES_UNTIL_DEAD = 3
FIRST_PROBE_S = 1.0
LAST_PROBE_S = 30.0


@dataclass
class Server:
    url: str
    state: State = State.HEALTHY
    failures: int = 0
    """Consecutive."""
    requests: int = 0
    """Outstanding."""
    tokens: int = 0
    """Outstanding: prompts and expected critiques."""
    busy_until: float = -math.inf
    held_since: float = math.inf
    """Since when it has had requests without a break."""
    answered_at: float = -math.inf
    answers: int = 0
    answered_tokens: int = 0
    down_since: float | None = None
    """Since when it has answered nothing; RECOVERING still counts as down."""
    probe_at: float = math.inf
    probe_delay_s: float = FIRST_PROBE_S


class ServerPool:
    """The servers of a run. The caller sends requests and probes, and reports how they ended."""

    def __init__(self, urls: Collection[str], max_concurrent: int) -> None:
        self.servers = {url: Server(url) for url in urls}
        self._max_concurrent = max_concurrent
        self._empty_since = -math.inf

    def present(self) -> list[Server]:
        """All that have not been withdrawn."""
        return [server for server in self.servers.values() if server.state is not State.WITHDRAWN]

    def replace(self, urls: Collection[str], now: float) -> tuple[list[str], list[str]]:
        """Makes `urls` the servers of the pool; those that stay keep what is known of them. Returns the new ones and
        the withdrawn ones, whose requests the caller should cut short."""
        old = {server.url for server in self.present()}
        added, withdrawn = [url for url in urls if url not in old], [url for url in old if url not in urls]
        for url in withdrawn:
            self.servers[url].state = State.WITHDRAWN
        # One with open requests stays, so that their ends are booked against their beginnings.
        self.servers = {url: s for url, s in self.servers.items() if s.state is not State.WITHDRAWN or s.requests}
        for url in added:
            kept = self.servers.get(url, Server(url))
            self.servers[url] = Server(url, requests=kept.requests, tokens=kept.tokens)
        if old and not urls:
            self._empty_since = now
        return added, withdrawn

    def has_room(self, now: float) -> bool:
        return any(self._room(server, now) for server in self.servers.values())

    def choose(self, tried: Collection[str], now: float, home: str | None = None, saved_tokens: int = 0) -> str | None:
        """The usable server with room and the least outstanding tokens; None: wait.

        `tried` are the servers that already failed this verdict: they come into question only when no other is usable.
        `home` has `saved_tokens` of the prompt in its prefix cache, and may be that much busier than the others.
        """
        usable = [server for server in self.present() if server.state is not State.DEAD]
        candidates = [server for server in usable if server.url not in tried] or usable
        free = [server for server in candidates if self._room(server, now)]
        if not free:
            return None
        return min(free, key=lambda each: (each.tokens - saved_tokens * (each.url == home), each.requests)).url

    def spare(self, than: Collection[str], now: float) -> str | None:
        """A server that answers, other than those, with room for a second request beside a slow one."""
        able = [s for s in self.present() if s.down_since is None and s.url not in than and self._room(s, now)]
        return min(able, key=lambda server: (server.tokens, server.requests)).url if able else None

    def begin(self, url: str, tokens: int, now: float) -> None:
        server = self.servers[url]
        if server.requests == 0:
            server.held_since = now
        server.requests += 1
        server.tokens += tokens

    def silent(self, now: float, limit_s: float) -> list[str]:
        """The servers that hold requests and have not answered one for `limit_s`, while others answer."""
        heard = max((server.answered_at for server in self.present()), default=-math.inf)
        return [
            server.url
            for server in self.present()
            if server.requests
            and server.state is not State.DEAD
            and max(server.held_since, server.answered_at) + limit_s < min(now, heard)
        ]

    def bury(self, url: str, now: float) -> None:
        """Declares a server dead, whatever it was."""
        server = self.servers[url]
        if server.state is State.RECOVERING:
            server.probe_delay_s = min(2 * server.probe_delay_s, LAST_PROBE_S)
        server.state = State.DEAD
        server.probe_at = now + server.probe_delay_s
        if server.down_since is None:
            server.down_since = now

    def end(self, url: str, tokens: int, effect: Effect, now: float, busy_for_s: float = 0.0) -> None:
        """Accounts for a request that `begin` announced with the same number of tokens."""
        server = self.servers[url]
        server.requests -= 1
        server.tokens -= tokens
        if server.state is State.WITHDRAWN:
            return
        if effect is Effect.ANSWERED:
            server.answered_at = now
            server.answers += 1
            server.answered_tokens += tokens
            server.state, server.failures, server.down_since = State.HEALTHY, 0, None
            server.probe_at, server.probe_delay_s = math.inf, FIRST_PROBE_S
        elif effect is Effect.BUSY:
            server.busy_until = now + busy_for_s
        elif effect in (Effect.FAILED, Effect.GONE) and server.state is not State.DEAD:
            server.failures += 1
            dead = server.state is State.RECOVERING or server.failures >= FAILURES_UNTIL_DEAD
            if dead or effect is Effect.GONE:
                self.bury(url, now)
            else:
                server.state = State.SUSPECT

    def probe_due(self, url: str, now: float) -> bool:
        return self.servers[url].state is State.DEAD and now >= self.servers[url].probe_at

    def probed(self, url: str, answered: bool, now: float) -> None:
        """Accounts for a probe of a DEAD server."""
        server = self.servers[url]
        if server.state is not State.DEAD:
            return
        if answered:
            server.state = State.RECOVERING
        else:
            server.probe_delay_s = min(2 * server.probe_delay_s, LAST_PROBE_S)
            server.probe_at = now + server.probe_delay_s

    def down_since(self) -> float | None:
        """Since when no server has answered; None while one counts as alive."""
        since = [server.down_since for server in self.present()]
        return None if None in since else max((t for t in since if t is not None), default=self._empty_since)

    def _room(self, server: Server, now: float) -> bool:
        limit = {State.DEAD: 0, State.WITHDRAWN: 0, State.RECOVERING: 1}.get(server.state, self._max_concurrent)
        return server.requests < limit and now >= server.busy_until
