"""The user's functions (`compute_score`, a judge): found by import path, called with keywords only, read strictly."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_fapo.errors import UserError

if TYPE_CHECKING:  # the worker processes do without
    from megatron_fapo.config.genrm import GenRMConfig

Function = Callable[..., Any]


class UserScore(NamedTuple):
    score: float
    correct: bool
    """The returned `acc`, else whether the score is above 0."""
    prediction: str | None
    """The returned `pred`."""
    extra: dict[str, Any]
    """Every other key, as JSON has it."""


COMPUTE_SCORE = "reward.compute_score", ("data_source", "solution_str", "ground_truth", "extra_info")
JUDGE_FUNCTION = "genrm.judge_function", ("question", "ground_truth", "solution")
ROUTER, TOKENIZER = "reward_router_address", "reward_model_tokenizer"
"""Keywords that a compute_score gets when it accepts them and the run has them: the `host:port` of an HTTP server that
asks the GenRM, and the GenRM's tokenizer."""
_REMEDIES = {
    ROUTER: "name the GenRM that it asks: genrm.model_path, genrm.urls or genrm.rendezvous, with genrm.enabled=true",
    TOKENIZER: "set genrm.model_path to the GenRM's checkpoint, or to a folder with its tokenizer",
}


def offers(genrm: GenRMConfig, *, servers: bool) -> tuple[str, ...]:
    """What a run has for its compute_score. `servers`: whether it has any to ask."""
    if not (genrm.enabled and servers):
        return ()
    return (ROUTER,) if genrm.model_path is None else (ROUTER, TOKENIZER)


def accepts(function: Function, keyword: str) -> bool:
    parameters = inspect.signature(function).parameters
    return keyword in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def load_tokenizer(path: str) -> Any:
    """The GenRM's tokenizer as functions of the recipe expect it."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    # They send what it returns as token ids: a list until transformers 5, which makes it a dict unless asked.
    tokenizer.apply_chat_template = functools.partial(tokenizer.apply_chat_template, return_dict=False)
    return tokenizer


def load_function(
    path: str, role: tuple[str, Sequence[str]], kwargs: Mapping[str, Any] | None = None, offered: Sequence[str] = ()
) -> Function:
    """The function at `package.module:function` or `path/file.py:function`.

    `role` is the configuration field that names it and the keywords it is called with, beside those of `offered` that
    it accepts, and `kwargs`, which hold over both.
    Raises UserError, with the remedy, when it is missing, not callable, or cannot be called so.
    """
    module_path, _, name = path.rpartition(":")
    field, keywords = role
    where = f"{field} = {path!r}"
    if not module_path or not name:
        raise UserError(f"{where} is not of the form package.module:function or path/file.py:function")
    try:
        module = _load_file(Path(module_path)) if module_path.endswith(".py") else importlib.import_module(module_path)
    except (ImportError, OSError) as error:
        remedy = "check the path, or put the folder of your package on PYTHONPATH"
        raise UserError(f"{where}: {module_path} cannot be imported ({error}): {remedy}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{where}: {module_path} has no function {name!r}: name one that it defines")
    given = dict.fromkeys([*keywords, *(each for each in offered if accepts(function, each))]) | dict(kwargs or {})
    try:
        inspect.signature(function).bind(**given)
    except TypeError as error:
        extra = f" and the keys of {field}_kwargs" if kwargs is not None else ""
        remedy = f"it must accept {', '.join(keywords)}{extra} as keywords"
        wanted = inspect.signature(function).parameters.values()
        lacks = [each.name for each in wanted if each.name not in given and each.default is each.empty]
        remedy = "; ".join(_REMEDIES[name] for name in lacks if name in _REMEDIES) or remedy
        raise UserError(f"{where} cannot be called ({error}): {remedy}") from error
    return function


def is_async(function: Function) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def read_score(value: Any) -> UserScore:
    """What a user's function returned. Raises ValueError when that is neither a number nor a dict with `score`."""
    returned = dict(value) if isinstance(value, Mapping) else {"score": value}
    if "score" not in returned:
        raise ValueError(f"compute_score returned a dict without 'score' (keys: {', '.join(map(str, returned))})")
    try:
        score = float(returned.pop("score"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"compute_score returned {type(value).__name__}, not a number or a dict with one") from error
    if not math.isfinite(score):
        raise ValueError(f"compute_score returned {score}")
    correct = bool(returned.pop("acc", score > 0))
    prediction = returned.pop("pred", None)
    return UserScore(score, correct, None if prediction is None else str(prediction), _plain(returned))


def describe_error(error: Exception) -> str:
    """One line: type, message, and the place that raised."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it; numpy scalars become numbers, anything else foreign becomes text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else str(value)


def _load_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"fapo_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look theirs up
    spec.loader.exec_module(module)
    return module
