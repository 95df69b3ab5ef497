"""The walk from programs to all that they can reach: what it has met, and what that makes of a value or a class."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn

from pyro_vae import _trust as trust
from pyro_vae._trust import SCALARS, is_trusted
from pyro_vae.reach.places import Places

_ENOUGH = 3  # doubts, after which installed packages are not walked any further
_DEEPEST = 40  # values on the way to another, before it is put off


class Walk:
    """One walk through programs: what it has met so far, and what it knows of classes.

    Args:
        places: Where to write down what can change.
        ours: Installed packages that are looked into whatever is in doubt already, by name.
        owned: As of `Reach`.
        look: What to do with a value met for the first time, or a class.
    """

    def __init__(
        self, places: Places, ours: Collection[str], owned: bool, look: Callable[[Walk, Any, str], None]
    ) -> None:
        self.places, self._ours, self._owned, self._look = places, ours, owned, look
        self.names: set[str] = set()  # what the code met so far can name
        self.computed = False  # whether it computes names
        self.start()

    def start(self) -> None:
        """Forget all but the names."""
        self.unproven: list[str] = []
        self._doubted: set[str] = set()  # the same, to look up: there can be tens of thousands
        self.met: list[nn.Module] = []
        self.seen: set[int] = set()
        self.classes: dict[type, bool] = {}  # whether with what makes an instance
        self._foreign: dict[type, bool] = {}
        self._original: dict[type, bool] = {}
        self._depth = 0
        self._later: list[tuple[str, Any, str]] = []
        self.where = ""

    def finish(self) -> None:
        """Look at all that was put off."""
        while self._later:
            self.where, value, label = self._later.pop()
            self.value(value, label)

    def place(self, get: Callable[[Any], Any], key: Any, label: str) -> None:
        if not self._owned:
            self.places.place(get, key, label)

    def read(self, get: Callable[[Any], Any], key: Any, value: Any, label: str) -> None:
        """A place, and the value that stands there."""
        self.place(get, key, label)
        self.value(value, label)

    def doubt(self, what: str) -> None:
        sentence = f"{what} ({self.where})" if self.where else what
        if sentence not in self._doubted:
            self._doubted.add(sentence)
            self.unproven.append(sentence)

    def is_others(self, module: str | None) -> bool:
        """Whether a Python module is of an installed package in which nobody looks for networks."""
        return self._owned and trust.top(module) not in self._ours and trust.is_installed(trust.top(module))

    def settled(self, module: str | None) -> bool:
        """Whether more of an installed package could change nothing: what is in doubt is so already."""
        first = trust.top(module)
        return len(self.unproven) >= _ENOUGH and first not in self._ours and trust.is_installed(first)

    def first_time(self, thing: Any) -> bool:
        known = id(thing) in self.seen
        self.seen.add(id(thing))
        return not known

    def value(self, value: Any, label: str) -> None:
        """Take note of a value that stands at a place (the place itself is noted by who holds it)."""
        kind = type(value)
        if kind in SCALARS or (isinstance(value, trust.IMMUTABLE) and trust.trusted_module(kind.__module__)):
            return
        if self._depth > _DEEPEST:  # Python's stack has an end
            self._later.append((self.where, value, label))
            return
        self._depth += 1
        try:
            self._look(self, value, label)
        finally:
            self._depth -= 1

    def wanted(self, name: str, kind: type) -> bool:
        """Whether code may name an attribute of instances of a class: what was met, and the trusted bases' own."""
        if self.computed or name in self.names:
            return True
        if not self.is_foreign(kind):
            return False
        if name in trust.DISTRIBUTION and not issubclass(kind, nn.Module | Tensor):
            return True  # Pyro asks no base of a distribution
        for base in kind.__mro__:
            if base is not object and hasattr(base, name) and trust.trusted_module(base.__module__):
                return True
            if base not in trust.PLAIN_BASES and self.is_owned(base):
                names = trust.names_of(base)
                if names is None or name in names:
                    return True
        return False

    def is_foreign(self, kind: type) -> bool:
        """Whether there is anything in a class that is not of a trusted package."""
        if self._owned:  # whose code it is matters for a proof, not for finding networks
            return not trust.trusted_module(kind.__module__) or kind is types.SimpleNamespace
        known = self._foreign.get(kind)
        if known is None:
            known = kind is types.SimpleNamespace or not all(self.is_owned(c) for c in kind.__mro__)
            self._foreign[kind] = known
        return known

    def is_owned(self, kind: type) -> bool:
        """Whether a class is what a trusted package made it: its name alone can be borrowed, its methods replaced."""
        known = self._original.get(kind)
        if known is None:
            known = self._original[kind] = _is_original(kind)
        return known


def _is_original(kind: type) -> bool:
    module = kind.__module__
    if not trust.trusted_module(module):
        return False
    if not trust.made_in_python(kind):
        return True
    if any(isinstance(v, types.FunctionType) and not is_trusted(v) for v in vars(kind).values()):
        return False
    return module not in ("types", "builtins") or getattr(sys.modules[module], kind.__name__, None) is kind
