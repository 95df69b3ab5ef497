"""What estimates and diagnostics return: numbers that say their errors, and turn into plain data, frames and pictures.

A number for a set of data is a `Measured`; a table compares several. Both print, and both have `to_dict`, `to_frame`
and a form for notebooks. `Nats` is what a judgement keeps of a number: as JSON, without what stands behind it.
"""

from __future__ import annotations

import dataclasses
import html
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from pyro_vae import plots
from pyro_vae.judging._equality import Comparable
from pyro_vae.judging.quotes import Kind, latex, lower_bound, over_data
from pyro_vae.words import did_you_mean

R = TypeVar("R")

# Nats below which nothing is said to be at fault.
RELEVANT = 0.05


class Result:
    """A dataclass that turns into plain data; tables override `rows`."""

    def rows(self) -> list[dict[str, Any]]:
        """As a table: a row for each of what is compared, of numbers and words by their names."""
        return [row(self)]

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python: tensors become lists."""
        return {name: plain(value) for name, value in _fields(self)}

    def to_frame(self, pointwise: bool = False) -> Any:
        """The table as a pandas frame.

        Args:
            pointwise: One row per datum instead, of all that is known of each.
        Raises:
            ValueError: pandas is missing; nothing is known of single data.
        """
        try:
            import pandas
        except ImportError as error:
            raise ValueError("to_frame needs pandas, which is not installed. Run: pip install pandas") from error
        if not pointwise:
            return pandas.DataFrame(self.rows())
        each = getattr(self, "pointwise", None)
        if not isinstance(each, Tensor):
            raise ValueError(
                f"got pointwise=True for a {type(self).__name__}, which has no values per datum of its own. "
                "Ask one of its parts."
            )
        columns = {n: v.tolist() for n, v in _fields(self) if isinstance(v, Tensor) and v.shape == each.shape}
        return pandas.DataFrame(columns)

    def to_latex(self) -> str:
        """The table in LaTeX, between the rules of booktabs, with numbers as in notebooks."""
        head, body = self._cells()
        return latex([head, *body])

    def plot(self, ax: Any = None) -> Any:
        """The numbers of the table with two standard errors each, as a figure, or drawn into `ax`."""
        return plots.number_bars(self.rows(), ax=ax)

    def _repr_html_(self) -> str:
        head, body = self._cells()
        lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
        lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in body]
        table = "".join(f"<tr>{line}</tr>" for line in lines)
        return f"<div><p>{html.escape(str(self).splitlines()[0])}</p><table>{table}</table></div>"

    def _repr_markdown_(self) -> str:
        head, body = self._cells()
        lines = [head, ["---"] * len(head), *body]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return str(self).splitlines()[0].replace("|", "\\|") + "\n\n" + table

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        rows = self.rows()
        head = list(dict.fromkeys(name for line in rows for name in line))
        cells = [[line.get(name) for name in head] for line in rows]
        return head, [["" if c is None else f"{c:.4g}" if isinstance(c, float) else str(c) for c in cs] for cs in cells]


@dataclass(frozen=True)
class Measured(Result):
    """A number for a set of data, in nats, with both of its errors: a bound, a gap, a term.

    Attributes:
        value: The mean over the data.
        mc_stderr: Its error given these data: Monte Carlo, and what remained to climb where steps led there.
        data_stderr: Its standard error for the population of the data; nan for one datum.
        pointwise: Per datum, (N,).
        num_samples: K.
    """

    value: float
    mc_stderr: float
    data_stderr: float
    pointwise: Tensor
    num_samples: int

    def measured(self) -> dict[str, Any]:
        """The fields that every number for a set of data has, by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Measured)}

    @property
    def kind(self) -> Kind:
        """Whether the value is an estimate, of which the error holds, or a lower bound, of which it does not."""
        return "estimate"

    @property
    def with_errors(self) -> str:
        """The number and both of its errors, in words; of a lower bound only that of the data."""
        if self.kind == "lower bound":
            return f"{lower_bound(self.value)} nats ({over_data(self.data_stderr)})"
        return f"{self.value:.2f} ± {self.mc_stderr:.2f} (Monte Carlo; {over_data(self.data_stderr)}) nats"

    @property
    def equation(self) -> str:
        """As `with_errors`, with the sign that belongs behind its name: "= -86.41 ± ..." or ">= -86.5 ..."."""
        return self.with_errors if self.kind == "lower bound" else f"= {self.with_errors}"


@dataclass(frozen=True)
class Mean(Measured):
    """A number whose Monte Carlo errors are known per datum.

    Attributes:
        pointwise_stderr: They, (N,).
        bound: Whether the value is, or stands on, a log p(x) that is a lower bound (see `kind_of`).
    """

    pointwise_stderr: Tensor
    bound: bool = False

    @property
    def kind(self) -> Kind:
        return "lower bound" if self.bound else "estimate"

    @classmethod
    def of(
        cls, pointwise: Tensor, variance: Tensor, num_samples: int, left: Tensor | None = None, bound: bool = False
    ) -> Mean:
        """From values and Monte Carlo variances per datum, and what remained to climb, which does not average out."""
        found = averaged(pointwise, variance)
        if left is not None:
            found["mc_stderr"] = math.hypot(found["mc_stderr"], left.mean().item())
            variance = variance + left.square()
        return cls(**found, num_samples=num_samples, pointwise_stderr=variance.sqrt(), bound=bound)

    def __str__(self) -> str:
        return lower_bound(self.value) if self.bound else f"{self.value:.2f} ± {self.mc_stderr:.2f}"

    @property
    def signed(self) -> str:
        """With the sign that belongs behind its name."""
        return str(self) if self.bound else f"= {self}"


def averaged(pointwise: Tensor, variance: Tensor) -> dict[str, Any]:
    """The fields of a `Measured` but for num_samples, from values and Monte Carlo variances per datum, (N,)."""
    count = len(pointwise)
    return {
        "value": pointwise.mean().item(),
        "mc_stderr": variance.sum().sqrt().item() / count,
        "data_stderr": pointwise.std().item() / math.sqrt(count) if count > 1 else math.nan,
        "pointwise": pointwise,
    }


@dataclass(frozen=True, eq=False)
class Nats(Comparable):
    """A mean over data in nats, with its errors; nan where it, or an error, is not known.

    Attributes:
        value: The mean.
        mc_stderr: Monte Carlo standard error, given these data.
        data_stderr: Standard error for the population of the data.
        bound: Whether it is a lower bound (see `kind_of`), which prints without its error.
    Example:
        >>> str(Nats(1.23456, 0.002)), Nats(0.2, 0.05).material(), Nats(0.2, 0.11).material()
        ('1.235 ± 0.002', True, False)
        >>> f"log p(x) {Nats(-86.41, 0.1).signed}", f"log p(x) {Nats(-86.41, 0.1, bound=True).signed}"
        ('log p(x) = -86.41 ± 0.10', 'log p(x) >= -86.5')
    """

    value: float = math.nan
    mc_stderr: float = math.nan
    data_stderr: float = math.nan
    bound: bool = False

    @classmethod
    def of(cls, measured: Measured | None) -> Nats:
        """What is known of a number for a set of data."""
        if measured is None:
            return cls()
        return cls(measured.value, measured.mc_stderr, measured.data_stderr, measured.kind == "lower bound")

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
        return Nats(self.value, math.hypot(self.mc_stderr, self.data_stderr), bound=self.bound)

    def minus(self, other: Nats) -> Nats:
        """The difference of two independent numbers."""
        return Nats(self.value - other.value, math.hypot(self.mc_stderr, other.mc_stderr), bound=self.bound)

    @property
    def signed(self) -> str:
        """With the sign that belongs behind its name."""
        return str(self) if self.bound and self.known else f"= {self}"

    def __str__(self) -> str:
        if not self.known:
            return "unknown"
        if self.bound:
            return lower_bound(self.value)
        error = self.mc_stderr
        if not math.isfinite(error):
            return f"{self.value:.2f}"
        digits = 2 if error >= 0.005 or error == 0 else min(4, -math.floor(math.log10(error)))
        return f"{self.value:.{digits}f} ± {error:.{digits}f}"


