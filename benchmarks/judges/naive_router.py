"""Runs verl's NaiveRouter as verl does, in the environment of the peers: `python naive_router.py PORT URL...`.

Only the router's own file and what it uses of verl are imported: the package's `__init__` files want PyTorch, Ray's
runtime and transformers, none of which the router uses.
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

if __name__ == "__main__":
    spec = importlib.util.find_spec("verl")  # looks for it without running it
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    for name in ("verl", "verl.utils", "verl.experimental", "verl.experimental.reward_loop"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    router = importlib.import_module("verl.experimental.reward_loop.router.naive_router")
    router.run_router("127.0.0.1", int(sys.argv[1]), sys.argv[2:])
