"""`fapo genrm serve`: GenRM servers of their own for any number of runs, which find them through a rendezvous file.

In: the `genrm` section and a path. Out: a file that names the servers that are up. A server that ends leaves the file
and is started again in its place; when that has failed for all, the service ends.
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
from megatron_fapo.processes import Process, ProcessDiedError, how_lost, is_lost, log_end
from megatron_fapo.training.cluster import Cluster, ServerDiedError, launch
from megatron_fapo.training.failure import forget_failure, report_failure
from megatron_fapo.training.signals import StopRequest, StopRequestedError

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
    forget_failure(Path(config.run_dir))
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
                    died: ProcessDiedError = await stop.race(_announce(config, path, cluster))
                finally:
                    path.unlink(missing_ok=True)
                    log.info("%s is removed; the servers end in %g s", path, GOODBYE_S)
                    await asyncio.sleep(GOODBYE_S)
        except StopRequestedError:
            return stop.exit_code
        except ProcessDiedError as error:
            died = error
    return report_failure(Path(config.run_dir), died, 0)


async def _refuse_company(path: Path) -> None:
    """A file that was left behind stays as it is; one that is renewed has an owner."""
    first = rendezvous.read(path)
    if first is None or not rendezvous.is_fresh(first, time.time()):
        return
    await asyncio.sleep(2 * rendezvous.HEARTBEAT_S)
    again = rendezvous.read(path)
    if again is not None and again.heartbeat != first.heartbeat:
        raise UserError(f"--rendezvous: {path} belongs to {again}, which runs: stop it, or choose another file")


async def _announce(config: Config, path: Path, cluster: Cluster) -> ServerDiedError:
    """Renews the file until no server is left; returns why the last one is lost."""
    now = time.time()
    service = rendezvous.Service(
        urls=cluster.genrm_urls,
        served_model=config.genrm.served_model,
        model_path=str(Path(config.genrm.model_path or "").resolve()),
        started=now,
        heartbeat=now,
        node=socket.gethostname(),
        pid=os.getpid(),
        job_id=os.environ.get("SLURM_JOB_ID"),
        api_key_env=config.genrm.api_key_env,
    )
    up = dict(enumerate(cluster.genrm_urls))
    log.info("%d GenRM servers are up; runs find them with genrm.rendezvous=%s", len(up), path)
    async with asyncio.TaskGroup() as group:
        keepers = [
            group.create_task(_keep(process, server, up))
            for process, server in zip(cluster.genrm_processes, cluster.genrm_servers, strict=True)
        ]
        while not all(keeper.done() for keeper in keepers):
            renewed = dataclasses.replace(service, urls=[up[i] for i in sorted(up)], heartbeat=time.time())
            try:
                rendezvous.write(path, renewed)
            except OSError as error:  # a filesystem that is away for a while must not end servers that work
                log.error("%s cannot be renewed: %s; runs call it stale after %g s", path, error, rendezvous.STALE_S)
            await asyncio.wait(keepers, timeout=rendezvous.HEARTBEAT_S)
    return keepers[-1].result()


async def _keep(process: Process, server: Any, up: dict[int, str]) -> ServerDiedError:
    """Starts the server again whenever it ends, and keeps its place in `up`; returns why that is over."""
    from ray.exceptions import RayError

    try:
        while True:
            await asyncio.sleep(CHECK_S)
            if await server.alive.remote():
                continue
            log.error("%s has ended and is started again; %s", process, log_end(process.log_path))
            del up[process.rank]
            await server.stop.remote()
            up[process.rank] = await server.start.remote()
            log.info("%s is back at %s", process, up[process.rank])
    except RayError as error:
        up.pop(process.rank, None)
        lost = is_lost(error)
        what = await how_lost(process.node, error) if lost else "it cannot be started again"
        died = ServerDiedError(process, what, lost=True, detail=str(getattr(error, "cause", None) or error))
        log.error("%s", died)
        return died
