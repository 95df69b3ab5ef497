"""How far samples are from data, without a density."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.options import checked


class Distance(NamedTuple):
    """A distance between two sets, and the spread of what halves of the second give.

    Attributes:
        value: The distance.
        null: Root mean square of the distance between random halves of the data: a
            value of this size is nothing.
    """

    value: float
    null: float


@checked
def energy_distance(samples: Tensor, data: Tensor, *, halvings: int = 20, seed: int = 0) -> Distance:
    """Energy distance between two sets, in the units of the data.

        D^2 = 2 E|X - Y| - E|X - X'| - E|Y - Y'|

    Zero only for equal distributions. The unbiased estimate of D^2 is returned, so it
    can be slightly negative; ``null`` says how large a value is still nothing.

    Args:
        samples: (N, *shape).
        data: (M, *shape).
        halvings: Random halvings of the data for the null value.
        seed: Seed of the halvings.
    Returns:
        The distance, beside that of two halves of the data.
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
            f"got sets of shapes {tuple(samples.shape)} and {tuple(data.shape)}, wanted at least 2 and 4 of one shape. "
            "Draw more samples, or give more data."
        )
    x, y = (s.detach().cpu().flatten(1).double() for s in (samples, data))
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(y), generator=generator) for _ in range(halvings)]
    nulls = torch.tensor([_squared(y[order[::2]], y[order[1::2]]) for order in orders])
    return Distance(_squared(x, y), nulls.square().mean().sqrt().item())


def _squared(x: Tensor, y: Tensor) -> float:
    between = torch.cdist(x, y).mean()
    within = [torch.cdist(s, s).sum() / (len(s) * (len(s) - 1)) for s in (x, y)]
    return (2 * between - within[0] - within[1]).item()
