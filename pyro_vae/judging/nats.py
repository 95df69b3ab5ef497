"""A number in nats with its errors, and what it takes to keep such numbers as JSON."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Any

# Nats below which nothing is said to be at fault.
RELEVANT = 0.05


@dataclass(frozen=True)
class Nats:
    """A mean over data in nats, with its errors; nan where it, or an error, is not known.

    Attributes:
        value: The mean.
        mc_stderr: Monte Carlo standard error, given these data.
        data_stderr: Standard error for the population of the data.
    Example:
        >>> str(Nats(1.23456, 0.002)), Nats(0.2, 0.05).material(), Nats(0.2, 0.11).material()
        ('1.235 ± 0.002', True, False)
    """

    value: float = math.nan
    mc_stderr: float = math.nan
    data_stderr: float = math.nan

    @property
    def known(self) -> bool:
        """Whether there is a value."""
        return math.isfinite(self.value)

    def material(self, size: float = RELEVANT) -> bool:
        """Whether it is above twice its error and of a size that matters; an unknown error is none to rely on."""
        return self.known and self.value > 2 * self.mc_stderr and self.value > size

    def of_population(self) -> Nats:
        """The same number as an answer for all data of the kind: both errors in one, where both are known."""
        if not math.isfinite(self.data_stderr):
            return self
        return Nats(self.value, math.hypot(self.mc_stderr, self.data_stderr))

    def minus(self, other: Nats) -> Nats:
        """The difference of two independent numbers."""
        return Nats(self.value - other.value, math.hypot(self.mc_stderr, other.mc_stderr))

    def __str__(self) -> str:
        if not self.known:
            return "unknown"
        error = self.mc_stderr
        if not math.isfinite(error):
            return f"{self.value:.2f}"
        digits = 2 if error >= 0.005 or error == 0 else min(4, -math.floor(math.log10(error)))
        return f"{self.value:.{digits}f} ± {error:.{digits}f}"


def plain(value: Any) -> Any:
    """As JSON can hold it: dataclasses and mappings as objects, what is not finite as None."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def typed(kind: Any, value: Any) -> Any:
    """What `plain` made, as the field's type again."""
    if kind is Nats:
        return Nats(**{name: typed(float, item) for name, item in value.items()})
    if kind is float:
        return math.nan if value is None else float(value)
    if typing.get_origin(kind) in (tuple, dict):
        inner = [each for each in typing.get_args(kind) if each is not Ellipsis][-1]
        if isinstance(value, dict):
            return {key: typed(inner, item) for key, item in value.items()}
        return tuple(typed(inner, item) for item in value)
    return value
