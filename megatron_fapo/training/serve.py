"""`fapo genrm serve`: GenRM servers of their own for any number of runs, which find them through a rendezvous file.

In: the `genrm` section and a path. Out: a file that names the servers that are up, for as long as one is. A server that
ends leaves the file and is started again in its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

from megatron_fapo.config.root import Config
from megatron_fapo.errors import UserError
from megatron_fapo.genrm import rendezvous
from megatron_fapo.observe.log import setup_logging
from megatron_fapo.training.cluster import launch
from megatron_fapo.training.signals import EXIT_LOST, StopRequest, StopRequestedError

log = logging.getLogger(__name__)

CHECK_S = 1.0
"""How often each server's process is looked at."""
GOODBYE_S = 2 * rendezvous.FOLLOW_S
"""Between the end of the file and the end of the servers: runs that follow the file stop asking them."""


def serve_command(config: Config, *, path: Path) -> int:
    """Serves until a signal or until every server is lost; returns the exit code.

    Raises UserError when `path` cannot be written, is something else, or belongs to a service that runs.
    """
    setup_logging(Path(config.run_dir), "driver", terminal=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--rendezvous: {path.parent} is not writable; choose another place that the runs see too")
    return asyncio.run(_serve(config, path))


async def _serve(config: Config, path: Path) -> int:
    with StopRequest() as stop:
        try:
            await stop.race(_refuse_company(path))
            async with contextlib.AsyncExitStack() as processes:
                starting = launch(config, policy=False, rollout=False, judges_only=True)
                cluster = await stop.race(processes.enter_async_context(starting))
                try:
                    await stop.race(_announce(config, path, cluster.genrm_servers, cluster.genrm_urls))
                finally:
                    path.unlink(missing_ok=True)
                    log.info("%s is removed; the servers end in %g s", path, GOODBYE_S)
                    await asyncio.sleep(GOODBYE_S)
        except StopRequestedError:
            return stop.exit_code
    log.error("every GenRM server is lost; start the service again, runs that wait for it go on")
    return EXIT_LOST


async def _refuse_company(path: Path) -> None:
    """A file that was left behind stays as it is; one that is renewed has an owner."""
    first = rendezvous.read(path)
    if first is None or not rendezvous.is_fresh(first, time.time()):
        return
    await asyncio.sleep(2 * rendezvous.HEARTBEAT_S)
    again = rendezvous.read(path)
    if again is not None and again.heartbeat != first.heartbeat:
        raise UserError(f"--rendezvous: {path} belongs to {again}, which runs: stop it, or choose another file")


async def _announce(config: Config, path: Path, servers: list[Any], urls: list[str]) -> None:
    """Renews the file; returns when no server is left."""
    now = time.time()
    service = rendezvous.Service(
        urls=urls,
        served_model=config.genrm.served_model,
        model_path=str(Path(config.genrm.model_path or "").resolve()),
        started=now,
        heartbeat=now,
        node=socket.gethostname(),
        pid=os.getpid(),
        job_id=os.environ.get("SLURM_JOB_ID"),
        api_key_env=config.genrm.api_key_env,
    )
    up = dict(enumerate(urls))
    log.info("%d GenRM servers are up; runs find them with genrm.rendezvous=%s", len(up), path)
    async with asyncio.TaskGroup() as group:
        keepers = [group.create_task(_keep(index, server, up)) for index, server in enumerate(servers)]
        while not all(keeper.done() for keeper in keepers):
            renewed = dataclasses.replace(service, urls=[up[i] for i in sorted(up)], heartbeat=time.time())
            try:
                rendezvous.write(path, renewed)
            except OSError as error:  # a filesystem that is away for a while must not end servers that work
                log.error("%s cannot be renewed: %s; runs call it stale after %g s", path, error, rendezvous.STALE_S)
            await asyncio.wait(keepers, timeout=rendezvous.HEARTBEAT_S)


async def _keep(index: int, server: Any, up: dict[int, str]) -> None:
    """Starts the server again whenever it ends, and keeps its place in `up`; returns when that fails."""
    from ray.exceptions import RayError

    try:
        while True:
            await asyncio.sleep(CHECK_S)
            if await server.alive.remote():
                continue
            log.error("GenRM server %d at %s has ended (logs/genrm-%d.log); starting it again", index, up[index], index)
            del up[index]
            await server.stop.remote()
            up[index] = await server.start.remote()
            log.info("GenRM server %d is back at %s", index, up[index])
    except RayError as error:
        up.pop(index, None)
        log.error("GenRM server %d is lost: %s", index, getattr(error, "cause", None) or error)