def at_least(least: int, **values: int) -> None:
    """Refuse numbers that are less."""
    for name, value in values.items():
        if value < least:
            wanted = "a positive integer" if least == 1 else f"at least {least}"
            raise ValueError(f"got {name}={value}, wanted {wanted}.")


def one_of(choices: Sequence[str], **values: str) -> None:
    """Refuse words that are none of the choices."""
    for name, value in values.items():
        if value not in choices:
            hint = did_you_mean(value, choices)
            words = [repr(choice) for choice in choices]
            wanted = " or ".join(words) if len(words) == 2 else f"one of {', '.join(words)}"
            raise ValueError(f"got {name}={value!r}, wanted {wanted}.{hint}")


def known(kind: str, name: str, among: Mapping[str, R]) -> R:
    """One of several by its name; a ValueError where it is none of them."""
    if name not in among:
        hint = did_you_mean(name, among)
        raise ValueError(f"got no {kind} {name!r}, wanted one of {', '.join(map(repr, among))}.{hint}")
    return among[name]


def gap_bar(name: str, parts: tuple[Any, Any], total: Any) -> dict[str, Any]:
    """A row of `plots.gap_bars`: approximation and amortization gap, or the total where one of them is None."""
    numbers = {"total": total} if None in parts else dict(zip(("approximation", "amortization"), parts, strict=True))
    known = {part: number for part, number in numbers.items() if number is not None}
    values = {part: number.value for part, number in known.items()}
    return {"guide": name} | values | {f"{part}_stderr": number.mc_stderr for part, number in known.items()}


def table(**columns: Any) -> list[dict[str, Any]]:
    """Rows, from columns of one length.

    Example:
        >>> import torch
        >>> table(latent=("a", "b"), value=torch.tensor([1.0, 2.0]))
        [{'latent': 'a', 'value': 1.0}, {'latent': 'b', 'value': 2.0}]
    """
    lists = [column.tolist() if isinstance(column, Tensor) else column for column in columns.values()]
    return [dict(zip(columns, line, strict=True)) for line in zip(*lists, strict=True)]


def row(result: Any) -> dict[str, Any]:
    """The numbers and words among the fields of a dataclass; of a `Mean` the value and its errors.

    A lower bound is named as one, and has neither a Monte Carlo error nor a bias.
    """
    found: dict[str, Any] = {}
    for name, value in _fields(result):
        if isinstance(value, Measured):
            bound = value.kind == "lower bound"
            error = None if bound else value.mc_stderr
            found |= {name: value.value, f"{name}_mc_stderr": error, f"{name}_data_stderr": value.data_stderr}
            found |= {f"{name}_is": value.kind} if bound else {}
        elif value is None or isinstance(value, bool | int | float | str):
            found[name] = value
    if isinstance(result, Measured) and result.kind == "lower bound":
        found |= {name: None for name in ("mc_stderr", "bias", "smoothed_stderr") if name in found}
        found["is"] = result.kind
    return found


def _fields(result: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(result, field.name)) for field in dataclasses.fields(result)]


def plain(value: Any, finite: bool = False) -> Any:
    """As plain Python: tensors as lists, named fields as dicts; if asked, what is not finite as None."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if dataclasses.is_dataclass(value):
        value = dict(_fields(value))
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): plain(each, finite) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each, finite) for each in value]
    if finite and isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def typed(kind: Any, value: Any) -> Any:
    """What `plain` made finite, as the field's type again."""
    if kind is Nats:
        return Nats(**{name: item if name == "bound" else typed(float, item) for name, item in value.items()})
    if kind is float:
        return math.nan if value is None else float(value)
    if typing.get_origin(kind) in (tuple, dict):
        inner = [each for each in typing.get_args(kind) if each is not Ellipsis][-1]
        if isinstance(value, dict):
            return {key: typed(inner, item) for key, item in value.items()}
        return tuple(typed(inner, item) for item in value)
    return value
