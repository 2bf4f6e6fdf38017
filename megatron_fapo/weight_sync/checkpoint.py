"""What an engine's checkpoint holds."""

from __future__ import annotations

from pathlib import Path

from megatron_fapo.errors import UserError


def checkpoint_shapes(model_path: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes from the headers of a checkpoint's safetensors files; no weights are read.

    Raises:
        UserError: the directory has no config.json or no safetensors files.
    """
    from safetensors import safe_open

    directory = Path(model_path)
    files = sorted(directory.glob("*.safetensors"))
    if not files or not (directory / "config.json").exists():
        raise UserError(
            f"{model_path} is not a checkpoint directory with config.json and *.safetensors files; convert it to "
            "safetensors, or give the local directory of a downloaded model"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        with safe_open(str(path), framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes
