"""The environment of the systems that we are compared with: made once, in a folder of its own that git ignores."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_fapo.errors import UserError

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / ".peers"
ALONE = ["verl==0.9.1"]
"""Without what it depends on, which is PyTorch and most of its world."""
WITH_DEPENDENCIES = [
    "vllm-router==0.1.17",
    # What the router's file imports; web packages as vLLM 0.26 brings them.
    "ray==2.60.0",
    "aiohttp==3.14.5",
    "fastapi==0.136.3",
    "uvicorn[standard]",
    "packaging",
]


def peer_binaries() -> Path:
    """The `bin` of the environment, which is made if it is not there or not the one that is asked for.

    Raises UserError without uv or when a package cannot be had.
    """
    stamp = FOLDER / "stamp.json"
    wanted = json.dumps([ALONE, WITH_DEPENDENCIES, sys.version])
    if stamp.exists() and stamp.read_text() == wanted:
        return FOLDER / "bin"
    uv = shutil.which("uv") or str(ROOT / ".uv" / "bin" / "uv")
    if not Path(uv).exists():
        raise UserError("the other systems need uv: run `make setup`, or compare none with --systems megatron_fapo")
    print(f"making the other systems' environment in {FOLDER.relative_to(ROOT)}", flush=True)
    python = str(FOLDER / "bin" / "python")
    commands = [
        [uv, "venv", "--quiet", "--clear", "--python", str(Path(sys.executable).resolve()), str(FOLDER)],
        [uv, "pip", "install", "--quiet", "--python", python, "--no-deps", *ALONE],
        [uv, "pip", "install", "--quiet", "--python", python, *WITH_DEPENDENCIES],
    ]
    for command in commands:
        done = subprocess.run(command, env={**os.environ, "UV_PYTHON_DOWNLOADS": "never"}, check=False)
        if done.returncode != 0:
            raise UserError(f"`{' '.join(command)}` failed; without the other systems: --systems megatron_fapo")
    stamp.write_text(wanted)
    return FOLDER / "bin"


def peer_versions() -> dict[str, str]:
    """Installed versions of the packages that matter."""
    names = ("verl", "vllm-router", "aiohttp", "fastapi", "uvicorn", "uvloop")
    code = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    done = subprocess.run([str(peer_binaries() / "python"), "-c", code], capture_output=True, text=True, check=True)
    versions: dict[str, str] = json.loads(done.stdout)
    return versions
