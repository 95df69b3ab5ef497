"""Schedules of the learning rate: what multiplies it, as a function of the fraction of steps done."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

Schedule: TypeAlias = Callable[[float], float]


def constant(fraction: float) -> float:
    """1 throughout."""
    return 1.0


def cosine(fraction: float) -> float:
    """From 1 to 0 along half a cosine. Loshchilov and Hutter 2017, arXiv:1608.03983."""
    return 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))


def one_cycle(fraction: float, warm: float = 0.1) -> float:
    """Linearly up to 1 in the first tenth, then to 0 along half a cosine.

    Reference: Smith and Topin, Super-Convergence, 2018. arXiv:1708.07120
    """
    return (fraction + 1e-3) / (warm + 1e-3) if fraction < warm else cosine((fraction - warm) / (1 - warm))


SCHEDULES: dict[str, Schedule] = {"constant": constant, "cosine": cosine, "one-cycle": one_cycle}
