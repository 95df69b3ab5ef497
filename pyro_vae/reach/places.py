"""Places: something mutable that programs read, by which two runs are compared."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae._trust import MISSING

MOST_PLACES = 20_000  # to look at in each step; an eager step costs less


class TooMuch(Exception):
    """More is reached than can be looked at in each step."""


class Places:
    """Where programs read something that can be another object later, with what stood there."""

    def __init__(self) -> None:
        self._places: list[tuple[Callable[[Any], Any], Any]] = []
        self._labels: list[str] = []  # what each place is called
        self.whole: list[tuple[str, Any]] = []  # arrays, tensors and long lists, by name
        self.kept: list[Any] = []  # objects made on the way, whose id must stay theirs
        self._noted: set[tuple[int, int]] = set()
        self.before: list[Any] = []

    def place(self, get: Callable[[Any], Any], key: Any, label: str) -> None:
        """One place more: what ``get(key)`` gives. One known already is passed over."""
        mark = (id(getattr(get, "__self__", get)), id(key))
        if mark in self._noted:
            return
        self._noted.add(mark)
        if self.full:
            raise TooMuch(f"more than {MOST_PLACES:,} places of Python are read, among them {label}")
        self.kept.append(key)
        self._places.append((get, key))
        self._labels.append(label)

    @property
    def full(self) -> bool:
        """Whether there are as many places as can be looked at in each step."""
        return len(self._places) >= MOST_PLACES

    @property
    def arrays(self) -> bool:
        """Whether numbers of arrays are compared, whose memory may be that of a tensor."""
        return any(get is bytes_of for get, _ in self._places)

    def array_over(self, tensors: Iterable[Tensor]) -> str | None:
        """The name of an array that lies in the memory of one of some tensors: who writes to the tensor changes it."""
        arrays = [(label, value) for label, value in self.whole if isinstance(value, np.ndarray)]
        if not arrays:
            return None
        written = [_memory_of(t) for t in tensors if t.device.type == "cpu" and t.layout == torch.strided]
        return next((name for name, array in arrays if any(np.may_share_memory(array, each) for each in written)), None)

    def fresh(self) -> bool:
        """Whether no place has changed."""
        now = self._now()
        return all(map(operator.is_, self.before, now)) or self._first_change(now) is None

    def changed(self) -> str | None:
        """The name of a place that is not as it was."""
        found = self._first_change(self._now())
        return None if found is None else self._labels[found]

    def values(self) -> list[tuple[str, Any]]:
        """What now stands where the programs read: plain values, code, arrays and tensors, each with its name.

        The names are the same in every process, and what is read only to compare objects is left out.
        """
        looks = (tuple, len, type, remembered, bytes_of)
        found = [
            (label, value)
            for (get, _), label, value in zip(self._places, self._labels, self._now(), strict=True)
            if get not in looks and _is_plain(value)
        ]
        return found + self.whole

    def _now(self) -> list[Any]:
        try:
            return [get(key) for get, key in self._places]
        except IndexError:  # of a list that has become shorter
            return [_tried(get, key) for get, key in self._places]

    def _first_change(self, now: list[Any]) -> int | None:
        for number, (old, new) in enumerate(zip(self.before, now, strict=True)):
            if old is not new and not _same(old, new):
                return number
        return None


def remembered(cache: dict[Any, Any]) -> tuple[Any, ...]:
    return tuple(cache.values())


def bytes_of(array: np.ndarray) -> tuple[Any, ...]:
    return array.shape, str(array.dtype), array.tobytes()


def _memory_of(tensor: Tensor) -> np.ndarray:
    """All memory that a tensor is a part of."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


def _is_plain(value: Any) -> bool:
    """Whether a value is the same line of text in every process."""
    if type(value) is tuple:
        return all(map(_is_plain, value))
    plain = (bool, int, float, complex, str, bytes, type(None), types.CodeType, torch.dtype, np.generic)
    return isinstance(value, plain)


def _same(old: Any, new: Any) -> bool:
    """Whether two values that are not one object are alike: numbers and texts, and tuples and sets of them."""
    if type(old) is not type(new):
        return False
    if isinstance(old, float) and old == 0 == new:
        return str(old) == str(new)
    if isinstance(old, tuple) and type(old) is tuple:
        return len(old) == len(new) and all(a is b or _same(a, b) for a, b in zip(old, new, strict=True))
    if type(old) in (bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device):
        return old == new
    if isinstance(old, np.generic):
        return bool(old == new)
    if type(old) is frozenset:
        return {(type(item), item) for item in old} == {(type(item), item) for item in new}
    return False


def _tried(get: Callable[[Any], Any], key: Any) -> Any:
    try:
        return get(key)
    except IndexError:
        return MISSING
