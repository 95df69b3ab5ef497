"""Figures of what log p(x) is the sum of: the ELBO and the divergence of q, reconstruction and KL."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyro_vae.plots._canvas import DARK, GREY, LIGHT, MIDDLE, Numbers, array, axes_of, label_axes, number, show_legend


def identity_bars(elbo: Mapping[str, float], kl: Mapping[str, float], log_p: float, ax: Axes | None = None) -> Figure:
    """For each q the ELBO with the KL stacked on it: two numbers that together end at log p(x), whatever q is.

        log p(x) = ELBO + KL(q(z | x) || p(z | x))

    Args:
        elbo: By name of q, nats.
        kl: KL(q(z | x) || p(z | x)) of the same, nats.
        log_p: log p(x), a dashed line: where a bar does not end on it, one of the three numbers is wrong.
        ax: Axes to draw into; a figure of its own if omitted.
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
        ax: Axes to draw into; a figure of its own if omitted.
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
    axes.plot(at, -paid, color=MIDDLE, ls="-.", lw=1.4, label="−KL(q || p(z))")
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
