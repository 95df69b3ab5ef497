"""Configuration files: the options of `pyro-vae fit` as YAML or JSON, checked key by key."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from pyro_vae.app.defaults import FitOptions, did_you_mean

# Options of the command that are no part of a run's configuration.
COMMAND_ONLY = {"out": "str", "checkpoint": "str", "quiet": "bool"}
_TYPES = {field.name: str(field.type) for field in fields(FitOptions)} | COMMAND_ONLY
_WORDS = {
    "int": "a whole number", "float": "a number", "str": "text", "bool": "true or false",
    "tuple[int, ...]": "whole numbers such as 400,400",
    "dict[str, Any]": "options such as bins=8,transforms=2",
}  # fmt: skip


def read_config(path: Path) -> dict[str, Any]:
    """Options from a YAML or JSON file.

    Keys are option names, with - or _. A run's own config.json is such a file.

    Args:
        path: The file; one ending in .json is read as JSON, any other as YAML.
    Returns:
        Values by field name, of the right types; None for an option set to nothing.
    Raises:
        ValueError: Unreadable, not a mapping, an unknown key, a value of a wrong type.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ValueError(f"got --config {path}, wanted a readable YAML or JSON file: {reason}.") from error
    values = _parsed(path, text)
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} holds {_shown(values)}, wanted options by name, such as 'epochs: 20'.")
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in _TYPES:
            known = [field.replace("_", "-") for field in _TYPES]
            raise ValueError(f"{path} has the unknown key {key!r}." + did_you_mean(name, known))
        result[name] = convert(name, value, f"{path}: {key}")
    return result


def convert(name: str, value: Any, where: str) -> Any:
    """One value as its option's type.

    Args:
        name: Field name.
        value: What was read.
        where: For the message.
    Raises:
        ValueError: It cannot be read as that type.
    Example:
        >>> convert("hidden", "400,200", "here"), convert("learning_rate", "2e-3", "here")
        ((400, 200), 0.002)
        >>> convert("posterior_options", "transforms=2, hidden_features=[64, 64]", "here")
        {'transforms': 2, 'hidden_features': [64, 64]}
    """
    kinds = [kind.strip() for kind in _TYPES[name].split("|")]
    if value is None and "None" in kinds:
        return None
    for kind in kinds:
        try:
            return _READERS[kind](value)
        except (KeyError, TypeError, ValueError):
            continue
    wanted = " or ".join(_WORDS[kind] for kind in kinds if kind in _WORDS)
    raise ValueError(f"got {where} = {_shown(value)}, wanted {wanted}.")


def _parsed(path: Path, text: str) -> Any:
    import yaml

    try:
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error.msg} in line {error.lineno}.") from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "unreadable"
        raise ValueError(f"{path} is not valid YAML: {problem}{line}.") from error


def _integer(value: Any) -> int:
    if isinstance(value, bool) or isinstance(value, float) and value != int(value):
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    return float(value)  # also of text: YAML reads 2e-3 as a word


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _widths(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        value = [part for part in value.split(",") if part.strip()]
    return tuple(_integer(width) for width in (value if isinstance(value, list | tuple) else [value]))


def _mapping(value: Any) -> dict[str, Any]:
    import yaml

    if isinstance(value, str):
        try:
            value = yaml.safe_load("{" + re.sub(r"\s*=\s*", ": ", value) + "}")
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError from error
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError
    if None in value.values():
        raise ValueError  # a name without "="
    return dict(value)


_READERS: dict[str, Any] = {
    "int": _integer, "float": _number, "str": _text, "bool": _truth, "tuple[int, ...]": _widths,
    "dict[str, Any]": _mapping,
}  # fmt: skip


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
