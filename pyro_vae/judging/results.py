"""What estimates and diagnostics return: numbers that say their errors, and turn into plain data, frames and pictures.

A number for a set of data has

    value         the mean over the data
    mc_stderr     its Monte Carlo standard error, given these data: what more samples make smaller
    data_stderr   its standard error for the population of the data: what more data make smaller
    pointwise     the number per datum, (N,)
    num_samples   K, samples per datum

A table compares several. Both print, and both have `to_dict`, `to_frame` and a form for notebooks. `Nats` is what a
judgement keeps of a number: as JSON, without what stands behind it.
"""

from __future__ import annotations

import dataclasses
import html
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_vae.judging.tables import latex
from pyro_vae.words import did_you_mean

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
        columns = {n: v for n, v in _fields(self) if isinstance(v, Tensor) and v.shape == each.shape}
        return pandas.DataFrame({name: value.tolist() for name, value in columns.items()})

    def to_latex(self) -> str:
        """The table in LaTeX, between the rules of booktabs, with numbers as in notebooks."""
        head, body = self._cells()
        return latex([head, *body])

    def plot(self, ax: Any = None) -> Any:
        """The numbers of the table with two standard errors each, as a figure, or drawn into `ax`."""
        from pyro_vae.plots import number_bars

        return number_bars(self.rows(), ax=ax)

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
        return head, [[_cell(line.get(name)) for name in head] for line in rows]


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
    def with_errors(self) -> str:
        """The number and both of its errors, in words."""
        return f"{self.value:.2f} ± {self.mc_stderr:.2f} (Monte Carlo; {over_data(self.data_stderr)}) nats"


@dataclass(frozen=True)
class Mean(Measured):
    """A number whose Monte Carlo errors are known per datum.

    Attributes:
        pointwise_stderr: They, (N,).
    """

    pointwise_stderr: Tensor

    @classmethod
    def of(cls, pointwise: Tensor, variance: Tensor, num_samples: int, left: Tensor | None = None) -> Mean:
        """From values and Monte Carlo variances per datum, and what remained to climb, which does not average out."""
        found = averaged(pointwise, variance)
        if left is not None:
            found["mc_stderr"] = math.hypot(found["mc_stderr"], left.mean().item())
            variance = variance + left.square()
        return cls(**found, num_samples=num_samples, pointwise_stderr=variance.sqrt())

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.mc_stderr:.2f}"


def averaged(pointwise: Tensor, variance: Tensor) -> dict[str, Any]:
    """The fields of a `Measured` but for num_samples, from values and Monte Carlo variances per datum, (N,)."""
    count = len(pointwise)
    return {
        "value": pointwise.mean().item(),
        "mc_stderr": variance.sum().sqrt().item() / count,
        "data_stderr": pointwise.std().item() / math.sqrt(count) if count > 1 else math.nan,
        "pointwise": pointwise,
    }


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

    @classmethod
    def of(cls, measured: Measured | None) -> Nats:
        """What is known of a number for a set of data."""
        return cls() if measured is None else cls(measured.value, measured.mc_stderr, measured.data_stderr)

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


def over_data(data_stderr: float) -> str:
    """The error for the population in words; a single datum says nothing of others."""
    return "one datum" if math.isnan(data_stderr) else f"data ± {data_stderr:.2f}"


def listed(names: Sequence[str], most: int, between: str = ", ") -> str:
    """Names in a row, and how many more there are.

    Example:
        >>> listed("abc", 2)
        'a, b, and 1 more'
    """
    return between.join(names[:most]) + (f"{between}and {len(names) - most} more" if len(names) > most else "")


def aligned(lines: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Cells as lines of one length, the first columns flush left and the others flush right.

    Example:
        >>> aligned([["set", "bound"], ["test", "-1.2"]])
        ['set   bound', 'test   -1.2']
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    forms = [f"{'<' if i < left else '>'}{width}" for i, width in enumerate(widths)]
    return ["  ".join(map(format, line, forms)) for line in lines]


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
    """The numbers and words among the fields of a dataclass; of a `Mean` the value and its errors."""
    found: dict[str, Any] = {}
    for name, value in _fields(result):
        if isinstance(value, Measured):
            found |= {name: value.value, f"{name}_mc_stderr": value.mc_stderr, f"{name}_data_stderr": value.data_stderr}
        elif value is None or isinstance(value, bool | int | float | str):
            found[name] = value
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
        return Nats(**{name: typed(float, item) for name, item in value.items()})
    if kind is float:
        return math.nan if value is None else float(value)
    if typing.get_origin(kind) in (tuple, dict):
        inner = [each for each in typing.get_args(kind) if each is not Ellipsis][-1]
        if isinstance(value, dict):
            return {key: typed(inner, item) for key, item in value.items()}
        return tuple(typed(inner, item) for item in value)
    return value


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
