"""The rendezvous file: where a judge service is now. `fapo genrm serve` writes it, any number of runs read it.

    no file         the service is not up, or has said goodbye: its servers are not to be asked any more
    old heartbeat   the service was killed, or its node is lost; it may come back
    new heartbeat   its `urls` answer; none, while its only servers are being restarted

A file is replaced as a whole, so that no reader sees half of one: a malformed file is a wrong path, not bad luck.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_fapo.config.genrm import GenRMConfig
from megatron_fapo.errors import UserError
from megatron_fapo.observe.files import write_atomically

HEARTBEAT_S = 5.0
"""How often a service renews its file."""
STALE_S = 60.0
"""A heartbeat older than this is no sign of life: several missed renewals, and the caches of a network filesystem."""
FOLLOW_S = 2.0
"""How often a reader looks at the file."""


class RendezvousError(UserError):
    """The file is not what it should be; says what to do."""


@dataclass(frozen=True)
class Service:
    """What the file says."""

    urls: list[str]
    """Base URLs (`http://host:port/v1`) of the servers that are up."""
    served_model: str
    model_path: str
    started: float
    """Seconds since the epoch, as `heartbeat`."""
    heartbeat: float
    node: str
    pid: int
    job_id: str | None = None
    """Of Slurm."""
    api_key_env: str | None = None
    """Name of the environment variable whose value the servers ask for."""
    router: str | None = None
    """Base URL of a vllm-router in front of them, for whoever wants one address."""

    def __str__(self) -> str:
        job = f", Slurm job {self.job_id}" if self.job_id else ""
        return f"the judge service on {self.node} (pid {self.pid}{job})"


_SERVICE: TypeAdapter[Service] = TypeAdapter(Service)


def write(path: Path, service: Service) -> None:
    """Puts the file in place of an older one at once."""
    write_atomically(path, json.dumps(dataclasses.asdict(service), indent=1) + "\n")


def read(path: Path) -> Service | None:
    """What the file says; None: there is none.

    Raises:
        RendezvousError: something else is there.
    """
    try:
        return _SERVICE.validate_json(path.read_bytes(), strict=True)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RendezvousError(f"{path} cannot be read ({error.strerror}): make it readable") from error
    except ValidationError as error:
        first: Any = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RendezvousError(
            f"{path} is not the rendezvous file of a judge service ({where + ': ' if where else ''}{first['msg']}): "
            "give the path that `fapo genrm serve --rendezvous` was given, or delete the file"
        ) from None


def is_fresh(service: Service, now: float) -> bool:
    """Whether the service was alive shortly before `now`, in seconds since the epoch."""
    return abs(now - service.heartbeat) <= STALE_S


def obstacle(service: Service | None, now: float, genrm: GenRMConfig) -> str | None:
    """Why what `genrm.rendezvous` says cannot be used at the moment, and what to do about it; None: it can.

    Raises:
        RendezvousError: the service does not fit the configuration, which waiting does not change.
    """
    path = genrm.rendezvous
    if service is None:
        return f"there is no {path}: start the service with `fapo genrm serve --rendezvous {path}`"
    for name, theirs, ours in (
        ("served_model", service.served_model, genrm.served_model),
        ("api_key_env", service.api_key_env, genrm.api_key_env),
    ):
        if theirs not in (ours, None):
            raise RendezvousError(f"{path}: {service} has genrm.{name}={theirs}, and this run {ours}: make them equal")
    if not is_fresh(service, now):
        renewed = datetime.fromtimestamp(service.heartbeat).astimezone().isoformat(sep=" ", timespec="seconds")
        remedy = "set the clocks of the two nodes" if service.heartbeat > now else "start it again"
        return f"{path} is stale: {service} renewed it at {renewed}, and every {HEARTBEAT_S:g} s is usual; {remedy}"
    return None if service.urls else f"{path}: {service} is restarting its servers; its log says why"
