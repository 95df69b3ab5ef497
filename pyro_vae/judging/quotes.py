"""How a log p(x) may be quoted: the one rule, and the words.

A log p(x) by importance sampling may miss mass of the posterior. Then it is a lower bound, and its Monte Carlo error
and its bias by the jackknife, which are of the same weights, have missed that mass as well. `kind_of` is the rule, and
everything that prints such a number prints it as `lower_bound` does: ``>= 2216.8``, without an error, never
``2216.81 ± 0.10``.
"""

from __future__ import annotations

import math
from typing import Literal

# The share of the data whose k-hat must be good for their mean to be an estimate with an error.
TRUSTED = 0.9

Kind = Literal["estimate", "lower bound", "unchecked"]
Method = Literal["importance", "quadrature"]


def kind_of(khat_ok: float, method: str = "importance") -> Kind:
    """What a mean of log p(x) over data is, by the share of them whose k-hat is below `khat_limit`.

    The rule, for all data together: an estimate where the share is 0.9 or more, a lower bound where it is less, and
    unchecked where K is too small for a k-hat. By quadrature, which is an estimate only where it has converged, there
    are no weights.

    Example:
        >>> kind_of(0.99), kind_of(0.23), kind_of(math.nan)
        ('estimate', 'lower bound', 'unchecked')
    """
    if method == "quadrature":
        return "estimate"
    if math.isnan(khat_ok):
        return "unchecked"
    return "estimate" if khat_ok >= TRUSTED else "lower bound"


def lower_bound(value: float) -> str:
    """A number that is one, in words: rounded down, so that it stays one.

    Example:
        >>> lower_bound(2216.89), lower_bound(-86.41), lower_bound(0.269)
        ('>= 2216.8', '>= -86.5', '>= 0.26')
    """
    if not math.isfinite(value):
        return f">= {value}"
    digits = 1 if abs(value) >= 10 else 2
    return f">= {math.floor(10**digits * value) / 10**digits:.{digits}f}"


def about_weights(khat_ok: float, num_samples: int, hat: str = "k̂", method: str = "importance") -> str:
    """What follows a log p(x): whether the weights of its importance sampling can be relied upon, or that it has none.

    Args:
        khat_ok: As for `kind_of`.
        num_samples: K.
        hat: How k-hat is written.
        method: How it was computed, one of `Method`.
    Example:
        >>> about_weights(0.992, 100), about_weights(math.nan, 5), about_weights(math.nan, 41, method="quadrature")
        (', k̂ ok for 99.2 %', ', k̂ unknown at K = 5', ', by quadrature')
    """
    if method == "quadrature":
        return ", by quadrature"
    kind = kind_of(khat_ok)
    if kind == "unchecked":
        return f", {hat} unknown at K = {num_samples}"
    text = f", {hat} ok for {100 * khat_ok:.1f} %"
    if kind == "estimate":
        return text
    return text + " (a lower bound: the weights of the others miss mass; take more samples or enrich the guide)"


def over_data(data_stderr: float) -> str:
    """The error for the population in words; a single datum says nothing of others."""
    return "one datum" if math.isnan(data_stderr) else f"data ± {data_stderr:.2f}"
