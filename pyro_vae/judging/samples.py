"""How far samples are from data, without a density."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Distance(NamedTuple):
    """A distance between two sets, and what it is between two halves of the second."""

    value: float
    null: float


def energy_distance(samples: Tensor, data: Tensor) -> Distance:
    """Energy distance between two sets, in the units of the data.

        D^2 = 2 E|X - Y| - E|X - X'| - E|Y - Y'|

    Zero only for equal distributions. The unbiased estimate of D^2 is returned, so it
    can be slightly negative; ``null`` is the same between two halves of the data and
    says how large a value is still nothing.

    Args:
        samples: (N, *shape).
        data: (M, *shape).
    Raises:
        ValueError: Fewer than two samples or four data, or different shapes.
    Example:
        >>> x = torch.arange(8.0).reshape(8, 1)
        >>> energy_distance(x + 100, x).value > 100
        True

    Reference: Szekely and Rizzo, Energy statistics, 2013. doi:10.1016/j.jspi.2013.03.018
    """
    if len(samples) < 2 or len(data) < 4 or samples.shape[1:] != data.shape[1:]:
        raise ValueError(
            f"got sets of shapes {tuple(samples.shape)} and {tuple(data.shape)}, wanted at least 2 and 4 of one shape."
        )
    x, y = samples.flatten(1).double(), data.flatten(1).double()
    even, odd = y[::2], y[1::2]
    return Distance(_squared(x, y), _squared(even, odd))


def _squared(x: Tensor, y: Tensor) -> float:
    between = torch.cdist(x, y).mean()
    within = [torch.cdist(s, s).sum() / (len(s) * (len(s) - 1)) for s in (x, y)]
    return (2 * between - within[0] - within[1]).item()
