"""Figures of how good an approximation is: plain numbers in, matplotlib figures out.

Missing numbers (None or nan) are left out. Bands and error bars are two standard errors unless a docstring says
otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from torch import Tensor

from pyro_vae.plots._canvas import (
    DARK,
    GREY,
    INCHES,
    LIGHT,
    ORANGE,
    Numbers,
    array,
    axes_of,
    canvas,
    label_axes,
    number,
    show_image,
    show_legend,
    styles,
    titled_axes,
    wrapped,
)  # fmt: skip

_SLANTED: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}


def bounds_by_samples(
    num_samples: Sequence[int],
    bounds: Mapping[str, Numbers],
    stderr: Mapping[str, Numbers] | None = None,
    log_p: float | None = None,
    log_p_stderr: float = 0.0,
    ax: Axes | None = None,
) -> Figure:
    """Bounds on log p(x) against K.

    Args:
        num_samples: The values of K.
        bounds: For each name one value per K, nats per datum.
        stderr: Their standard errors, by the same names.
        log_p: The best estimate of log p(x), as a line.
        log_p_stderr: Its standard error.
    """
    figure, axes = titled_axes("nats per datum", "Bounds on log p(x) by number of samples", "samples K", ax)
    if log_p is not None:
        axes.axhline(log_p, color="black", lw=1.1, ls=(0, (6, 3)), label=f"log p(x): {number(log_p)}")
        if log_p_stderr:
            axes.axhspan(log_p - 2 * log_p_stderr, log_p + 2 * log_p_stderr, color=GREY, alpha=0.25, lw=0)
    for (marker, dash, colour), (name, values) in zip(styles(bounds), bounds.items(), strict=True):
        x, y, error = array(num_samples), array(values), (stderr or {}).get(name)
        axes.plot(x, y, color=colour, marker=marker, ls=dash, ms=4.5, lw=1.5, label=name)
        if error is not None:
            axes.fill_between(x, y - 2 * array(error), y + 2 * array(error), color=colour, alpha=0.22, lw=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([float(k) for k in num_samples]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{int(k):,}" for k in num_samples], fontsize=9 if len(num_samples) <= 10 else 7)
    show_legend(axes, loc="lower right")
    return figure


def bracket(
    lower: Numbers,
    upper: Numbers,
    log_p: Numbers | None = None,
    lower_stderr: Numbers | None = None,
    upper_stderr: Numbers | None = None,
    ax: Axes | None = None,
) -> Figure:
    """The interval that holds log p(x) of each simulated datum, and its width.

    Above, data are ordered by their lower bound; below stands the width on a scale of its own. Errors stand at the
    bounds alone, which share their forward chains; the mean width is given with one standard error over the data.

    Args:
        lower: Lower bound per datum, (N,), nats.
        upper: Upper bound per datum, (N,).
        log_p: The exact value or another estimate per datum, (N,).
        lower_stderr: Standard error per datum, (N,).
        upper_stderr: Standard error per datum, (N,).
        ax: Axes to draw the upper part into; a figure of its own with both if omitted.
    """
    low, high = array(lower), array(upper)
    order, place = np.argsort(low), np.arange(len(low))
    if ax is None:
        figure = canvas(INCHES, 4.8)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    else:
        (figure, above), below = axes_of(ax, INCHES, 3.2), None
    above.vlines(place, low[order], high[order], color=DARK, lw=2.2, label="bracket")
    bounds = ((low, lower_stderr, "^", DARK, "lower bound"), (high, upper_stderr, "v", ORANGE, "upper bound"))
    for values, error, marker, colour, name in bounds:
        above.plot(place, values[order], marker, color=colour, ms=4, alpha=0.8, label=name)
        if error is not None:
            above.errorbar(place, values[order], 2 * array(error)[order], fmt="none", ecolor=colour, lw=0.8)
    if log_p is not None:
        above.plot(place, array(log_p)[order], "x", color="black", ms=4, mew=0.9, label="log p(x)")
    label_axes(above, "nats", "Bracket of log p(x), simulated data", "" if ax is None else "datum, by lower bound")
    above.xaxis.set_major_locator(MaxNLocator(integer=True))
    show_legend(above, loc="upper left")
    if below is None:
        return figure
    width = high - low
    below.vlines(place, 0, width[order], color=GREY, lw=0.8)
    below.plot(place, width[order], "o", color=DARK, ms=3)
    if log_p is not None:
        below.plot(place, (array(log_p) - low)[order], "x", color="black", ms=4, mew=0.9, label="log p(x)")
    mean = float(np.nanmean(width))
    spread = float(np.nanstd(width, ddof=1) / len(width) ** 0.5) if len(width) > 1 else np.nan
    below.axhline(0, color=GREY, lw=0.8)
    below.axhline(mean, color=ORANGE, lw=1.2, ls="--")
    label_axes(below, "above lower (nats)", "Width of the bracket", "datum, by lower bound")
    below.set_title(f"mean {number(mean, 3)} ± {spread:.3f} nats", loc="right", fontsize=9)
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def gap_bars(rows: Sequence[Mapping[str, Any]], ax: Axes | None = None) -> Figure:
    """What each guide loses, approximation and amortization gap stacked, train beside test.

        log p(x) - ELBO = (log p(x) - ELBO of the best q for x) + (that - ELBO)

    Args:
        rows: One per guide and split: {"guide", "split", "approximation", "approximation_stderr", "amortization",
            "amortization_stderr"}, nats per datum, or {"guide", "split", "total", "total_stderr"} where the total alone
            is known. Errors may be missing.
    """
    guides = list(dict.fromkeys(str(row["guide"]) for row in rows))
    splits = list(dict.fromkeys(str(row.get("split", "")) for row in rows))
    figure, axes = axes_of(ax, max(4.5, min(12.0, 1.4 + 1.3 * len(guides) * max(len(splits), 1) / 1.5)), 4.0)
    width = 0.8 / len(splits)
    ticks, labels, named = [], [], set()

    def bar(at: float, value: float, base: float, error: Any, name: str, **style: Any) -> None:
        label = "" if name in named else name
        named.add(name)
        axes.bar(at, value, 0.88 * width, bottom=base, edgecolor="black", lw=0.7, label=label, **style)
        # The two stacked bars' errors stand side by side, or they would cover each other.
        shift = {"approximation": -0.15, "amortization": 0.15}.get(name, 0.0) * width
        if error is not None and np.isfinite(error):
            axes.errorbar(at + shift, base + value, 2 * error, color="black", lw=1.1, capsize=3)

    for row in rows:
        g, s = guides.index(str(row["guide"])), splits.index(str(row.get("split", "")))
        at = g + (s - (len(splits) - 1) / 2) * width
        if row.get("approximation") is not None:
            first = float(row["approximation"])
            bar(at, first, 0.0, row.get("approximation_stderr"), "approximation", color=DARK)
            bar(at, float(row["amortization"]), first, row.get("amortization_stderr"), "amortization",
                color=LIGHT, hatch="///")  # fmt: skip
        else:
            bar(at, float(row["total"]), 0.0, row.get("total_stderr"), "total only", color="#cbd5e0", hatch="...")
        ticks.append(at)
        labels.append(str(row.get("split", "")))
    if splits != [""]:
        axes.set_xticks(ticks, labels, fontsize=8)
        second = axes.secondary_xaxis(-0.075)
        second.set_xticks(range(len(guides)), guides)
        second.tick_params(length=0)
        second.spines[:].set_visible(False)
    else:
        room = max(10, int(10 * figure.get_figwidth() / len(guides)))  # characters of a name under its bar, about
        slanted = any(len(word) > room for guide in guides for word in guide.split())
        names = [wrapped(guide) if slanted else wrapped(guide, room) for guide in guides]
        axes.set_xticks(range(len(guides)), names, **_SLANTED if slanted else {})
    axes.tick_params(axis="x", length=0)
    axes.axhline(0, color="black", lw=0.8)
    axes.set_xlim(-0.6, len(guides) - 0.4)
    label_axes(axes, "gap (nats per datum)", "Inference gap by guide")
    axes.grid(axis="x", visible=False)
    axes.set_ylim(top=axes.get_ylim()[1] * 1.18)
    if named != {"total only"}:  # one kind of bars needs no key
        axes.legend(frameon=False, loc="upper right", ncols=3, fontsize=9)
    return figure


def khat_against_log_p(
    pareto_k: Numbers, log_p: Numbers, limit: float = 0.7, images: Tensor | None = None, worst: int = 8,
    ax: Axes | None = None,
) -> Figure:  # fmt: skip
    """k-hat of each datum against its log p(x), and the data where it is worst.

    Args:
        pareto_k: k-hat per datum, (N,); -inf (constant weights) stands at the lower edge.
        log_p: Estimated log p(x) per datum, (N,), nats.
        limit: Above it weights are unreliable, `khat_limit(K)`.
        images: The data, (N, C, H, W) in [0, 1]; those of largest k-hat are shown.
        worst: How many of them.
        ax: Axes to draw into, without images; a figure of its own if omitted.
    """
    if ax is not None and images is not None:
        raise ValueError("got ax= and images, wanted one of the two: the images have axes of their own.")
    k, x = array(pareto_k), array(log_p)
    shown = min(worst, len(k)) if images is not None else 0
    finite = k[np.isfinite(k)]
    low, high = (min(finite.min(), limit), max(finite.max(), limit)) if len(finite) else (limit - 1, limit)
    pad = 0.08 * max(high - low, 0.5)
    floor = low - 2 * pad
    order = np.argsort(-np.nan_to_num(k, nan=-np.inf, neginf=-np.inf), kind="stable")[:shown]
    if shown:
        figure = canvas(INCHES, 5.3)
        grid = figure.add_gridspec(2, shown, height_ratios=(3.6, 1))
        axes = figure.add_subplot(grid[0, :])
    else:
        figure, axes = axes_of(ax, INCHES, 4.0)
    height = np.where(np.isfinite(k), k, floor + pad / 2)
    poor: dict[str, Any] = {"s": 26, "marker": "^", "color": ORANGE, "edgecolors": "black", "lw": 0.4}
    marks: tuple[tuple[np.ndarray, str, dict[str, Any]], ...] = (
        (np.isfinite(k) & (k <= limit), "reliable", {"s": 16, "color": DARK, "alpha": 0.7, "lw": 0}),
        (np.isfinite(k) & (k > limit), "unreliable", poor),
        (np.isneginf(k), "constant weights, k̂ = −∞", {"s": 26, "marker": "v", "color": GREY}),
    )
    for chosen, name, look in marks:
        if chosen.any() or name == "reliable":
            axes.scatter(x[chosen], height[chosen], label=f"{name} ({chosen.sum()})", **look)
    axes.axhline(limit, color="black", lw=1, ls="--", label=f"limit {limit:.2f}")
    axes.set_ylim(floor, high + 1.5 * pad)
    label_axes(axes, "k̂", "Reliability of importance weights", "log p(x) (nats)")
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, -0.33 if shown else -0.3))
    halo = [withStroke(linewidth=2, foreground="white")]
    for i, datum in enumerate(order):
        axes.annotate(
            str(i + 1), (x[datum], min(height[datum], high)),
            textcoords="offset points", xytext=(4, 1) if i % 2 else (-4, 1), ha="left" if i % 2 else "right",
            fontsize=7, path_effects=halo,
        )  # fmt: skip
        panel = figure.add_subplot(grid[1, i])
        assert images is not None
        show_image(panel, torch.as_tensor(images[datum]))
        panel.set_title(f"{i + 1}", fontsize=8, pad=2)
        panel.set_xlabel(f"k̂ {number(k[datum], 2)}", fontsize=7)
    return figure


def number_bars(rows: Sequence[Mapping[str, Any]], ax: Axes | None = None) -> Figure:
    """The numbers of a table, one group of points for each column, with two standard errors where it has them.

    Args:
        rows: Numbers and words by name; of a number "elbo" the error is "elbo_mc_stderr", or "mc_stderr" of "value".
    Raises:
        ValueError: There is no number to draw.
    """
    heads = list(dict.fromkeys(name for row in rows for name in row))
    numbers = [n for n in heads if all(type(row.get(n)) in (int, float) for row in rows)]
    shown = [n for n in numbers if "stderr" not in n and not n.startswith("num_")]
    if not rows or not shown:
        raise ValueError(f"got a table of {', '.join(heads) or 'nothing'}, wanted one with numbers in it.")
    words = [" ".join(row[n] for n in heads if isinstance(row.get(n), str)) for row in rows]
    names = [word or str(i + 1) for i, word in enumerate(words)]
    figure, axes = axes_of(ax, INCHES, 1.2 + 0.32 * len(rows) * len(shown))
    place, ticks, labels = 0.0, [], []
    for index, column in enumerate(shown):
        for row, name in zip(rows, names, strict=True):
            error = row.get("mc_stderr" if column == "value" else f"{column}_mc_stderr")
            marker, _, colour = styles(dict.fromkeys(shown))[index]
            bar = 2 * error if isinstance(error, float) and np.isfinite(error) else None
            axes.errorbar(row[column], place, xerr=bar, fmt=marker, color=colour, ms=5, capsize=3)
            ticks.append(place)
            labels.append(column if len(rows) == 1 else f"{column}, {name}" if len(shown) > 1 else name)
            place += 1
        place += 0.5
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.invert_yaxis()
    label_axes(axes, "", "Values, with two standard errors", shown[0] if len(shown) == 1 else "value")
    return figure
