"""Shapes of what goes in and out of a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from pyro_vae.options import integers

Shape: TypeAlias = int | Sequence[int]


def as_shape(shape: Shape) -> tuple[int, ...]:
    """A number is the shape of a vector."""
    found = integers("shape", shape if hasattr(shape, "__len__") else (shape,))
    if not all(size > 0 for size in found):
        raise ValueError(f"got shape {found}, wanted positive sizes.")
    return found


def leading_shape(x: Tensor, shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    """The leading dimensions of x before the event shape, checked."""
    split = x.dim() - len(shape)
    if split < 0 or tuple(x.shape[split:]) != shape:
        raise ValueError(f"{name} got shape {tuple(x.shape)}, wanted (..., {', '.join(map(str, shape))}).")
    return tuple(x.shape[:split])


def as_image(shape: Sequence[int]) -> tuple[int, int, int]:
    """A shape of (channels, height, width), checked."""
    if len(shape) != 3:
        raise ValueError(f"got shape {tuple(shape)}, wanted (channels, height, width). For vectors use MLP.")
    return (shape[0], shape[1], shape[2])


def halvings(size: tuple[int, int], times: int) -> list[tuple[int, int]]:
    """Heights and widths from the full size down, halved so many times, rounded up."""
    sizes = [size]
    for _ in range(times):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return sizes
