"""All that a program can reach from Python and that could change what it computes.

`Reach` walks a program as an object. From a function it goes to what its bytecode names (globals, attributes of
modules, imports), to its closure and defaults; from an object to its attributes and to the methods of its class that
the code met so far can call; from a container to its items. Everything met is one of four kinds:

    immutable     a number, a text, a dtype
    trusted       code that is a function of its arguments: torch, Pyro, zuko, NumPy, math, this package
    a place       something mutable whose value can be compared later: an attribute, an item, a cell, a global
    unproven      anything else: a generator, the clock, a file, Python's random numbers, a C object

Where nothing is unproven, two runs between which no place has changed compute the same function of their tensors and of
torch's noise. Tensors are places by identity only. Attributes are places where the code met can name them (a name in
its bytecode, or a text among its constants); where it computes names (``getattr``, ``vars``) all of them are.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn

from pyro_vae import _trust as trust
from pyro_vae.reach.functions import function, python_module
from pyro_vae.reach.objects import attributes, class_of, network, plain_object, settings
from pyro_vae.reach.places import Places, TooMuch
from pyro_vae.reach.values import (
    CONTAINERS,
    PARTS,
    array,
    builtin,
    cache,
    container,
    descriptor,
    method,
    parts,
    reference,
    tensor,
)
from pyro_vae.reach.walk import Walk


class Reach(Places):
    """All that some programs, and whatever else is run, can reach.

    Args:
        settings_of: A Pyro ELBO, of which the settings count and not what it keeps of its last call.
        owned: Look for modules alone, and not into the code of installed packages other than the roots' own:
            a program that makes one table with pandas reaches tens of thousands of functions.
    Attributes:
        modules: The outermost modules met, each once: those that the programs own.
        unproven: What was met that is neither immutable, nor trusted, nor a place, in words; empty where the
            programs are a function of tensors, noise and places.
    Example:
        >>> weight, net = {"kl": 0.5}, nn.Linear(2, 2)
        >>> reach = Reach(lambda x: weight["kl"] * net(x))
        >>> reach.modules == [net], reach.unproven, reach.changed()
        (True, [], None)
        >>> weight["kl"] = 1.0
        >>> reach.changed()
        "weight['kl']"
        >>> import random
        >>> Reach(lambda x: x * random.random()).unproven[0]
        'random.random (in <lambda>, line 1 of <doctest pyro_vae.reach.proof.Reach[6]>)'
    """

    def __init__(self, *roots: Any, settings_of: Any = None, owned: bool = False) -> None:
        ours = {trust.top(module) for root in roots for module in trust.modules_named(root)}
        walk = Walk(self, ours, owned, _look)
        while True:  # a name met late may open an attribute that was passed over early
            known = len(walk.names), walk.computed
            super().__init__()
            walk.start()
            try:
                for root in roots:
                    walk.value(root, getattr(root, "__qualname__", None) or type(root).__qualname__)
                if settings_of is not None:
                    settings(walk, settings_of)
                walk.finish()
            except TooMuch as reason:
                walk.unproven.append(str(reason))
                break
            if (len(walk.names), walk.computed) == known:
                break
        inside = {id(part) for module in walk.met for part in module.modules() if part is not module}
        self.modules = [module for module in walk.met if id(module) not in inside]
        self.unproven = walk.unproven
        self.before = self._now()


def _look(walk: Walk, value: Any, label: str) -> None:
    """Look at a value by its kind."""
    kind = type(value)
    if isinstance(value, type):
        class_of(walk, value, label)
    elif not walk.first_time(value):
        return
    elif kind in weakref.ProxyTypes:  # which hides its own class
        walk.doubt(f"{label}, a weak proxy")
    else:
        for kinds, look, whole in _KINDS:
            if isinstance(value, kinds):
                look(walk, value, label)
                if not whole and (getattr(value, "__dict__", None) or walk.is_foreign(kind)):
                    attributes(walk, value, label)
                return
        plain_object(walk, value, label)


# A kind of value, how to look at it, and whether that is all of it; a subclass of the others may hold more.
_KINDS: tuple[tuple[Any, Callable[[Walk, Any, str], None], bool], ...] = (
    (nn.Module, network, True),
    (types.FunctionType, function, True),
    (types.ModuleType, python_module, True),
    (types.BuiltinFunctionType | types.MethodWrapperType, builtin, True),
    (types.MethodType, method, True),
    (trust.C_CALLABLES, descriptor, True),
    (Tensor, tensor, False),
    (np.ndarray, array, False),
    (CONTAINERS, container, False),
    (tuple(kinds for kinds, _ in PARTS), parts, False),
    (weakref.ref, reference, False),
    (functools._lru_cache_wrapper, cache, False),
)
