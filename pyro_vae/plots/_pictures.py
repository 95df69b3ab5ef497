"""Figures of a fitted pair: tensors in, matplotlib figures out, nothing global touched.

Images are (N, C, H, W) in [0, 1], grey or RGB; vectors, (N, D), are shown as the rows of a heat map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pyro_vae.plots._canvas import (
    BLUE,
    CLASSES,
    GREY,
    INCHES,
    ORANGE,
    SHAPES,
    axes_of,
    canvas,
    label_axes,
    number,
    pixels,
    show_image,
    show_legend,
    titled_axes,
)

_MAX_LABELS = 20


def training_curve(
    records: Sequence[Mapping[str, Any]], finals: Mapping[str, float] | None = None, name: str = "ELBO",
    note: str = "",
    ax: Axes | None = None,
) -> Figure:  # fmt: skip
    """The bound by epoch, scaled so that the part after the steep start can be read.

    Args:
        records: One per epoch, as in `History.records`.
        finals: Numbers to compare with, by name, as dotted lines.
        name: What the bound is called.
        note: What to look at, in a line or two below a figure of its own.
    """
    figure, axes = titled_axes(f"{name} (nats per datum)", "Training curve", "epoch", ax)
    epochs = [record["epoch"] for record in records]
    shown: list[float] = []
    curves: list[list[tuple[int, float]]] = []
    for key, label, colour in (("bound", "training", BLUE), ("validation", "validation", ORANGE)):
        values = [record.get(key) for record in records]
        points = [(e, v) for e, v in zip(epochs, values, strict=True) if v is not None and np.isfinite(v)]
        curves.append(points)
        if points:
            marker = "o" if len(points) < 8 else None
            axes.plot(*zip(*points, strict=True), color=colour, lw=1.6, marker=marker, ms=4, label=label)
            shown += [v for e, v in points if e > 0.1 * epochs[-1]] or [v for _, v in points]
    for i, (label, value) in enumerate((finals or {}).items()):
        axes.axhline(value, color=GREY, lw=1, ls=(":", "--")[i % 2], label=f"{label}: {number(value)}")
        shown.append(value)
    low, high = (min(shown), max(shown)) if shown else (0.0, 1.0)
    pad = 0.06 * (high - low) or 1.0
    axes.set_ylim(low - pad, high + pad)
    below = [e for curve in curves for e, v in curve if v < low - pad]
    if below:  # what came first would press all else flat
        said = f"some of the first {max(below)} epochs lie below"
        axes.text(0.01, 0.01, said, transform=axes.transAxes, fontsize=8, color="#4a5568")
    show_legend(axes, loc="best")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))  # else one epoch is at 1.000
    if note and ax is None:
        figure.set_figheight(figure.get_figheight() + 0.2 * (1 + note.count("\n")))
        figure.supxlabel(note, fontsize=8, color="#4a5568", x=0.02, ha="left")
    return figure


def reconstructions(
    x: Tensor,
    reconstructed: Tensor,
    title: str = "Originals and reconstructions",
    names: tuple[str, str] = ("original", "reconstructed"),
    grey: Tensor | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Originals above their reconstructions.

    Args:
        x: Data, (N, *x_shape).
        reconstructed: E[x | z], of the same shape.
        names: What the two are called.
        grey: The grey levels that binary data were drawn from, of the same shape, to be shown above them.
    """
    if x.dim() == 2:
        return _heatmaps({names[0]: x, names[1]: reconstructed}, title, ax=ax, difference="difference")
    columns = min(len(x), 10)
    rows: list[Tensor] = []
    labels: list[str] = []
    for start in range(0, len(x), columns):
        part = slice(start, start + columns)
        rows += [x[part], reconstructed[part]] if grey is None else [grey[part], x[part], reconstructed[part]]
        labels += names if grey is None else ("grey levels", "drawn", names[1])
    return mosaic(rows, title, labels, gap_after=2 if grey is None else 3, ax=ax)


