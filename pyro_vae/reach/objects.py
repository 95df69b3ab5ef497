"""Objects, their attributes and their classes; networks among them."""

from __future__ import annotations

import abc
import functools
import random
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.nn.modules import module as _torch_modules

from pyro_vae import _trust as trust
from pyro_vae._trust import MISSING, SCALARS
from pyro_vae.reach.walk import Walk

# What these make anew in every run, before they read it.
_ANEW = {torch.distributions.Transform: ("_cache", "_inv", "_inter"), AutoGuide: ("plates",)}
_CODE_ATTRIBUTES = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GENERATORS = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)


def plain_object(walk: Walk, value: Any, label: str) -> None:
    """An object of no kind that is looked at in a way of its own."""
    kind = type(value)
    module = kind.__module__ or ""
    if isinstance(value, BaseException):
        walk.doubt(f"{label}, an exception")
    elif isinstance(value, GENERATORS):
        walk.doubt(f"{label}, a generator of random numbers")
    elif module.startswith(trust.OPAQUE) or module in ("typing", "typing_extensions"):
        pass
    elif not (hasattr(value, "__dict__") or any("__slots__" in vars(c) for c in kind.__mro__)) or (
        module.startswith(("threading", "_thread", "contextvars", "_io", "io"))
    ):
        walk.doubt(f"{label}, a {trust.type_name(kind)}")
    else:
        attributes(walk, value, label)


def attributes(walk: Walk, value: Any, label: str) -> None:
    """Of an object that is no module: its attributes, and the methods of its class."""
    kind = type(value)
    foreign = walk.is_foreign(kind)
    space = getattr(value, "__dict__", None)
    if isinstance(space, dict):
        walk.place(len, space, label)
        _held(walk, value, dict(space), label)
    for owner in kind.__mro__:
        slots = vars(owner).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and (not foreign or walk.wanted(name, kind)):
                get = functools.partial(_attribute, value)
                walk.read(get, name, getattr(value, name, None), f"{label}.{name}")
    if foreign:
        walk.place(type, value, label)
        if any(not trust.made_in_python(c) and c not in trust.TRANSPARENT for c in kind.__mro__):
            walk.doubt(f"{label}, a {trust.type_name(kind)}")
        class_of(walk, kind, label, making=False)


def _held(walk: Walk, value: Any, attributes: dict[str, Any], label: str) -> None:
    """The attributes of an object that anybody may read; of the others its code alone."""
    space, kind = vars(value), type(value)
    foreign = walk.is_foreign(kind)
    anew = tuple(name for base, names in _ANEW.items() if isinstance(value, base) for name in names)
    for name, held in attributes.items():
        if name.startswith(anew):
            continue
        plain = not name.startswith("_") or isinstance(held, (*SCALARS, Tensor, np.ndarray)) or _is_numbers(held)
        if walk.wanted(name, kind) or (plain and not foreign):
            walk.read(space.get, name, held, f"{label}.{name}")
        elif not foreign or name.startswith("_pyro_"):
            code_in(walk, held, f"{label}.{name}")


def code_in(walk: Walk, value: Any, label: str) -> None:
    """Of what a trusted object keeps for itself the code (hooks, priors of PyroSample) and its numbers."""
    if isinstance(value, Mapping):
        walk.place(tuple if value else len, value, label)
        for key, item in list(value.items()):
            code_in(walk, item, f"{label}[{key!r}]")
    elif isinstance(value, tuple | list) and not _is_numbers(value):
        for item in value:
            code_in(walk, item, label)
    elif isinstance(value, list | np.ndarray) or (callable(value) and not isinstance(value, type)):
        walk.value(value, label)


def network(walk: Walk, module: nn.Module, label: str) -> None:
    """A module of torch, with all that lie inside it."""
    if not walk.met:
        for name in _HOOKS:
            code_in(walk, vars(_torch_modules)[f"_global{name}"], f"torch.nn.modules.module._global{name}")
    walk.met.append(module)
    for path, part in module.named_modules():
        walk.seen.add(id(part))
        _part(walk, part, f"{label}.{path}" if path else label)


