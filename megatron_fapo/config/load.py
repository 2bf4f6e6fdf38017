"""YAML files and dotted overrides in, one checked `Config` with the origin of every value out.

Every problem of all files and overrides is collected before anything is raised: a person fixes a configuration once,
not once per mistake. Values travel as flat leaves (`("policy", "optimizer", "lr")` -> value and origin): merging is
plain assignment then, and an origin cannot be lost on the way.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from megatron_fapo.config.root import RULES, Config, Purpose
from megatron_fapo.config.section import Section
from megatron_fapo.errors import UserError

COMMAND_LINE = "command line"
DEFAULT = "default"

Key = tuple[str, ...]


class ConfigError(UserError):
    """Everything that is wrong with a configuration, in `problems`.

    `loaded` is the configuration all the same when each of its values is valid by itself, so that a caller can look for
    further problems before it gives up.
    """

    def __init__(self, problems: list[str], loaded: LoadedConfig | None = None) -> None:
        self.problems, self.loaded = problems, loaded
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{count} in the configuration:", *(f"  {p}" for p in problems)]))


@dataclass(frozen=True)
class LoadedConfig:
    config: Config
    origins: dict[str, str]
    """Dotted leaf -> `default`, `file:line` or `command line`."""


@dataclass(frozen=True)
class _Leaf:
    value: Any
    origin: str


_Flat = dict[Key, _Leaf]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that `1e-5` is a number: 1.1 wants a dot and a sign, people do not."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_config(paths: list[Path], overrides: list[str], purpose: Purpose | None = None) -> LoadedConfig:
    """Merge `paths` (later ones win; a file may name a base with `extends: other.yaml`, relative to itself), then the
    dotted `overrides` (`policy.optimizer.lr=1e-5`, values read as YAML), and check the result for `purpose` (None: only
    what any use asks for, so that an incomplete file can be looked at).

    Maps are merged key by key, lists and values replaced; an explicit `{}` empties a map.
    Raises ConfigError with all problems: unreadable files, unknown keys, types, ranges and cross-section rules.
    """
    problems: list[str] = []
    flat: _Flat = {}
    for path in paths:
        for key, leaf in _file_leaves(path, problems, ()):
            _assign(flat, key, leaf)
    for override in overrides:
        for key, leaf in _override_leaves(override, problems):
            _assign(flat, key, leaf)

    unknown: dict[str, str] = {}  # One problem for a misspelt section, not one for each key in it.
    for key in list(flat):
        if found := _unknown(key):
            dotted, what = found
            unknown.setdefault(dotted, f"{dotted} ({flat.pop(key).origin}): {what}")
    problems += unknown.values()
    config, rejected = _validate(flat, problems)
    problems += _broken_rules(config, flat, rejected, purpose)
    loaded = LoadedConfig(config, {".".join(key): _origin(key, flat) for key, _ in leaves(config)})
    if problems:
        raise ConfigError(problems, None if rejected else loaded)
    return loaded


def leaves(config: Config) -> Iterator[tuple[Key, Any]]:
    """Every value of the tree in order of declaration; the entries of free maps are leaves of their own."""

    def walk(value: Any, key: Key) -> Iterator[tuple[Key, Any]]:
        if isinstance(value, Section):
            for name in type(value).model_fields:
                yield from walk(getattr(value, name), (*key, name))
        elif isinstance(value, dict) and value:
            for name, entry in value.items():
                yield from walk(entry, (*key, name))
        else:
            yield key, value

    return walk(config, ())


def _assign(flat: _Flat, key: Key, leaf: _Leaf) -> None:
    for other in [k for k in flat if k[: len(key)] == key or key[: len(k)] == k]:
        del flat[other]
    flat[key] = leaf


def _file_leaves(path: Path, problems: list[str], chain: tuple[Path, ...]) -> Iterator[tuple[Key, _Leaf]]:
    if path.resolve() in chain:
        problems.append(f"{path}: extends itself, by way of {' -> '.join(p.name for p in chain)}")
        return
    try:
        text = path.read_text(encoding="utf-8")
        found = list(_yaml_leaves(text, str(path), problems))
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror}")
        return
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problems.append(f"{_place(error, str(path))}: not valid YAML: {_reason(error)}")
        return
    for key, leaf in found:
        if key == ("extends",):
            base = Path(os.path.normpath(path.parent / str(leaf.value)))
            yield from _file_leaves(base, problems, (*chain, path.resolve()))
    yield from ((key, leaf) for key, leaf in found if key != ("extends",))


def _override_leaves(override: str, problems: list[str]) -> Iterator[tuple[Key, _Leaf]]:
    dotted, equals, text = override.partition("=")
    if not equals or not all(dotted.split(".")):
        problems.append(f"{override} ({COMMAND_LINE}): not an override; write section.key=value")
        return
    try:
        found = list(_yaml_leaves(text, COMMAND_LINE, problems, tuple(dotted.split("."))))
    except yaml.YAMLError as error:
        problems.append(f"{override} ({COMMAND_LINE}): the value is not valid YAML: {_reason(error)}; quote it")
        return
    yield from found


def _yaml_leaves(text: str, source: str, problems: list[str], prefix: Key = ()) -> Iterator[tuple[Key, _Leaf]]:
    loader = _Loader(text)

    def walk(node: yaml.Node, key: Key) -> Iterator[tuple[Key, _Leaf]]:
        origin = source if source == COMMAND_LINE else f"{source}:{node.start_mark.line + 1}"
        if not isinstance(node, yaml.MappingNode) or not node.value:
            yield key, _Leaf(loader.construct_object(node, deep=True), origin)
            return
        names = [name.value for name, _ in node.value]
        for name in sorted({n for n in names if names.count(n) > 1}):
            problems.append(f"{'.'.join((*key, name))} ({origin}): written twice in one map; keep one")
        loader.flatten_mapping(node)
        for name_node, value_node in node.value:
            yield from walk(value_node, (*key, str(name_node.value)))

    root = loader.get_single_node()
    if root is None:
        if prefix:
            yield prefix, _Leaf(None, source)
    elif not prefix and not isinstance(root, yaml.MappingNode):
        problems.append(f"{source}:{root.start_mark.line + 1}: expected a map of sections, such as `policy:`")
    else:
        yield from walk(root, prefix)


def _place(error: Exception, path: str) -> str:
    mark = getattr(error, "problem_mark", None)
    return path if mark is None else f"{path}:{mark.line + 1}"


def _reason(error: Exception) -> str:
    return str(getattr(error, "problem", None) or error)


def _unknown(key: Key) -> tuple[str, str] | None:
    """The shortest dotted part of a key that the tree does not have and what is wrong with it, or None."""
    section: type[Section] = Config
    for depth, name in enumerate(key):
        field = section.model_fields.get(name)
        if field is None:
            return ".".join(key[: depth + 1]), f"unknown key{_nearest(section, key[:depth], name)}"
        inner = field_section(field)
        if inner is None:
            is_map = getattr(field.annotation, "__origin__", None) is dict
            too_deep = not is_map and depth < len(key) - 1
            return (".".join(key), f"{'.'.join(key[: depth + 1])} is a value and has no keys") if too_deep else None
        section = inner
    return None


def _nearest(section: type[Section], above: Key, name: str) -> str:
    beside = difflib.get_close_matches(name, section.model_fields, n=1, cutoff=0.6)
    if beside:
        return f"; did you mean {'.'.join((*above, beside[0]))}?"
    keys = list(_field_keys(Config, ()))
    close = difflib.get_close_matches(name, {key[-1] for key in keys}, n=1, cutoff=0.75)
    anywhere = [".".join(key) for key in keys if key[-1] in close]
    return f"; did you mean {' or '.join(anywhere)}?" if anywhere else "; `fapo config show --docs` lists all keys"


def field_section(field: FieldInfo) -> type[Section] | None:
    """The section class of a field that is a section."""
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _field_keys(section: type[Section], above: Key) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        yield (*above, name)
        if inner := field_section(field):
            yield from _field_keys(inner, (*above, name))


def _nested(flat: _Flat) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, leaf in flat.items():
        at = tree
        for name in key[:-1]:
            at = at.setdefault(name, {})
        at[key[-1]] = leaf.value
    return tree


def _validate(flat: _Flat, problems: list[str]) -> tuple[Config, list[Key]]:
    """The config, and the keys whose values were refused (they stand at their defaults in it)."""
    try:
        return Config.model_validate(_nested(flat)), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    rejected = [tuple(str(part) for part in detail["loc"]) for detail in details]
    for detail, loc in zip(details, rejected, strict=True):
        shown = detail["input"] if isinstance(detail["input"], str | int | float | bool | None) else "..."
        problems.append(f"{'.'.join(loc)} = {shown!r} ({_origin(loc, flat)}): {_requirement(detail)}")
    kept = {key: leaf for key, leaf in flat.items() if not any(_overlap(key, loc) for loc in rejected)}
    return Config.model_validate(_nested(kept)), rejected


def _requirement(detail: ErrorDetails) -> str:
    choices = re.fullmatch(r"\^\((.+)\)\$", detail.get("ctx", {}).get("pattern", ""))
    if choices:
        return "must be one of " + ", ".join(choices[1].split("|"))
    return detail["msg"].replace("Input should be", "must be")


def _overlap(a: Key, b: Key) -> bool:
    return a[: len(b)] == b or b[: len(a)] == a


def _origin(key: Key, flat: _Flat) -> str:
    for length in range(len(key), 0, -1):
        if key[:length] in flat:
            return flat[key[:length]].origin
    return DEFAULT


def _broken_rules(config: Config, flat: _Flat, rejected: list[Key], purpose: Purpose | None) -> Iterator[str]:
    for rule in RULES:
        if rule.purposes is not None and purpose not in rule.purposes:
            continue
        keys = [tuple(dotted.split(".")) for dotted in rule.reads]
        # A refused value stands at its default, so a rule that reads it would judge something nobody wrote.
        if any(_overlap(key, loc) for key in keys for loc in rejected) or not rule.broken(config):
            continue
        values = []
        for key in keys:
            value: Any = config
            for name in key:
                value = getattr(value, name)
            values.append(f"{'.'.join(key)} = {value!r} ({_origin(key, flat)})")
        yield f"{', '.join(values)}: {rule.remedy}"
