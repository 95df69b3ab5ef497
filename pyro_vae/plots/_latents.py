"""Figures of q(z | x): where its draws lie, whether its uncertainty is calibrated, how much each latent carries, and
what log p(x) and the ELBO are sums of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import binom
from torch import Tensor

from pyro_vae.plots._canvas import (
    DARK,
    GREY,
    LIGHT,
    ORANGE,
    Numbers,
    array,
    axes_of,
    label_axes,
    latent_name,
    number,
    pair_of,
    panels_of,
    plane_check,
    show_legend,
    styles,
    titled_axes,
)  # fmt: skip
from pyro_vae.randomness import forked


def rank_histogram(
    ranks: Numbers, num_draws: int, num_bins: int = 20, names: Sequence[str] = (), ax: Axes | None = None
) -> Figure:
    """Simulation-based calibration: ranks of the true latents among draws of the guide.

    The band holds 95 % of each bar's counts if ranks are uniform. A hump is a guide too wide, a valley too narrow.

    Args:
        ranks: Ranks from 0 to L, (N,) or (N, D).
        num_draws: L, draws of the guide that each was ranked among.
        num_bins: Bars; the nearest number that divides L + 1 is taken.
        names: Of the latents, of which the first eight are shown.
        ax: Axes to draw the first one into; a figure of its own with all if omitted.
    """
    values = array(ranks).reshape(len(array(ranks)), -1)
    places = num_draws + 1
    # Bars that hold unequal numbers of ranks would look like a fault of the guide.
    bins = min((b for b in range(1, places + 1) if places % b == 0), key=lambda b: abs(b - num_bins))
    counts = [np.histogram(v, bins, (-0.5, num_draws + 0.5))[0] for v in values.T]
    low, high = binom.ppf([0.025, 0.975], len(values), 1 / bins)
    figure, panels = panels_of(len(counts), "Calibration: ranks, 95 % band per bar", ax)
    edges = np.linspace(-0.5, num_draws + 0.5, bins + 1)
    for d, (axes, count) in enumerate(zip(panels, counts, strict=False)):
        axes.axhspan(low, high, color=LIGHT, alpha=0.45, lw=0, zorder=0)
        axes.bar(edges[:-1], count, np.diff(edges), align="edge", color="#cbd9ea", edgecolor=DARK, lw=0.6, zorder=1)
        axes.axhline(len(values) / bins, color=ORANGE, lw=1.4)
        for edge in (low, high):
            axes.axhline(edge, color=ORANGE, lw=1, ls="--")
        axes.set_title(latent_name(names, d), fontsize=9)
        axes.set_xlabel("rank")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_ylim(0, max(high, max(c.max() for c in counts)) * 1.08)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("simulations")
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
    """
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
    axes.axhline(threshold, color=ORANGE, lw=1, ls="--")
    if len(values) <= 25:
        axes.set_xticks(place, [latent_name(names, d) for d in order], fontsize=8 if len(values) <= 15 else 6.5)
        axes.set_xlim(-0.6, max(len(values), 5) - 0.4)
    else:
        axes.set_xlabel("latents, by KL")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="x", visible=False)
    show_legend(axes, loc="upper right")
    return figure


def latent_clouds(
    vae: Any, x: Any, data: Any = None, num_samples: int = 300, title: str = "", ax: Axes | None = None
) -> Figure:
    """Draws of q(z | x) for several data, a colour each, over the codes of others in grey.

    A pair whose guide is a point, an autoencoder, has a point for each: all of its draws are one.

    Args:
        vae: The pair, of two latents, or a run.
        x: The data, (B, *x_shape), numbered from 1 beside their clouds.
        data: The others, as for `VAE.encode`; none if omitted.
        num_samples: Draws for each.
    Raises:
        ValueError: Not two latents.
    """
    own = pair_of(vae)
    with torch.no_grad(), forked():
        torch.manual_seed(0)
        posterior = own.posterior(x)
        z: Tensor = posterior.sample((num_samples,)).transpose(0, 1)
        codes = None if data is None else own.encode(data, seed=0)
    plane_check(z.shape[-1])
    figure, axes = axes_of(ax, 5.4, 5.2)
    if codes is not None:
        across, up = array(codes).T
        axes.scatter(across, up, s=6, color=GREY, alpha=0.35, lw=0, label="codes of the others")
    colours = colormaps["tab10"]
    for i, cloud in enumerate(array(z)):
        point = float(cloud.std(0).max()) < 1e-6
        style: dict[str, Any] = {"s": 60, "marker": "X"} if point else {"s": 7, "alpha": 0.5}
        across, up = cloud[: 1 if point else None].T
        axes.scatter(across, up, color=colours(i % 10), lw=0, zorder=3, **style)
        axes.annotate(str(i + 1), cloud.mean(0), xytext=(5, 5), textcoords="offset points", fontsize=10, weight="bold",
                      bbox={"fc": "white", "ec": colours(i % 10), "pad": 1.2}, zorder=4)  # fmt: skip
    label_axes(axes, "z2", title or "q(z | x) of a few data", "z1")
    axes.set_aspect("equal", adjustable="datalim")
    return figure


