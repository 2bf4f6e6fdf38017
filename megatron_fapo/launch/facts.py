"""What one node is: cards, links, packages, limits, disks; as JSON, gathered in seconds, with nothing heavy imported.

In: the run directory. Out: `{"node", "process", "facts": {probe: ...}, "failed": {probe: why}}`. A probe that
cannot tell says so in `failed`: silence never reads as health. Judging is `preflight.judge`'s work.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import runpy
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from configparser import ConfigParser
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

GATHER_S = 10.0
"""For all probes together; they run at once. nvidia-smi and statfs hang for ever on a lost card and a dead mount."""
NOT_TOLD = {"", "N/A", "None", "Not Supported", "Requested functionality has been deprecated"}
"""How nvidia-smi says that a card has no such thing; anything else that is not a value means a card that is ill."""


def node_name() -> str:
    """As Slurm calls this node, so that it can be excluded by that name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def gather(run_dir: Path) -> dict[str, Any]:
    """This node's report. Takes GATHER_S at most."""
    directories = {"run_dir": run_dir, "tmp": Path(tempfile.gettempdir()), "shm": Path("/dev/shm")}
    probes: dict[str, Callable[[], Any]] = {
        "machine": machine,
        "disks": lambda: {name: disk(path) for name, path in directories.items()},
        "packages": packages,
        "software": software,
        "gpus": gpus,
        "nvlink": nvlink,
        "topology": topology,
        "xids": xids,
        "infiniband": infiniband,
    }
    facts: dict[str, Any] = {}
    failed: dict[str, str] = {}

    def run(name: str) -> None:
        try:
            facts[name] = probes[name]()
        except Exception as error:  # whatever it is, it is this probe's answer
            failed[name] = f"{type(error).__name__}: {error}"

    # Daemons, not a pool: a pool waits at exit for a thread that a dead mount holds for ever.
    threads = {name: threading.Thread(target=run, args=(name,), daemon=True) for name in probes}
    for thread in threads.values():
        thread.start()
    end = time.monotonic() + GATHER_S
    for name, thread in threads.items():
        thread.join(max(end - time.monotonic(), 0))
        if thread.is_alive():
            failed[name] = f"no answer within {GATHER_S:g} s"
    process = int(os.environ.get("SLURM_PROCID", "0"))
    told = {name: fact for name, fact in facts.copy().items() if name not in failed}
    return {"node": node_name(), "process": process, "facts": told, "failed": dict(failed)}


