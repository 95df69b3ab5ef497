"""What all figures share: sizes, colours, empty axes, numbers and images as arrays.

Colours differ in lightness, and lines also in dash and marker, so that a grey print can be read.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#718096"
DARK, LIGHT = "#1a4480", "#f6b26b"
STYLES = (("o", "-", DARK), ("s", "--", ORANGE), ("^", "-.", "#4a5568"), ("D", ":", "#2f855a"), ("v", "--", "#97266d"))
# Of classes: Okabe and Ito's, which the colour-blind tell apart; after eight of them another shape, as in `explore`.
CLASSES = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8a7a00", "#333333")
SHAPES = ("o", "^", "s")
INCHES = 7.0
Numbers = Any  # a list of numbers, an array or a tensor


def canvas(width: float, height: float) -> Figure:
    """An empty figure of so many inches that needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def axes_of(ax: Axes | None, width: float, height: float) -> tuple[Figure, Axes]:
    """Where to draw: the axes that were given, or the only ones of a new figure of so many inches."""
    if ax is None:
        figure = canvas(width, height)
        return figure, figure.subplots()
    found: Any = ax.figure
    while found.figure is not found:  # a part of a figure
        found = found.figure
    return found, ax


def titled_axes(ylabel: str, title: str, xlabel: str, ax: Axes | None = None) -> tuple[Figure, Axes]:
    figure, axes = axes_of(ax, INCHES, 3.8)
    label_axes(axes, ylabel, title, xlabel)
    return figure, axes


def panels_of(count: int, title: str, ax: Axes | None) -> tuple[Figure, list[Axes]]:
    """At most eight small panels, one for each latent, below a title; or the axes that were given for the first."""
    if ax is not None:
        return axes_of(ax, 4.2, 3.4)[0], [ax]
    shown = min(count, 8)
    columns = min(shown, 4)
    lines = -(-shown // columns)
    figure = canvas(4.2 if shown == 1 else 1.9 * columns + 0.4, 0.5 + 1.9 * lines + (1 if shown == 1 else 0))
    grid = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    for axes in grid[shown:]:
        axes.set_axis_off()
    some = f"; {shown} of {count} latents" if shown < count else ""
    figure.suptitle(title + some, x=0.02, ha="left", fontsize=11)
    return figure, grid[:shown]


def label_axes(axes: Axes, ylabel: str, title: str, xlabel: str = "") -> None:
    axes.set_ylabel(ylabel)
    axes.set_xlabel(xlabel)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(alpha=0.25, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def show_legend(axes: Axes, **where: Any) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=9, **where)


def styles(names: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [STYLES[i % len(STYLES)] for i in range(len(names))]


def array(x: Numbers) -> np.ndarray:
    """Numbers as float64, None as nan."""
    return np.asarray(x.detach().cpu().numpy() if isinstance(x, Tensor) else x, dtype=float)


def pixels(x: Tensor) -> np.ndarray:
    """One image, (C, H, W), as (H, W) or (H, W, 3) in [0, 1]."""
    image = x.detach().float().cpu().clamp(0, 1).numpy()
    return image[0] if image.shape[0] != 3 else image.transpose(1, 2, 0)


def pair_of(vae: Any) -> Any:
    """The pair in a run, or the pair itself."""
    return getattr(vae, "vae", vae)


def plane_check(count: int) -> None:
    """Refuse a pair of so many latents, unless two."""
    if count != 2:
        raise ValueError(f"got a pair of {count} latents, wanted two, which make a plane. Build it with latent_dim=2.")


def show_image(axes: Axes, x: Tensor) -> None:
    """One image, (C, H, W), without ticks."""
    axes.imshow(pixels(x), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def number(value: float, digits: int = 2) -> str:
    if np.isneginf(value):
        return "−∞"
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def wrapped(name: str, width: int = 28) -> str:
    """A name in lines of so many characters, so that a long one does not press the picture aside.

    Example:
        >>> wrapped("von-mises-fisher, iwae, 3 epochs", 20)
        'von-mises-fisher,\\niwae, 3 epochs'
    """
    return textwrap.fill(name, width)


def latent_name(names: Sequence[str], index: int) -> str:
    return names[index] if index < len(names) else f"z{index + 1}"