def aggregated(vae: Any, data: Any, side: int = 80, title: str = "", ax: Axes | None = None) -> Figure:
    """The aggregated posterior over the prior, of two latents: where they differ, rate is lost.

    Dots are draws of q(z) = 1/N sum_n q(z | x_n), one for each datum; shades are the density of p(z).

    Args:
        vae: The pair, of two latents, or a run.
        data: The data, as for `VAE.posterior`.
        side: Grid points a side, of the shades.
    Raises:
        ValueError: Not two latents.
    """
    own = pair_of(vae)
    with torch.no_grad(), forked():
        torch.manual_seed(0)
        z: Tensor = own.posterior(data).sample()
        plane_check(z.shape[-1])
        reach = 1.1 * float(z.abs().max())
        line = torch.linspace(-reach, reach, side)
        grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
        density = own.model.prior().log_prob(grid.reshape(-1, 2)).exp().reshape(side, side)
    figure, axes = axes_of(ax, 5.0, 4.8)
    axes.contourf(array(line), array(line), array(density), levels=12, cmap="Blues")
    across, up = array(z).T
    axes.scatter(across, up, s=3, color=ORANGE, alpha=0.5, lw=0)
    label_axes(axes, "z2", title or "Draws of q(z) over the density of p(z)", "z1")
    axes.set_aspect("equal", adjustable="box")
    axes.grid(visible=False)
    return figure


def identity_bars(elbo: Mapping[str, float], kl: Mapping[str, float], log_p: float, ax: Axes | None = None) -> Figure:
    """For each q the ELBO with the KL stacked on it: two numbers that together end at log p(x), whatever q is.

        log p(x) = ELBO + KL(q(z | x) || p(z | x))

    Args:
        elbo: By name of q, nats.
        kl: KL(q(z | x) || p(z | x)) of the same, nats.
        log_p: log p(x), a dashed line: where a bar does not end on it, one of the three numbers is wrong.
    Raises:
        ValueError: Other names in the one than in the other, or none.
    Example:
        >>> figure = identity_bars({"good": -3.1, "bad": -5.0}, {"good": 0.1, "bad": 2.0}, -3.0)
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['good', 'bad']
    """
    if not elbo or set(elbo) != set(kl):
        raise ValueError(
            f"got an ELBO of {', '.join(elbo) or 'nothing'} and a KL of {', '.join(kl) or 'nothing'}, wanted both of "
            "each q, by the same names."
        )
    names = list(elbo)
    figure, axes = axes_of(ax, max(4.5, min(11.0, 1.6 + 1.25 * len(names))), 4.0)
    low = min(*elbo.values(), log_p)
    floor = low - max(0.35 * (log_p - low), 0.3)  # bars of negative numbers need a ground to stand on
    for at, name in enumerate(names):
        bound, gap = float(elbo[name]), float(kl[name])
        axes.bar(at, bound - floor, 0.66, bottom=floor, color=DARK, edgecolor="black", lw=0.6,
                 label="" if at else "ELBO")  # fmt: skip
        axes.bar(at, gap, 0.66, bottom=bound, color=LIGHT, hatch="///", edgecolor="black", lw=0.6,
                 label="" if at else "KL(q || p(z | x))")  # fmt: skip
        below = floor + 0.02 * (log_p - floor)
        axes.text(at, below, number(bound), color="white", ha="center", va="bottom", fontsize=9)
        axes.text(at, bound + gap, f"KL {number(gap)}", ha="center", va="bottom", fontsize=9)
    axes.axhline(log_p, color="black", lw=1.1, ls=(0, (6, 3)), label=f"log p(x): {number(log_p)}")
    axes.set_xticks(range(len(names)), names)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(floor, log_p + 0.32 * (log_p - floor))
    label_axes(axes, "nats per datum", "log p(x) = ELBO + KL(q || p(z | x))")
    axes.grid(axis="x", visible=False)
    axes.legend(frameon=False, loc="upper right", ncols=3, fontsize=9)
    return figure


def elbo_curves(
    values: Numbers, reconstruction: Numbers, kl: Numbers, xlabel: str = "", log_p: float | None = None,
    ax: Axes | None = None,
) -> Figure:  # fmt: skip
    """The two terms of the ELBO, and the ELBO, while something of q changes.

        ELBO = E_q[log p(x | z)] - KL(q(z | x) || p(z))

    Args:
        values: What changes, (N,), positive and on a logarithmic axis if it spans a factor of ten or more.
        reconstruction: E_q[log p(x | z)], (N,), nats.
        kl: KL(q(z | x) || p(z)), (N,), nats; its negative is drawn, which the ELBO is a sum of.
        xlabel: What it is called.
        log_p: log p(x), which no ELBO exceeds.
    Raises:
        ValueError: Sets of unequal length.
    Example:
        >>> figure = elbo_curves([0.5, 1.0], [-2.0, -3.0], [1.0, 0.0])
        >>> figure.axes[0].lines[-1].get_ydata().tolist()
        [-3.0, -3.0]
    """
    at, gained, paid = array(values), array(reconstruction), array(kl)
    if not at.shape == gained.shape == paid.shape:
        raise ValueError(
            f"got {len(at)} values, {len(gained)} reconstructions and {len(paid)} divergences, wanted as many of each."
        )
    figure, axes = axes_of(ax, 6.0, 4.0)
    axes.plot(at, gained, color=DARK, ls="--", lw=1.4, label="reconstruction")
    axes.plot(at, -paid, color=ORANGE, ls="-.", lw=1.4, label="−KL(q || p(z))")
    if log_p is not None:
        axes.axhline(log_p, color=GREY, lw=1.1, ls=(0, (6, 3)), label=f"log p(x): {number(log_p)}")
    axes.plot(at, gained - paid, color="black", lw=2.0, label="their sum, the ELBO")
    best = int((gained - paid).argmax())
    axes.scatter(at[best], (gained - paid)[best], s=45, color="black", zorder=4)
    if at.min() > 0 and at.max() >= 10 * at.min():
        axes.set_xscale("log")
    label_axes(axes, "nats", "What q gains by reconstruction, and what it pays", xlabel)
    show_legend(axes, loc="best")
    return figure
