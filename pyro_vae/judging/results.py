"""What estimates and diagnostics return: numbers that say their errors, and turn into plain data, frames and pictures.

A number for a set of data has

    value         the mean over the data
    mc_stderr     its Monte Carlo standard error, given these data: what more samples make smaller
    data_stderr   its standard error for the population of the data: what more data make smaller
    pointwise     the number per datum, (N,)
    num_samples   K, samples per datum

A table compares several. Both print, and both have `to_dict`, `to_frame` and a form for notebooks.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


class Result:
    """A dataclass that turns into plain data; tables override `rows`."""

    def rows(self) -> list[dict[str, Any]]:
        """As a table: a row for each of what is compared, of numbers and words by their names."""
        return [row(self)]

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python: tensors become lists."""
        return {name: _plain(value) for name, value in _fields(self)}

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


class Measured(Result):
    """A number for a set of data, in nats, with both of its errors."""

    value: float
    mc_stderr: float
    data_stderr: float
    pointwise: Tensor
    num_samples: int

    @property
    def said(self) -> str:
        """The number with its errors."""
        return f"{self.value:.2f} ± {self.mc_stderr:.2f} (Monte Carlo; {over_data(self.data_stderr)}) nats"


@dataclass(frozen=True)
class Mean(Measured):
    """A bound, a gap, a term: anything averaged over data, in nats.

    Attributes:
        value: The mean over the data.
        mc_stderr: Its error given these data: Monte Carlo, and what remained to climb where steps led there.
        data_stderr: Standard error of the mean for the population of the data.
        pointwise: Per datum, (N,).
        num_samples: K.
        pointwise_stderr: Monte Carlo error per datum, (N,).
    """

    value: float
    mc_stderr: float
    data_stderr: float
    pointwise: Tensor
    num_samples: int
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
    """The fields that every `Measured` has, from values and Monte Carlo variances per datum, (N,).

    Example:
        >>> import torch
        >>> averaged(torch.tensor([1.0, 1.0]).double(), torch.tensor([2.0, 2.0]))
        {'value': 1.0, 'mc_stderr': 1.0, 'data_stderr': 0.0, 'pointwise': tensor([1., 1.], dtype=torch.float64)}
    """
    count = len(pointwise)
    return {
        "value": pointwise.mean().item(),
        "mc_stderr": variance.sum().sqrt().item() / count,
        "data_stderr": pointwise.std().item() / math.sqrt(count) if count > 1 else math.nan,
        "pointwise": pointwise,
    }


def over_data(data_stderr: float) -> str:
    """The error for the population in words; a single datum says nothing of others.

    Example:
        >>> over_data(0.24), over_data(float("nan"))
        ('data ± 0.24', 'one datum')
    """
    return "one datum" if math.isnan(data_stderr) else f"data ± {data_stderr:.2f}"


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


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if dataclasses.is_dataclass(value):
        return {name: _plain(each) for name, each in _fields(value)}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
