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

from megatron_fapo.config.root import Config
from megatron_fapo.errors import UserError
from megatron_fapo.genrm import rendezvous
from megatron_fapo.genrm.router import Router
from megatron_fapo.observe.log import setup_logging
from megatron_fapo.processes import ProcessDiedError
from megatron_fapo.training.cluster import Cluster, launch
from megatron_fapo.training.failure import forget_failure, report_failure
from megatron_fapo.training.servers import ServerDiedError
from megatron_fapo.training.signals import StopRequest, StopRequestedError

log = logging.getLogger(__name__)

GOODBYE_S = 2 * rendezvous.FOLLOW_S
"""Between the end of the file and the end of the servers: runs that follow the file stop asking them."""


def serve_command(config: Config, *, path: Path, router_port: int | None = None) -> int:
    """Serves until a signal or until every server is lost; returns the exit code.

    Args:
        path: of the rendezvous file.
        router_port: where vllm-router stands in front of the servers; None: nowhere.

    Raises UserError when `path` cannot be written, is something else, or belongs to a service that runs; when there is
    no vllm-router, or its port is taken.
    """
    setup_logging(Path(config.run_dir), "driver", terminal=True)
    forget_failure(Path(config.run_dir))
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--rendezvous: {path.parent} is not writable; choose another place that the runs see too")
    log_path = Path(config.run_dir).resolve() / "logs" / "router.log"
    router = None if router_port is None else Router(router_port, log_path)
    return asyncio.run(_serve(config, path, router))


async def _serve(config: Config, path: Path, router: Router | None) -> int:
    with StopRequest() as stop:
        try:
            await stop.race(_refuse_company(path))
            async with contextlib.AsyncExitStack() as processes:
                starting = launch(config, policy=False, rollout=False, judges_only=True)
                cluster = await stop.race(processes.enter_async_context(starting))
                try:
                    died: ProcessDiedError = await stop.race(_announce(config, path, cluster, router))
                finally:
                    path.unlink(missing_ok=True)
                    log.info("%s is removed; the servers end in %g s", path, GOODBYE_S)
                    await asyncio.sleep(GOODBYE_S)
        except StopRequestedError:
            return stop.exit_code
        except ProcessDiedError as error:
            died = error
    return report_failure(Path(config.run_dir), died, 0)


def here() -> str:
    """This node's address, where its servers are reached too."""
    import ray

    return str(ray.util.get_node_ip_address()) if os.environ.get("RAY_ADDRESS") else "127.0.0.1"


async def _refuse_company(path: Path) -> None:
    """A file that was left behind stays as it is; one that is renewed has an owner."""
    first = rendezvous.read(path)
    if first is None or not rendezvous.is_fresh(first, time.time()):
        return
    await asyncio.sleep(2 * rendezvous.HEARTBEAT_S)
    again = rendezvous.read(path)
    if again is not None and again.heartbeat != first.heartbeat:
        raise UserError(f"--rendezvous: {path} belongs to {again}, which runs: stop it, or choose another file")


async def _announce(config: Config, path: Path, cluster: Cluster, router: Router | None = None) -> ServerDiedError:
    """Renews the file until no server is left; returns why the last one is lost."""
    if router is not None:
        await router.start(cluster.genrm_urls, here())
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
        router=None if router is None else router.url,
    )
    servers, changed = cluster.servers, asyncio.Event()
    log.info("%d GenRM servers are up; runs find them with genrm.rendezvous=%s", len(servers.up), path)
    servers.keep(changed.set)
    lost = asyncio.ensure_future(servers.all_lost())
    routing = None if router is None else asyncio.create_task(router.follow(lambda: servers.urls), name="router")
    try:
        while not lost.done():
            renewed = dataclasses.replace(service, urls=servers.urls, heartbeat=time.time())
            try:
                rendezvous.write(path, renewed)
            except OSError as error:  # a filesystem that is away for a while must not end servers that work
                log.error("%s cannot be renewed: %s; runs call it stale after %g s", path, error, rendezvous.STALE_S)
            changed.clear()
            change = asyncio.ensure_future(changed.wait())
            await asyncio.wait((lost, change), timeout=rendezvous.HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)
            change.cancel()
        return lost.result()
    finally:
        lost.cancel()
        if router is not None and routing is not None:
            routing.cancel()
            router.stop()
