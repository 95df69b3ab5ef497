"""Functions, by what their code names, and the Python modules in which it is looked up."""

from __future__ import annotations

import builtins
import operator
import sys
import types
from collections.abc import Sequence
from typing import Any

from pyro_vae import _trust as trust
from pyro_vae._trust import MISSING, Named, is_trusted, named_in
from pyro_vae.reach.objects import class_of
from pyro_vae.reach.values import container
from pyro_vae.reach.walk import Walk

_FUNCTION_PARTS = tuple(operator.attrgetter(name) for name in ("__code__", "__defaults__", "__kwdefaults__"))
_FUNCTION_TEXTS = ("__doc__", "__annotations__", "__name__", "__qualname__")


def function(walk: Walk, function: types.FunctionType, label: str) -> None:
    module = function.__globals__.get("__name__", "")
    trusted = is_trusted(function) or walk.is_others(module)
    if trusted and trust.is_denied(module, f"{module}.{function.__name__}"):
        walk.doubt(f"{module}.{function.__name__}")
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        if name != "__class__":  # it is there for super(), which makes nothing
            walk.read(trust.contents, cell, trust.contents(cell), name)
    space = vars(function)
    if trusted:
        walk.value(space.get("__wrapped__"), label)
        return
    if walk.settled(module):
        return
    for part in _FUNCTION_PARTS:
        walk.place(part, function, f"the code of {label}")
    for name in walk.names.intersection(_FUNCTION_TEXTS):
        walk.read(operator.attrgetter(name), function, getattr(function, name), f"{label}.{name}")
    for value in function.__defaults__ or ():
        walk.value(value, f"a default of {label}")
    if function.__kwdefaults__:
        container(walk, function.__kwdefaults__, f"the defaults of {label}")
    walk.place(len, space, label)
    for name, value in list(space.items()):
        if name == "__wrapped__" or walk.computed or name in walk.names:
            walk.read(space.get, name, value, f"{label}.{name}")
    _code(walk, function.__code__, function.__globals__)


def _code(walk: Walk, code: types.CodeType, space: dict[str, Any]) -> None:
    if not walk.first_time(code):
        return
    walk.names.update(code.co_names, trust.texts(code.co_consts))
    walk.computed = walk.computed or not trust.COMPUTED_NAMES.isdisjoint(code.co_names)
    before = walk.where
    for named in named_in(code):
        walk.where = named.where
        if named.how == "import":
            _import(walk, space, named)
            continue
        walk.place(space.get, named.name, named.name)
        if named.how == "load":
            value = space.get(named.name, MISSING)
            if value is MISSING:
                value = getattr(builtins, named.name, MISSING)
                walk.place(vars(builtins).get, named.name, named.name)
            _chain(walk, value, named.name, named.attributes)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _code(walk, constant, space)
    walk.where = before


def _chain(walk: Walk, value: Any, label: str, attributes: Sequence[str]) -> None:
    """Follow ``module.module.name`` as far as it goes through modules; the rest is for the value."""
    for name in attributes:
        if not isinstance(value, types.ModuleType):
            break
        module, space, value = value, vars(value), vars(value).get(name, MISSING)
        if not isinstance(value, types.ModuleType):
            attribute_of(walk, module, name, label)
            return
        label = f"{label}.{name}"
        if not trust.trusted_module(module.__name__):
            walk.place(space.get, name, label)
    if value is not MISSING:
        walk.value(value, label)


def _import(walk: Walk, space: dict[str, Any], named: Named) -> None:
    name = named.name
    if named.level > 0:
        package = (space.get("__package__") or "").split(".")
        name = ".".join([*package[: len(package) - named.level + 1], name] if name else package)
    if sys.modules.get(name) is None:
        walk.doubt(f"the import of {name} while it runs")
        return
    for imported in (name, trust.top(name)):
        if imported in sys.modules:
            walk.value(sys.modules[imported], imported)


def python_module(walk: Walk, module: types.ModuleType, label: str) -> None:
    """A module that the code may read by any name it knows."""
    if walk.is_others(module.__name__):
        return
    walk.places.kept.append(module)
    if walk.settled(module.__name__):
        return
    if walk.is_foreign(type(module)):
        walk.place(type, module, label)
        class_of(walk, type(module), label, making=False)
    for name in sorted(walk.names):
        attribute_of(walk, module, name, label)


def attribute_of(walk: Walk, module: types.ModuleType, name: str, label: str) -> None:
    space = vars(module)
    if name.startswith("__") or (name not in space and trust.trusted_module(module.__name__)):
        return
    value = space.get(name, MISSING)
    if value is MISSING and "__getattr__" in space:
        walk.doubt(f"{label}.{name}, which the module may compute")
    if value is MISSING and type(module) is not types.ModuleType:
        walk.value(module, label)
    walk.place(space.get, name, f"{label}.{name}")
    if value is not MISSING and trust.is_denied(module.__name__, f"{module.__name__}.{name}"):
        walk.doubt(f"{module.__name__}.{name}")
    elif value is not MISSING:
        walk.value(value, f"{label}.{name}")
