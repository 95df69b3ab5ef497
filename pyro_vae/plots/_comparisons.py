"""Pictures of what is compared: differences with their intervals, accuracy against cost, curves by time, k-hat maps.

What they take are the rows of a `Ranking`, or plain numbers by the name of an arm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from pyro_vae.plots._canvas import (
    BLUE,
    DARK,
    GREY,
    INCHES,
    ORANGE,
    Numbers,
    array,
    axes_of,
    canvas,
    label_axes,
    show_image,
    show_legend,
    styles,
    titled_axes,
    wrapped,
)


def differences(rows: Sequence[Mapping[str, Any]], title: str = "Behind the best", ax: Axes | None = None) -> Figure:
    """How far each arm is behind the best, with 95 % intervals: filled where the difference holds.

    Args:
        rows: Of a `Ranking`, best first.
    """
    shown = [row for row in rows if row["rank"] is not None]
    names = [wrapped(row["arm"]) for row in shown]
    figure, axes = axes_of(ax, INCHES, 1.2 + len(names) * _height(names))
    label_axes(axes, "", title, "nats per datum: how far below the best arm")
    for place, row in enumerate(shown):
        best = row["p_worse"] is None
        colour, face = (BLUE, BLUE) if best else (DARK, DARK if row["holds"] else "white")
        if not best:
            axes.plot([row["diff_low"], row["diff_high"]], [place, place], color=DARK, lw=1.6)
        axes.plot(row["diff"], place, "D" if best else "o", color=colour, markerfacecolor=face, ms=7, zorder=3)
    axes.axvline(0, color=GREY, lw=1, zorder=0)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.plot([], [], "o", color=DARK, label="holds, after the correction")
    axes.plot([], [], "o", color=DARK, markerfacecolor="white", label="within the noise")
    show_legend(axes, loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=4.5, ncols=2)  # below the label
    return figure


def cost(
    rows: Sequence[Mapping[str, Any]], criterion: str = "log_p", title: str = "Accuracy against time",
    ax: Axes | None = None,
) -> Figure:  # fmt: skip
    """Each arm's number against the seconds its fit took, and the front of those that nobody beats in both.

    Args:
        rows: Of a `Ranking`.
        criterion: The column: "log_p" or "elbo".
    """
    figure, axes = titled_axes(f"{'log p(x)' if criterion == 'log_p' else 'ELBO'}, nats", title, "seconds of a fit", ax)
    shown = [row for row in rows if row["rank"] is not None and math.isfinite(row["seconds"])]
    front, highest = [], -math.inf
    for row in sorted(shown, key=lambda row: (row["seconds"], -row[criterion])):
        if row[criterion] > highest:
            highest = row[criterion]
            front.append(row)
    if len(front) > 1:
        axes.step([r["seconds"] for r in front], [r[criterion] for r in front], where="post", color=ORANGE, lw=1.5,
                  label="nobody is both faster and better", zorder=1)  # fmt: skip
    for row in shown:  # as disks with the rank in them: names at the points would lie over one another
        axes.errorbar(row["seconds"], row[criterion], yerr=None if criterion == "elbo" else 2 * row["mc_stderr"],
                      fmt="o", color=DARK if row in front else GREY, ms=13, label=wrapped(row["arm"]))  # fmt: skip
        axes.annotate(str(row["rank"] + 1), (row["seconds"], row[criterion]), ha="center", va="center", fontsize=8,
                      color="white", zorder=3)  # fmt: skip
    axes.margins(x=0.08, y=0.12)
    handles, names = axes.get_legend_handles_labels()
    ranks = [""] * (len(handles) - len(shown)) + [f"{row['rank'] + 1}: " for row in shown]
    axes.legend(handles, [rank + name for rank, name in zip(ranks, names, strict=True)], frameon=False, fontsize=8,
                loc="upper left", bbox_to_anchor=(1.0, 1.0), markerscale=0.5)  # fmt: skip
    return figure


def curves_by_time(
    records: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], title: str = "Training by time",
    ax: Axes | None = None,
) -> Figure:  # fmt: skip
    """The bound on validation data, or on the training batches where there are none, against seconds.

    Args:
        records: Of each arm, those of each of its fits: the records of `History`.
    """
    validated = all(r.get("validation") is not None for fits in records.values() for each in fits for r in each)
    key = "validation" if validated else "bound"
    figure, axes = titled_axes(f"{key} bound, nats" if validated else "bound, nats", title, "seconds", ax)
    ends: list[float] = []
    for (_, dash, colour), (name, fits) in zip(styles(records), records.items(), strict=True):
        for number, each in enumerate(fits):
            seconds, values = array([r["seconds"] for r in each]), array([r.get(key) for r in each])
            axes.plot(seconds, values, dash, color=colour, lw=1.4, alpha=1 if number == 0 else 0.45,
                      label=wrapped(name) if number == 0 else None)  # fmt: skip
            ends.extend(values[len(values) // 5 :])
    known = array(ends)[np.isfinite(array(ends))]
    if len(known):
        low, high = known.min(), known.max()
        axes.set_ylim(low - 0.1 * (high - low + 1e-6), high + 0.1 * (high - low + 1e-6))
    show_legend(axes, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside them: a slow arm ends where there is room
    return figure


def khat_maps(values: Mapping[str, Numbers], limit: float = 0.7, ax: Axes | None = None) -> Figure:
    """k-hat of each datum and arm: orange to brown where importance weights miss mass.

    Args:
        values: Of each arm one k-hat per datum, (N,), the same data for all.
        limit: Above which k-hat is bad.
    """
    table = np.stack([array(each) for each in values.values()])
    order = np.argsort(np.nan_to_num(table, nan=-1).mean(0))
    names = [wrapped(name) for name in values]
    figure, axes = axes_of(ax, INCHES, 1.4 + len(names) * _height(names))
    # Blue is good and orange bad, the darker the worse, with a step at the limit: a fading colour hides where it is.
    steps = ("#f7fafc", "#dbe6f3", "#a9c1de", "#f6b26b", "#dd6b20", "#7b341e")
    norm = BoundaryNorm((0, limit / 2, limit, max(1.0, 1.4 * limit), max(1.5, 2 * limit)), len(steps), extend="both")
    look: dict[str, Any] = {"aspect": "auto", "cmap": ListedColormap(steps), "interpolation": "nearest"}
    image = axes.imshow(table[:, order], norm=norm, **look)
    axes.set_yticks(range(len(names)), names)
    label_axes(axes, "", rf"$\hat{{k}}$ per datum (above {limit:.2f} is bad)", "data, from easy to hard for all arms")
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label=r"$\hat{k}$", format="%.2g")
    return figure


def side_by_side(
    images: Mapping[str, Tensor], title: str = "", shown: int = 10, first: tuple[str, Tensor] | None = None
) -> Figure:
    """A row of images for each arm.

    Args:
        images: Of each arm, (N, C, H, W).
        shown: How many of each.
        first: A row above the others, such as the originals, with its name.
    """
    rows = ({first[0]: first[1]} if first is not None else {}) | dict(images)
    columns = max(1, min(shown, *(len(each) for each in rows.values())))
    figure = canvas(1.6 + 0.62 * columns, 0.35 + 0.66 * len(rows))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for (name, each), line in zip(rows.items(), grid, strict=True):
        for axes, image in zip(line, each, strict=False):
            show_image(axes, image)
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(wrapped(name, 22), rotation=0, ha="right", va="center", fontsize=8)
    if title:
        figure.suptitle(title, x=0.02, ha="left", fontsize=11)
    return figure


def _height(names: Sequence[str]) -> float:
    """Inches of a row whose name stands at the left, in lines."""
    return max(0.33, 0.1 + 0.17 * max((1 + name.count("\n") for name in names), default=1))


def critical_difference(ranks: Mapping[str, Sequence[float]], title: str = "", ax: Axes | None = None) -> Figure:
    """Mean ranks of methods over datasets, with bars over those that cannot be told apart (Nemenyi, at 5 %).

        CD = q sqrt(m (m + 1) / (6 n)),   m methods, n datasets, q the studentised range / sqrt(2)

    Args:
        ranks: Of each method its rank on each dataset, 1 for the best.
    Raises:
        ValueError: Fewer than five datasets, for which the test says nothing, or fewer than two methods.

    References: Demsar, Statistical Comparisons of Classifiers over Multiple Data Sets, 2006.
    """
    table = np.array([list(each) for each in ranks.values()], dtype=float)
    if table.ndim != 2 or table.shape[0] < 2 or table.shape[1] < 5:
        counts = " x ".join(map(str, table.shape))
        raise ValueError(
            f"got ranks of {counts} (methods x datasets), wanted at least two methods and five datasets: below that a "
            "critical-difference diagram says nothing. Compare within each dataset."
        )
    methods, datasets = table.shape
    distance = nemenyi(methods, datasets)
    mean = table.mean(1)
    order = np.argsort(mean)
    names = [list(ranks)[i] for i in order]
    mean = mean[order]
    groups = [(i, j) for i in range(methods) for j in range(i + 1, methods) if mean[j] - mean[i] < distance]
    groups = [(i, j) for i, j in groups if not any(a <= i and j <= b and (a, b) != (i, j) for a, b in groups)]
    figure, axes = axes_of(ax, INCHES, 1.6 + 0.25 * methods)
    axes.set_xlim(0.7, methods + 0.3)
    half = -(-methods // 2)
    top = 0.25 * (len(groups) + 1)
    axes.set_ylim(-0.5 * half - 0.3, top + 0.9)
    axes.plot([1, methods], [top, top], color="black", lw=1)
    for tick in range(1, methods + 1):
        axes.plot([tick, tick], [top, top + 0.1], color="black", lw=1)
        axes.text(tick, top + 0.15, str(tick), ha="center", va="bottom", fontsize=9)
    for place, (name, value) in enumerate(zip(names, mean, strict=True)):
        left = place < half
        depth = -0.5 * (place if left else methods - 1 - place) - 0.2
        edge = 0.75 if left else methods + 0.25
        axes.plot([value, value, edge], [top, depth, depth], color=GREY, lw=1)
        axes.text(edge, depth + 0.06, f"{name} ({value:.2f})", ha="left" if left else "right", va="bottom", fontsize=9)
    for height, (i, j) in enumerate(groups):
        level = top - 0.25 * (height + 1) + 0.05
        axes.plot([mean[i] - 0.03, mean[j] + 0.03], [level, level], color=DARK, lw=4, solid_capstyle="round")
    axes.plot([1, 1 + distance], [top + 0.6, top + 0.6], color=ORANGE, lw=2)
    axes.text(1 + distance / 2, top + 0.65, f"CD = {distance:.2f}", ha="center", va="bottom", fontsize=9)
    axes.set_axis_off()
    axes.set_title(title or f"Mean rank over {datasets} datasets", loc="left", fontsize=11)
    return figure


def nemenyi(methods: int, datasets: int, level: float = 0.05) -> float:
    """The critical difference of mean ranks.

    Example:
        >>> round(nemenyi(4, 14), 3)   # Demsar: q = 2.569 for four
        1.254
    """
    q = stats.studentized_range.ppf(1 - level, methods, np.inf) / math.sqrt(2)
    return float(q * math.sqrt(methods * (methods + 1) / (6 * datasets)))