def samples(
    x: Tensor, title: str = "Samples from the prior", ax: Axes | None = None, rows: Sequence[str] = ()
) -> Figure:
    """Samples in a square, or in the nearest full rectangle.

    Args:
        x: Samples, (N, *x_shape).
        rows: What the rows are, as many as there are of equal length; none for a square.
    """
    if x.dim() == 2:
        each = [name if i % (len(x) // len(rows)) == 0 else "" for name in rows for i in range(len(x) // len(rows))]
        return _heatmaps({"": x}, title, each, ax=ax)
    if rows:
        return mosaic(list(x.split(len(x) // len(rows))), title, rows, ax=ax)
    square = int(np.ceil(len(x) ** 0.5))
    columns = next((c for c in range(square, 2 * square + 1) if len(x) % c == 0), square)
    return mosaic(list(x.split(columns)), title, ax=ax)


def interpolations(x: Tensor, title: str = "Interpolations between test data", ax: Axes | None = None) -> Figure:
    """Straight lines in latent space, one a row.

    Args:
        x: E[x | z] along each line, (N, steps, *x_shape).
    """
    if x.dim() == 3:
        return _heatmaps({f"pair {i + 1}": line for i, line in enumerate(x[:4])}, title, ax=ax)
    return mosaic(list(x), title, ax=ax)


def gallery(x: Tensor, captions: Sequence[str], title: str) -> Figure:
    """Data with a caption under each.

    Args:
        x: Data, (N, *x_shape).
        captions: One per datum.
    """
    if x.dim() == 2:
        return _heatmaps({"": x}, title, captions)
    columns = min(len(x), 8)
    lines = -(-len(x) // columns)
    height, width = x.shape[-2:]
    cell = INCHES / columns
    figure = canvas(INCHES if columns == 8 else max(3.5, cell / 2 * columns), 0)
    cell = figure.get_figwidth() / columns
    figure.set_figheight(lines * (cell * height / width + 0.28) + 0.4)
    grid = figure.subplots(lines, columns, squeeze=False)
    for i, axes in enumerate(grid.flat):
        axes.set_axis_off()
        if i < len(x):
            show_image(axes, x[i])
            axes.text(0.5, -0.03, captions[i], fontsize=7, ha="center", va="top", transform=axes.transAxes)
    figure.suptitle(title, x=0.02, ha="left", fontsize=11)
    return figure


def latent_space(
    z: Tensor, labels: Tensor | None = None, names: Sequence[str] | None = None, ax: Axes | None = None
) -> Figure:
    """Posterior means coloured by label: both latents, or the first two principal components.

    Args:
        z: Posterior means, (N, D).
        labels: One integer per datum, (N,), or None.
        names: Name of each label.
    """
    figure, axes = axes_of(ax, 6.2 if labels is not None else 5.4, 5.2)
    _scatter(axes, z, labels, names, "", legend=True)
    return figure


def latent_spaces(
    views: Mapping[str, Tensor], labels: Tensor | None = None, names: Sequence[str] | None = None
) -> Figure:
    """As `latent_space`, of several guides side by side.

    Args:
        views: Posterior means of the same data, (N, D), by a title each.
        labels: One integer per datum, (N,), or None.
        names: Name of each label.
    """
    single = len(views) == 1
    legend_width = 0.8 if labels is not None else 0.0
    figure = canvas(5.4 * len(views) * (1 if single else 0.82) + legend_width, 5.2 if single else 4.9)
    grid = figure.subplots(1, len(views), squeeze=False)[0]
    for axes, (title, z) in zip(grid, views.items(), strict=True):
        _scatter(axes, z, labels, names, title, legend=axes is grid[-1])
    if not single:
        figure.suptitle("Latent space: posterior means of test data", x=0.02, ha="left", fontsize=11)
    return figure


def _scatter(
    axes: Axes, z: Tensor, labels: Tensor | None, names: Sequence[str] | None, title: str, legend: bool
) -> None:
    points, (horizontal, vertical) = plane(z)
    style: dict[str, Any] = {"s": 9 if len(points) > 1000 else 16, "linewidths": 0, "alpha": 0.75}
    found = labels.unique().tolist() if labels is not None else []
    if labels is not None and len(found) <= _MAX_LABELS:
        for i, label in enumerate(found):
            chosen = points[(labels == label).numpy()]
            name = names[label] if names and label < len(names) else str(label)
            look: dict[str, Any] = {"color": CLASSES[i % len(CLASSES)], "marker": SHAPES[i // len(CLASSES)]}
            axes.scatter(chosen[:, 0], chosen[:, 1], label=name, **look, **style)
        beside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
        shown = axes.legend(frameon=False, markerscale=1.6, title="label", **beside) if legend else None
        for handle in shown.legend_handles if shown is not None else ():
            if handle is not None:
                handle.set_alpha(1)
    else:
        axes.scatter(points[:, 0], points[:, 1], color=BLUE, **style)
    title = title or "Latent space: posterior means of test data"
    if z.flatten(1).shape[1] > 2 and "principal" not in title:
        title += ", principal components"
    label_axes(axes, vertical, title, horizontal)
    axes.set_aspect("equal", adjustable="datalim")


def plane(z: Tensor) -> tuple[np.ndarray, tuple[str, str]]:
    """Two coordinates per latent, (N, 2), and what they are.

    Example:
        >>> plane(torch.zeros(3, 2))[1]
        ('z1', 'z2')
    """
    z = z.detach().flatten(1).double().cpu()
    if z.shape[1] == 1:
        return torch.cat([z, torch.zeros_like(z)], 1).numpy(), ("z1", "")
    if z.shape[1] == 2:
        return z.numpy(), ("z1", "z2")
    centred = z - z.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    if len(s) < 2:  # one datum has no direction to vary in, and lies at the origin of the plane
        u, s = torch.zeros(len(z), 2, dtype=z.dtype), torch.zeros(2, dtype=z.dtype)
    share = 100 * s.square() / s.square().sum().clamp(min=1e-12)
    first, second = (f"principal component {i + 1} of {z.shape[1]} latents ({share[i]:.0f} %)" for i in range(2))
    return (u[:, :2] * s[:2]).numpy(), (first, second)


def mosaic(
    rows: list[Tensor], title: str, labels: Sequence[str] = (), gap_after: int = 0, ax: Axes | None = None
) -> Figure:
    """Rows of images as one picture, with thin white lines between them."""
    columns = max(len(row) for row in rows)
    _, height, width = rows[0].shape[1:]
    # Enlarged by whole pixels, so that the lines are thin and the pixels stay square.
    zoom = max(1, round(56 / max(height, width)))
    line = max(2, round(zoom * max(height, width) / 28))
    high, wide = height * zoom + line, width * zoom + line
    breaks = [3 * line * (r // gap_after) if gap_after else 0 for r in range(len(rows))]
    picture = np.ones((len(rows) * high + breaks[-1] - line, columns * wide - line, 3), dtype=np.float32)
    for r, row in enumerate(rows):
        for c, x in enumerate(row):
            image = pixels(x)
            image = np.stack([image] * 3, -1) if image.ndim == 2 else image
            top, left = r * high + breaks[r], c * wide
            picture[top : top + height * zoom, left : left + width * zoom] = image.repeat(zoom, 0).repeat(zoom, 1)
    inches = min(INCHES, max(3.2, 0.75 * columns))
    figure, axes = axes_of(ax, inches, inches * picture.shape[0] / picture.shape[1] + 0.4)
    axes.imshow(picture, interpolation="antialiased")
    axes.set_xticks([])
    axes.set_yticks([r * high + breaks[r] + high / 2 for r in range(len(labels))], labels, fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", fontsize=11)
    return figure


def _heatmaps(
    panels: Mapping[str, Tensor], title: str, captions: Sequence[str] = (), ax: Axes | None = None,
    difference: str = "",
) -> Figure:  # fmt: skip
    """Vectors as rows of heat maps that share one colour scale, with the difference of the first two under that name.

    Where some columns are ten times larger than others, which would then be all that is seen, colours are standard
    deviations of each column from its mean.
    """
    if ax is not None:
        raise ValueError("got ax= for vectors, wanted images: heat maps have several axes. Leave ax out.")
    arrays = {name: x.detach().float().cpu().numpy() for name, x in panels.items()}
    every = np.concatenate(list(arrays.values()))
    sizes, spread = np.abs(every).max(0), every.std(0)
    by_column = len(every) > 1 and sizes.max() > 10 * sizes.min()
    if by_column:
        arrays = {name: (a - every.mean(0)) / np.where(spread > 0, spread, 1) for name, a in arrays.items()}
    if difference:
        first, second = list(arrays.values())[:2]
        arrays[difference] = first - second
    limit = max(float(np.abs(a).max()) for a in arrays.values()) or 1.0
    figure = canvas(INCHES if len(arrays) > 1 else 5.0, 4.2)
    grid = figure.subplots(1, len(arrays), squeeze=False, sharey=True)[0]
    for axes, (name, a) in zip(grid, arrays.items(), strict=True):
        shown = axes.imshow(a, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("dimension")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    grid[0].set_ylabel("row")
    if captions:
        grid[0].set_yticks(range(len(captions)), captions, fontsize=7)
    label = "standard deviations of a column from its mean" if by_column else ""
    figure.colorbar(shown, ax=list(grid), shrink=0.8, label=label)
    figure.suptitle(title, x=0.02, ha="left", fontsize=11)
    return figure
