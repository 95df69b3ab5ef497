"""Values that are no objects of a class in Python: containers, arrays, tensors, caches, and what C made."""

from __future__ import annotations

import collections
import functools
import gc
import random
import sys
import types
from typing import Any

import numpy as np
from torch import Tensor, nn

from pyro_vae import _trust as trust
from pyro_vae.reach.objects import GENERATORS, code_in
from pyro_vae.reach.places import bytes_of, remembered
from pyro_vae.reach.walk import Walk

_LARGEST_ARRAY, _LARGEST_CONTAINER = 2**16, 10_000
_SEQUENCES = (list, collections.deque)
_MAPPINGS = (dict, types.MappingProxyType)
CONTAINERS = (*_SEQUENCES, *_MAPPINGS, tuple, set, frozenset)
# What these hold, and nothing else of them is read.
PARTS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (functools.partial, ("func", "args", "keywords")),
    (property, ("fget", "fset")),
    (functools.cached_property, ("func",)),
    (staticmethod | classmethod, ("__func__",)),
)


def container(walk: Walk, value: Any, label: str) -> None:
    if value is sys.modules or len(value) > _LARGEST_CONTAINER:
        if value is not sys.modules:
            walk.places.whole.append((label, value))
        what = f"{label}, a {type(value).__name__} of {len(value):,} items"
        walk.doubt("sys.modules" if value is sys.modules else what)
        return
    ways = ((_MAPPINGS, "get"), (_SEQUENCES, "__getitem__"))
    get = next((getattr(value, way) for kinds, way in ways if isinstance(value, kinds)), None)
    if not isinstance(value, tuple):  # of a set in its order, which code may go by
        walk.place(len if isinstance(value, _SEQUENCES) else tuple, value, label)
    for key, item in list(value.items() if isinstance(value, _MAPPINGS) else enumerate(value)):
        inside = label if isinstance(value, set | frozenset) else f"{label}[{key!r}]"
        walk.value(key, label)
        if get is not None:
            walk.place(get, key, inside)
        walk.value(item, inside)


def array(walk: Walk, value: np.ndarray, label: str) -> None:
    walk.places.whole.append((label, value))
    if value.dtype.hasobject or value.nbytes > _LARGEST_ARRAY:
        walk.doubt(f"{label}, a NumPy array of {value.nbytes:,} bytes, too many to compare in every step")
    else:
        walk.place(bytes_of, value, label)


def tensor(walk: Walk, value: Tensor, label: str) -> None:
    """Not its numbers, but the hooks of its gradient, and that attributes may appear."""
    walk.places.whole.append((label, value))
    if value._backward_hooks is not None:
        code_in(walk, value._backward_hooks, f"the hooks of {label}")
    walk.place(len, vars(value), label)


def cache(walk: Walk, value: Any, label: str) -> None:
    """What ``functools.lru_cache`` wraps, and what it remembers: a result is read where it was made."""
    walk.value(value.__wrapped__, label)
    if trust.trusted_module(getattr(value, "__module__", None)):
        return
    held = gc.get_referents(value)
    caches = [d for d in held if type(d) is dict and d is not vars(value)]
    if value.cache_info().maxsize is not None and value.cache_info().currsize:
        caches = [d for d in caches if d and all(type(v).__name__ == "_lru_list_elem" for v in d.values())]
    if len(caches) != 1 or len(caches[0]) > _LARGEST_CONTAINER:
        walk.doubt(f"{label}, a cache")
        return
    walk.place(remembered, caches[0], f"the cache of {label}")
    for result in (*held, *(v for v in caches[0].values() if type(v).__name__ != "_lru_list_elem")):
        if all(result is not d for d in (caches[0], vars(value))) and type(result) is not object:
            walk.value(result, f"what {label} remembers")


def parts(walk: Walk, value: Any, label: str) -> None:
    for name in next(names for kinds, names in PARTS if isinstance(value, kinds)):
        walk.value(getattr(value, name), f"{label}.{name}")


def reference(walk: Walk, value: Any, label: str) -> None:
    walk.value(value(), label)


def method(walk: Walk, value: types.MethodType, label: str) -> None:
    walk.value(value.__self__, label if isinstance(value.__self__, nn.Module) else f"{label}.__self__")
    walk.value(value.__func__, label)


def descriptor(walk: Walk, value: Any, label: str) -> None:
    walk.computed = walk.computed or getattr(value, "__name__", "") in trust.COMPUTED_NAMES


def builtin(walk: Walk, value: Any, label: str) -> None:
    walk.computed = walk.computed or value.__name__ in trust.COMPUTED_NAMES
    owner = getattr(value, "__self__", None)
    bound = type(owner).__module__ or ""
    if owner is None or isinstance(owner, types.ModuleType | type) or bound.startswith("pybind11"):
        module = getattr(value, "__module__", None) or getattr(owner, "__module__", None)
        module = module or getattr(owner, "__name__", "builtins")
        name = f"{module}.{value.__name__}"
        if not trust.trusted_module(module) or trust.is_denied(module, name):
            walk.doubt(name if module != "builtins" else value.__name__)
    elif isinstance(owner, GENERATORS[1:]):
        walk.doubt(f"{'' if isinstance(owner, random.Random) else 'numpy.'}random.{value.__name__}")
    else:
        walk.value(owner, label.rsplit(".", 1)[0])
