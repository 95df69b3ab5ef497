"""The scalar equation on which the inverses of planar and Sylvester flows rest."""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 16


def invert_tanh_step(slope: Tensor, value: Tensor) -> Tensor:
    """The a that solves a + m tanh(a) = c, exact to rounding and differentiable in m and c.

    The left side increases in a for m > -1, is odd, and on a >= 0 is convex for m < 0
    and concave for m > 0. Newton's iteration from outside the root (convex) or inside it
    (concave) is therefore monotone and needs no bracket; the start is the better of two
    bounds, c - m and c / (1 + m). A fixed number of steps keeps it free of branches.

    Args:
        slope: m > -1, any shape.
        value: c, broadcasts with m.
    Returns:
        a, of the broadcast shape. First and second derivatives are right.
    Example:
        >>> a = invert_tanh_step(torch.tensor(2.0), torch.tensor(-3.0))
        >>> torch.allclose(a + 2 * a.tanh(), torch.tensor(-3.0))
        True
    """
    with torch.no_grad():
        m, c = torch.broadcast_tensors(slope, value.abs())
        chord, shifted = c / (1 + m), c - m
        a = torch.where(m < 0, torch.minimum(chord, shifted), torch.maximum(chord, shifted))
        for _ in range(_STEPS):
            t = a.tanh()
            a = a - (a + m * t - c) / (1 + m * (1 - t * t))
        a = a * value.sign()
    # At the root Newton's correction is zero, and its derivative is that of the root.
    for _ in range(2):
        t = a.tanh()
        a = a - (a + slope * t - value) / (1 + slope * (1 - t * t))
    return a