def machine() -> dict[str, Any]:
    """Sizes and limits. `open_files` is the hard limit, which Ray raises its own to."""
    names = ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE", "SLURM_JOB_ID", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA")
    return {
        "host": socket.gethostname(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        "environment": {name: os.environ[name] for name in names if name in os.environ},
    }


def disk(path: Path) -> dict[str, Any]:
    """Of the filesystem that holds `path`, or would hold it."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    return {"path": str(path), "free_bytes": usage.free, "total_bytes": usage.total}


def packages() -> dict[str, dict[str, Any]]:
    """What the project's own metadata asks for, and what is installed (`version` None: it is not)."""
    from packaging.requirements import Requirement

    found: dict[str, dict[str, Any]] = {}
    for line in _requirements():
        wanted = Requirement(line)
        extra = re.search(r'extra == "(\w+)"', str(wanted.marker))
        entry = {"extra": extra[1] if extra else "", "wanted": str(wanted.specifier), "version": version(wanted.name)}
        has = entry["version"]
        entry["fits"] = has is not None and wanted.specifier.contains(has, prereleases=True)
        found[wanted.name] = entry
    return {name: entry for name, entry in found.items() if entry["extra"] != "dev"}


def _requirements() -> list[str]:
    try:
        return metadata.requires("megatron-fapo") or []
    except metadata.PackageNotFoundError:  # a checkout that was put on PYTHONPATH
        setup = ConfigParser()
        setup.read_string((Path(__file__).parents[2] / "setup.cfg").read_text(encoding="utf-8"))
        lines = setup["options"]["install_requires"].split("\n")
        for extra, text in setup["options.extras_require"].items():
            lines += [f'{line}; extra == "{extra}"' for line in text.split("\n") if line]
        return [line for line in lines if line]


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def software() -> dict[str, Any]:
    """Of libraries that no requirement names. `torch_cuda`: what torch was built for, None on a CPU build."""
    torch = find_spec("torch")
    nccl = [line.split("==")[0] for line in (metadata.requires("torch") or []) if line.startswith("nvidia-nccl")]
    apex = find_spec("apex")
    places = (apex.submodule_search_locations if apex else None) or []
    return {
        "torch_cuda": runpy.run_path(str(Path(torch.origin).with_name("version.py")))["cuda"]
        if torch and torch.origin
        else None,
        "nccl": version(nccl[0]) if nccl else None,
        # PyPI's `apex` is a web toolkit; NVIDIA's has optimizers. Looked for as files: importing it would start CUDA.
        "apex": any((Path(place) / "optimizers").is_dir() for place in places),
        "apex_kernels": find_spec("amp_C") is not None,
    }


def gpus() -> dict[str, Any]:
    """`driver`, `cuda` (the newest that the driver runs) and `cards`; no driver and no cards on a node without any."""
    if _no_nvidia():
        return {"driver": None, "cuda": None, "cards": []}
    return parse_gpus(_output("nvidia-smi", "-q", "-x"))


def nvlink() -> dict[str, dict[str, int]]:
    """Active and inactive NVLinks of each card."""
    return {} if _no_nvidia() else parse_nvlink(_output("nvidia-smi", "nvlink", "-s"))


def topology() -> dict[str, int]:
    """How pairs of cards are connected, as `nvidia-smi topo` calls it, with the number of such pairs."""
    return {} if _no_nvidia() else parse_topology(_output("nvidia-smi", "topo", "-m"))


def xids() -> list[dict[str, Any]]:
    """The driver's error reports since boot."""
    return [] if _no_nvidia() else parse_xids(_output("dmesg"), time.monotonic())


def infiniband(root: Path = Path("/sys/class/infiniband")) -> list[dict[str, Any]]:
    """All ports of all adapters, RoCE among them."""
    ports = []
    for port in sorted(root.glob("*/ports/*")):
        state, rate, layer = ((port / name).read_text().strip() for name in ("state", "rate", "link_layer"))
        name = f"{port.parent.parent.name}/{port.name}"
        ports.append({"port": name, "state": state.split()[-1], "gbps": float(rate.split()[0]), "layer": layer})
    return ports


def parse_gpus(xml: str) -> dict[str, Any]:
    """Reads `nvidia-smi -q -x`, of which drivers know different fields; a --query-gpu with an unknown one fails."""
    log = ElementTree.fromstring(xml)
    cards = [_card(index, card) for index, card in enumerate(log.findall("gpu"))]
    cuda = re.match(r"\d+\.\d+", log.findtext("cuda_version") or "")
    return {"driver": log.findtext("driver_version"), "cuda": cuda and cuda[0], "cards": cards}


def _card(index: int, card: ElementTree.Element) -> dict[str, Any]:
    unread: dict[str, str] = {}

    def read(path: str, pattern: str) -> str | None:
        text = (card.findtext(path) or "").strip().strip("[]")
        if text in NOT_TOLD:
            return None
        match = re.match(pattern, text)
        if match is None:
            unread[path] = text
        return match and match[0]

    def number(path: str) -> int | None:
        text = read(path, r"\d+")
        return None if text is None else int(text)

    def yes(path: str) -> bool | None:
        text = read(path, "Yes|No")
        return None if text is None else text == "Yes"

    counts = [
        number(f"ecc_errors/volatile/{field.tag}")
        for field in card.findall("ecc_errors/volatile/*")
        if "uncorrectable" in field.tag
    ]
    known = [count for count in counts if count is not None]
    # The driver's 535 release renamed throttle reasons to event reasons.
    reasons = [*card.findall("clocks_event_reasons/*"), *card.findall("clocks_throttle_reasons/*")]
    return {
        "index": index,
        "name": read("product_name", ".+"),
        "uuid": read("uuid", ".+"),
        "bus": card.get("id"),
        "memory_mib": number("fb_memory_usage/total"),
        "used_mib": number("fb_memory_usage/used"),
        "ecc_uncorrected": sum(known) if known else None,
        "remap_pending": yes("remapped_rows/remapped_row_pending"),
        "remap_failed": yes("remapped_rows/remapped_row_failure"),
        "retire_pending": yes("retired_pages/pending_retirement"),
        "recovery": read("gpu_recovery_action", ".+") or ("Reset" if yes("gpu_reset_status/reset_required") else None),
        "fabric": read("fabric/state", ".+"),
        "slowed_by": [
            re.sub("^clocks_(event|throttle)_reason_", "", reason.tag)
            for reason in reasons
            if (reason.text or "").strip() == "Active"
        ],
        "processes": [
            {"pid": process.findtext("pid"), "name": process.findtext("process_name")}
            for process in card.findall("processes/process_info")
        ],
        "unread": unread,
    }


def parse_nvlink(text: str) -> dict[str, dict[str, int]]:
    """Reads `nvidia-smi nvlink -s`; a card without NVLink is absent or has no links."""
    links: dict[str, dict[str, int]] = {}
    for line in text.splitlines():
        if card := re.match(r"GPU (\d+):", line):
            links[card[1]] = {"active": 0, "inactive": 0}
        elif links and (link := re.match(r"\s+Link \d+: (.+)", line)):
            links[[*links][-1]]["active" if re.match(r"[\d.]*[1-9]", link[1]) else "inactive"] += 1
    return links


def parse_topology(text: str) -> dict[str, int]:
    """Reads `nvidia-smi topo -m`: NV18 are 18 NVLinks, PIX to SYS ever longer ways through PCIe."""
    lines = [line.split() for line in text.splitlines()]
    rows = [row[1:] for row in lines if len(row) > 1 and re.fullmatch(r"GPU\d+", row[0]) and "X" in row[1:]]
    return dict(Counter(rows[i][j] for i in range(len(rows)) for j in range(i + 1, len(rows))))


def parse_xids(text: str, uptime_s: float) -> list[dict[str, Any]]:
    """Reads `dmesg`: which Xid, of which card, how many seconds ago."""
    pattern = r"\[\s*([\d.]+)\].*NVRM: Xid \(PCI:([\da-fA-F:.]+)\): (\d+)"
    found = re.findall(pattern, text)
    return [{"xid": int(xid), "bus": bus, "age_s": round(uptime_s - float(at))} for at, bus, xid in found]


def _no_nvidia() -> bool:
    """
    Raises:
        OSError: there is an NVIDIA device and no nvidia-smi to ask.
    """
    if shutil.which("nvidia-smi"):
        return False
    if Path("/dev/nvidiactl").exists():
        raise OSError("/dev/nvidiactl exists, and there is no nvidia-smi to ask: put it on PATH")
    return True


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=GATHER_S, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[:300]
        raise OSError(f"`{' '.join(command)}` ended with {done.returncode}: {said}")
    return done.stdout
