"""A configuration as text: the resolved tree with origins, the documentation of its fields, and differences."""

from __future__ import annotations

import textwrap
from typing import Any

import yaml

from megatron_fapo.config.load import Key, LoadedConfig, field_section, leaves
from megatron_fapo.config.root import Config
from megatron_fapo.config.section import Section


def dump_yaml(config: Config) -> str:
    """The resolved tree: loading this text gives an equal Config."""
    return _tree(config, {}, docs=False)


def show(loaded: LoadedConfig, docs: bool = False) -> str:
    """The resolved tree as YAML with each value's origin as an aligned trailing comment; `docs` puts the meaning of
    each field above it."""
    return _tree(loaded.config, loaded.origins, docs)


def diff(a: LoadedConfig, b: LoadedConfig) -> str:
    """Only the leaves that differ, one a line: `key: value in a (origin) -> value in b (origin)`."""
    # An empty free map is no leaf here: it would show up as a difference beside each entry of the other side.
    left, right = ({".".join(key): value for key, value in leaves(x.config) if value != {}} for x in (a, b))

    def side(values: dict[str, Any], origins: dict[str, str], key: str) -> str:
        return f"{_scalar(values[key])} ({origins[key]})" if key in values else "unset"

    return "".join(
        f"{key}: {side(left, a.origins, key)} -> {side(right, b.origins, key)}\n"
        for key in [*left, *(k for k in right if k not in left)]
        if key not in left or key not in right or left[key] != right[key]
    )


def _scalar(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n...\n").strip()


def _tree(config: Config, origins: dict[str, str], docs: bool) -> str:
    lines: list[tuple[str, str]] = []
    shown: Key = ()
    for key, value in leaves(config):
        for depth in range(1, len(key) + 1):
            if key[:depth] == shown[:depth]:
                continue
            indent = "  " * (depth - 1)
            if docs:
                lines += [(f"{indent}# {line}", "") for line in _meaning(key[:depth], 116 - len(indent))]
            text = f"{indent}{_scalar(key[depth - 1])}:"
            is_leaf = depth == len(key)
            lines.append((f"{text} {_scalar(value)}", origins.get(".".join(key), "")) if is_leaf else (text, ""))
        shown = key
    # One long value must not push every comment off the screen.
    column = min(max(len(text) for text, origin in lines if origin), 56) if origins else 0
    return "".join(f"{text:<{column}}  # {origin}\n" if origin else f"{text}\n" for text, origin in lines)


def _meaning(key: Key, width: int) -> list[str]:
    """The docstring of a field, wrapped; nothing for entries of free maps and undocumented fields."""
    section: type[Section] = Config
    for name in key[:-1]:
        inner = field_section(section.model_fields[name])
        if inner is None:
            return []
        section = inner
    return textwrap.wrap(" ".join((section.model_fields[key[-1]].description or "").split()), width)
