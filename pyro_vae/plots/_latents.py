"""Figures of latents, one by one: whether the guide's uncertainty is calibrated, and how much each carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pyro_vae.plots._canvas import (
    DARK,
    GREY,
    LIGHT,
    MIDDLE,
    Numbers,
    array,
    axes_of,
    label_axes,
    latent_name,
    panels_of,
    show_legend,
    styles,
    titled_axes,
)  # fmt: skip


def rank_histogram(
    ranks: Numbers, num_draws: int, num_bins: int = 20, names: Sequence[str] = (), ax: Axes | None = None
) -> Figure:
    """Simulation-based calibration: ranks of the true latents among draws of the guide.

    The band holds 95 % of each bar's counts if ranks are uniform. A hump means a guide that is too
    wide, a valley too narrow, a slope biased.

    Args:
        ranks: Ranks from 0 to L, (N,) or (N, D).
        num_draws: L, draws of the guide that each was ranked among.
        num_bins: Bars; the nearest number that divides L + 1 is taken.
        names: Of the latents, of which the first eight are shown.
        ax: Axes to draw the first one into; a figure of its own with all if omitted.
    """
    from scipy.stats import binom

    values = array(ranks).reshape(len(array(ranks)), -1)
    places = num_draws + 1
    # Bars that hold unequal numbers of ranks would look like a fault of the guide.
    bins = min((b for b in range(1, places + 1) if places % b == 0), key=lambda b: abs(b - num_bins))
    counts = [np.histogram(v, bins, (-0.5, num_draws + 0.5))[0] for v in values.T]
    low, high = binom.ppf([0.025, 0.975], len(values), 1 / bins)
    figure, panels = panels_of(len(counts)) if ax is None else (axes_of(ax, 4.2, 3.4)[0], [ax])
    edges = np.linspace(-0.5, num_draws + 0.5, bins + 1)
    for d, (axes, count) in enumerate(zip(panels, counts, strict=False)):
        axes.axhspan(low, high, color=LIGHT, alpha=0.45, lw=0, zorder=0)
        axes.bar(edges[:-1], count, np.diff(edges), align="edge", color="#cbd9ea", edgecolor=DARK, lw=0.6, zorder=1)
        axes.axhline(len(values) / bins, color=MIDDLE, lw=1.4)
        for edge in (low, high):
            axes.axhline(edge, color=MIDDLE, lw=1, ls="--")
        axes.set_title(latent_name(names, d), fontsize=9)
        axes.set_xlabel("rank")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_ylim(0, max(high, max(c.max() for c in counts)) * 1.08)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("simulations")
    some = f"; {len(panels)} of {len(counts)} latents" if len(panels) < len(counts) else ""
    if ax is None:
        figure.suptitle(f"Calibration: ranks, 95 % band per bar{some}", x=0.02, ha="left", fontsize=11)
    return figure


def coverage_curve(
    levels: Numbers, coverage: Mapping[str, Numbers], num_data: int, lower: Numbers | None = None,
    upper: Numbers | None = None, level: float = 0.95, ax: Axes | None = None,
) -> Figure:  # fmt: skip
    """How often an interval of each level holds the truth: on the diagonal if calibrated.

    Below the diagonal a guide is too narrow. The band holds 95 % of each point's values if it is right;
    that of `Calibration.coverage`, given as lower and upper, all curves everywhere at once.

    Args:
        levels: Nominal levels in (0, 1), (L,).
        coverage: For each name the share of intervals that hold the truth, (L,).
        num_data: How many independent intervals each share was taken over.
        lower: Lower edge of a simultaneous band, (L,).
        upper: Its upper edge, (L,).
        level: Its probability.
        ax: Axes to draw into; a figure of its own if omitted.
    """
    from scipy.stats import binom

    figure, axes = axes_of(ax, 4.6, 4.6)
    x = array(levels)
    fine = np.linspace(0, 1, 201)
    low, high = (binom.ppf(q, num_data, fine) / num_data for q in (0.025, 0.975))
    low[[0, -1]], high[[0, -1]] = (0, 1), (0, 1)
    name = "95 % band, each point"
    if lower is not None and upper is not None:
        fine, low, high, name = x, array(lower), array(upper), f"{100 * level:.0f} % band, all points"
    axes.fill_between(fine, low, high, color=GREY, alpha=0.25, lw=0, label=name)
    axes.plot([0, 1], [0, 1], color=GREY, lw=1)
    dense = len(x) > 20
    for (marker, dash, colour), (name, values) in zip(styles(coverage), coverage.items(), strict=True):
        axes.plot(x, array(values), marker="" if dense else marker, ls=dash, color=colour, ms=4, lw=1.4, label=name)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    label_axes(axes, "share that holds the truth", "Coverage of central intervals", "nominal level")
    show_legend(axes, loc="upper left")
    return figure


def kl_by_dimension(
    kl: Numbers, stderr: Numbers | None = None, threshold: float = 0.01, names: Sequence[str] = (),
    ax: Axes | None = None,
) -> Figure:  # fmt: skip
    """KL(q(z_d | x) || p(z_d)) of each latent, averaged over data, in falling order.

    Args:
        kl: One per latent, (D,), nats.
        stderr: Standard errors, (D,).
        threshold: Below it a latent carries next to nothing.
        names: Of the latents.
        ax: Axes to draw into; a figure of its own if omitted.
    """
    values = array(kl)
    order = np.argsort(-values, kind="stable")
    used = values[order] >= threshold
    title = f"KL by latent: {used.sum()} of {len(used)} carry {threshold:g} nats or more"
    figure, axes = titled_axes("KL (nats per datum)", title, "latent, by KL", ax)
    place = np.arange(len(values))
    bars: tuple[tuple[np.ndarray, str, dict[str, Any]], ...] = (
        (used, f"at least {threshold:g}", {"color": DARK}),
        (~used, f"below {threshold:g}", {"color": LIGHT, "hatch": "///"}),
    )
    for chosen, name, style in bars:
        if chosen.any():
            axes.bar(place[chosen], values[order][chosen], 0.8, label=name, edgecolor="black", lw=0.5, **style)
    if stderr is not None:
        error = 2 * array(stderr)[order]
        axes.errorbar(place, values[order], error, fmt="none", ecolor="black", lw=0.9, capsize=2)
    axes.axhline(threshold, color=MIDDLE, lw=1, ls="--")
    if len(values) <= 25:
        axes.set_xticks(place, [latent_name(names, d) for d in order], fontsize=8 if len(values) <= 15 else 6.5)
        axes.set_xlim(-0.6, max(len(values), 5) - 0.4)
    else:
        axes.set_xlabel("latents, by KL")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="x", visible=False)
    show_legend(axes, loc="upper right")
    return figure
