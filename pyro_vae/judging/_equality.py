"""When results are equal: where their numbers are, and where the same ones are not known."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any


class Comparable:
    """A dataclass (of eq=False) that equals another of the same fields; nan, a number that is not known, equals nan.

    The == that a dataclass is given asks whether both are one object there, and from Python 3.13 on says no even then.
    """

    def __eq__(self, other: object) -> bool:
        return self._compared() == other._compared() if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._compared())

    def _compared(self) -> tuple[Any, ...]:
        fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(typing.cast(Any, self))
        return tuple(_with_one_nan(getattr(self, field.name)) for field in fields if field.compare)


def _with_one_nan(value: Any) -> Any:
    """With the same object for every nan, which tuples and dicts then take for equal."""
    if isinstance(value, dict):
        return {key: _with_one_nan(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_with_one_nan(each) for each in value)
    return math.nan if isinstance(value, float) and math.isnan(value) else value
