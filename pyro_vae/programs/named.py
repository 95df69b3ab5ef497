"""Programs under names of their own.

Pyro keys parameters by name, so that of two programs of one name only one would be
trained. A program therefore gets a name that no other one of this process has: when it
is built, when it is copied, and when it comes out of a file or from another process.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any, TypeVar

from pyro.nn import PyroModule

_count = itertools.count(1)
_Self = TypeVar("_Self", bound="Named")


class Named(PyroModule):
    """A Pyro program of a name that no other program of this process has; abstract.

    Its PyroModules inside are named after it. A shallow copy shares the parameters of the
    original, and keeps its name.

    Example:
        >>> one = Named()
        >>> one._pyro_name == copy.deepcopy(one)._pyro_name
        False
    """

    def __init__(self) -> None:
        super().__init__(_unique_name(type(self).__name__))

    def __copy__(self: _Self) -> _Self:
        result = self.__class__.__new__(self.__class__)
        result.__dict__.update(self.__dict__)
        return result

    def __deepcopy__(self: _Self, memo: dict[int, Any]) -> _Self:
        result = self.__class__.__new__(self.__class__)
        memo[id(self)] = result
        for key, value in self.__dict__.items():
            result.__dict__[key] = copy.deepcopy(value, memo)
        _rename(result, _unique_name(type(self).__name__))
        return result

    def __getstate__(self) -> dict[str, Any]:
        for parameter in self.parameters():  # Pyro hangs a weakref on them, which cannot be pickled
            vars(parameter).pop("unconstrained", None)
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _rename(self, _unique_name(type(self).__name__))


def _unique_name(kind: str) -> str:
    return f"{kind}{next(_count)}"


def _rename(program: PyroModule, name: str) -> None:
    program._pyro_name = name
    for key, child in program._modules.items():
        if isinstance(child, PyroModule):
            _rename(child, f"{name}.{key}")