def _part(walk: Walk, part: nn.Module, label: str) -> None:
    space, kind = vars(part), type(part)
    if isinstance(part, torch.jit.ScriptModule):
        walk.doubt(f"{label}, a compiled TorchScript module")
        return
    walk.place(type, part, label)
    walk.place(len, space, label)
    if not kind.__module__.startswith(trust.OPAQUE):  # torch.compile's, around the module that it holds
        _held(walk, part, {name: value for name, value in space.items() if name not in _CODE_ATTRIBUTES}, label)
    for slots in (part._parameters, part._buffers, part._modules):
        walk.place(len, slots, label)
        for name, value in slots.items():
            walk.place(slots.get, name, f"{label}.{name}")
            if isinstance(value, Tensor) and (value._backward_hooks or vars(value).keys() - {"unconstrained"}):
                walk.value(value, f"{label}.{name}")
    for name in _HOOKS:
        code_in(walk, space.get(name), f"{label}.{name}")
    if walk.is_foreign(kind):
        class_of(walk, kind, label, making=False)


def class_of(walk: Walk, kind: type, label: str, making: bool = True) -> None:
    """What instances of a class can run and read of it; to make one, too, where the class itself is at hand."""
    if walk.is_others(kind.__module__):
        return
    if not walk.is_foreign(kind):
        name = f"{kind.__module__}.{kind.__qualname__}"
        walk.computed = walk.computed or kind.__name__ in trust.COMPUTED_NAMES
        if trust.is_denied(kind.__module__, name) or kind is torch.Generator:
            walk.doubt(name)
        return
    if (kind in walk.classes and walk.classes[kind] >= making) or walk.settled(kind.__module__):
        return
    walk.classes[kind] = making
    if not trust.made_in_python(kind):
        if kind is not types.SimpleNamespace:
            walk.doubt(f"{label}, a {trust.type_name(kind)}")
        return
    if isinstance(kind, abc.ABCMeta):  # what has been registered with it
        walk.place(_registrations, kind, f"the classes registered with {kind.__qualname__}")
    for owner in [*type(kind).mro(type(kind)), *kind.__mro__]:
        if not walk.is_owned(owner):
            _class_space(walk, owner, kind, making or "__class__" in walk.names)


def _class_space(walk: Walk, owner: type, kind: type, making: bool) -> None:
    space, label = vars(owner), owner.__qualname__
    walk.place(len, space, label)
    walk.names.update(trust.texts([space.get("__match_args__")]))
    for name, value in list(space.items()):
        if (name in trust.NO_VALUE and name not in walk.names) or (name in trust.MAKING and not making):
            continue
        if (name.startswith("__") and name.endswith("__")) or walk.wanted(name, kind):
            walk.read(space.get, name, value, f"{label}.{name}")


def settings(walk: Walk, loss: Any) -> None:
    """Of a Pyro ELBO what it was told, and not what it keeps of its last call."""
    kind = type(loss)
    for name, value in list(vars(loss).items()):
        if name.startswith("_") and not walk.is_foreign(kind):
            continue
        if name == "last_bound" or (name == "beta" and isinstance(value, int | float)):
            continue  # a weight that is a number is handed to the graph
        walk.read(vars(loss).get, name, value, f"{name} of {kind.__name__}")
    if walk.is_foreign(kind):
        class_of(walk, kind, kind.__name__, making=False)


def _is_numbers(value: Any) -> bool:
    return type(value) is list and bool(value) and all(type(item) in SCALARS for item in value)


def _registrations(_: type) -> Any:
    return abc.get_cache_token()


def _attribute(value: Any, name: str) -> Any:
    return getattr(value, name, MISSING)
