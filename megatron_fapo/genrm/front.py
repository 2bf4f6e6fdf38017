"""What the client and the gateway share: a pool of servers, the queue before it, deadlines, and counters."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_fapo.config.genrm import GenRMConfig
from megatron_fapo.genrm.counters import Book, Counters, Totals
from megatron_fapo.genrm.deadlines import Deadlines
from megatron_fapo.genrm.dispatch import Dispatcher
from megatron_fapo.genrm.hedging import Latencies
from megatron_fapo.genrm.membership import Membership
from megatron_fapo.genrm.pool import Server, ServerPool


class PoolFront:
    """A way to the servers at `urls` (`http://host:port/v1`). Belongs to one event loop."""

    def __init__(self, urls: Sequence[str], config: GenRMConfig) -> None:
        self._config = config
        urls = [url.rstrip("/") for url in urls]
        self._pool = ServerPool(urls, config.max_concurrent_per_server)
        self._dispatcher = Dispatcher(self._pool)
        self.totals = Totals()
        self.book = Book(Counters(self.totals))
        """Of the step that began last, and of whoever names none."""
        self._latencies = Latencies()
        self._deadlines = Deadlines(config.deadline_s)
        self._members = Membership(
            urls,
            config,
            self._pool,
            tick=self._tick,
            lost=self._dispatcher.give_up,
            silence_s=self._latencies.silence_s,
        )

    async def check(self) -> None:
        """Opens the pool: every server must answer and list `genrm.served_model`. Waits for a judge service.

        Raises GenRMUnavailable with everything that is wrong, or RendezvousError, and closes what it opened.
        """
        try:
            await self._members.check()
        except BaseException:
            await self.close()
            raise

    def set_servers(self, urls: Sequence[str]) -> None:
        """The servers beside those of a judge service, where some have moved, come or gone."""
        self._members.set_fixed([url.rstrip("/") for url in urls])

    def begin_step(self) -> Book:
        """Starts metrics anew; those of steps that still run go on in their own books."""
        self.book = Book(Counters(self.totals))
        return self.book

    def metrics(self, book: Book | None = None) -> dict[str, float]:
        """`genrm/...` of a step; docs/genrm.md lists them."""
        values = dict.fromkeys(("genrm/called", "genrm/answered", "genrm/unscored", "genrm/retries"), 0.0)
        values |= (book or self.book).counters.metrics("genrm")
        alive = [server.down_since is None for server in self._pool.present()]
        return values | {
            "genrm/servers_alive": float(sum(alive)),
            "genrm/servers_down": float(len(alive) - sum(alive)),
            "genrm/queued": float(self._dispatcher.waiting),
        }

    def servers(self) -> list[Server]:
        """The pool's servers as they are now, for whoever looks on; not to be changed."""
        return self._pool.present()

    async def close(self) -> None:
        """Closes every connection."""
        await self._members.close()

    def _tick(self, down_s: float | None) -> None:
        self._deadlines.pause(down_s is not None)
        self._dispatcher.dispatch()
