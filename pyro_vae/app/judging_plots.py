"""Pictures of how good an approximation is: plain numbers in, matplotlib figures out.

Every function takes lists, arrays or tensors, so that what a report keeps as JSON can be
drawn again; missing numbers (None or nan) are left out. Bands and error bars are two
standard errors unless a docstring says otherwise. Colours differ in lightness, and lines also in
dash and marker, so that a grey print can be read.
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

from pyro_vae.app.plots import GREY, canvas, pixels

DARK, MIDDLE, LIGHT = "#1a4480", "#dd6b20", "#f6b26b"
_STYLES = (("o", "-", DARK), ("s", "--", MIDDLE), ("^", "-.", "#4a5568"), ("D", ":", "#2f855a"), ("v", "--", "#97266d"))
_INCHES = 7.0
Numbers = Any  # a list of numbers, an array or a tensor


def bounds_by_samples(
    num_samples: Sequence[int],
    bounds: Mapping[str, Numbers],
    stderr: Mapping[str, Numbers] | None = None,
    log_p: float | None = None,
    log_p_stderr: float = 0.0,
) -> Figure:
    """Bounds on log p(x) against K.

    Args:
        num_samples: The values of K.
        bounds: For each name one value per K, nats per datum.
        stderr: Their standard errors, by the same names.
        log_p: The best estimate of log p(x), as a line.
        log_p_stderr: Its standard error.
    """
    figure, axes = _axes("nats per datum", "Bounds on log p(x) by number of samples", "samples K")
    _level(axes, log_p, log_p_stderr)
    for (marker, dash, colour), (name, values) in zip(_cycle(bounds), bounds.items(), strict=True):
        _curve(axes, _array(num_samples), values, (stderr or {}).get(name), name, marker, dash, colour)
    _log_ticks(axes, num_samples)
    _legend(axes, loc="lower right")
    return figure


def bounds_by_steps(
    num_steps: Sequence[int],
    lower: Numbers,
    upper: Numbers | None = None,
    lower_stderr: Numbers | None = None,
    upper_stderr: Numbers | None = None,
    log_p: float | None = None,
    log_p_stderr: float = 0.0,
) -> Figure:
    """The bracket of log p(x) against the length of annealing.

    Args:
        num_steps: The values of T.
        lower: Lower bound per T, nats per datum.
        upper: Upper bound per T; None for real data, which have none.
        lower_stderr: Standard errors.
        upper_stderr: Standard errors.
        log_p: Another estimate of log p(x), as a line.
        log_p_stderr: Its standard error.
    """
    figure, axes = _axes("nats per datum", "Bounds on log p(x) by length of annealing", "annealing steps T")
    _level(axes, log_p, log_p_stderr)
    steps = _array(num_steps)
    if upper is not None:
        axes.fill_between(steps, _array(lower), _array(upper), color=GREY, alpha=0.15, lw=0)
        _curve(axes, steps, upper, upper_stderr, "upper bound", "v", "--", MIDDLE)
    _curve(axes, steps, lower, lower_stderr, "lower bound", "^", "-", DARK)
    _log_ticks(axes, num_steps)
    _legend(axes, loc="best")
    return figure


def bracket(
    lower: Numbers,
    upper: Numbers,
    log_p: Numbers | None = None,
    lower_stderr: Numbers | None = None,
    upper_stderr: Numbers | None = None,
) -> Figure:
    """The interval that holds log p(x) of each simulated datum, and its width.

    Above, data are ordered by their lower bound; below stands the width on a scale of its own,
    since brackets are narrow beside what data differ by. A width may be negative by noise.
    Errors stand at the bounds and not at the width, since both bounds share their forward chains;
    the mean width is given with one standard error over the data.

    Args:
        lower: Lower bound per datum, (N,), nats.
        upper: Upper bound per datum, (N,).
        log_p: The exact value or another estimate per datum, (N,).
        lower_stderr: Standard error per datum, (N,).
        upper_stderr: Standard error per datum, (N,).
    """
    low, high = _array(lower), _array(upper)
    order, place = np.argsort(low), np.arange(len(low))
    figure = canvas(_INCHES, 4.8)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    above.vlines(place, low[order], high[order], color=DARK, lw=2.2, label="bracket")
    bounds = ((low, lower_stderr, "^", DARK, "lower bound"), (high, upper_stderr, "v", MIDDLE, "upper bound"))
    for values, error, marker, colour, name in bounds:
        above.plot(place, values[order], marker, color=colour, ms=4, alpha=0.8, label=name)
        if error is not None:
            above.errorbar(place, values[order], 2 * _array(error)[order], fmt="none", ecolor=colour, lw=0.8)
    width = high - low
    below.vlines(place, 0, width[order], color=GREY, lw=0.8)
    below.plot(place, width[order], "o", color=DARK, ms=3)
    if log_p is not None:
        for axes, base in ((above, 0), (below, low[order])):
            axes.plot(place, _array(log_p)[order] - base, "x", color="black", ms=4, mew=0.9, label="log p(x)")
    mean = float(np.nanmean(width))
    spread = float(np.nanstd(width, ddof=1) / len(width) ** 0.5) if len(width) > 1 else np.nan
    below.axhline(0, color=GREY, lw=0.8)
    below.axhline(mean, color=MIDDLE, lw=1.2, ls="--")
    _plain(above, "nats", "Bracket of log p(x), simulated data")
    _plain(below, "above lower (nats)", "Width of the bracket", "datum, by lower bound")
    below.set_title(f"mean {_number(mean, 3)} ± {spread:.3f} nats", loc="right", fontsize=9)
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(above, loc="upper left")
    return figure


def gap_bars(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """What each guide loses, approximation and amortization gap stacked, train beside test.

        log p(x) - ELBO = (log p(x) - ELBO of the best q for x) + (that - ELBO)

    Args:
        rows: One per guide and split: {"guide", "split", "approximation",
            "approximation_stderr", "amortization", "amortization_stderr"}, nats per datum, or
            {"guide", "split", "total", "total_stderr"} where the total alone is known. Errors
            may be missing.
    """
    guides = list(dict.fromkeys(str(row["guide"]) for row in rows))
    splits = list(dict.fromkeys(str(row.get("split", "")) for row in rows))
    figure = canvas(max(4.5, min(12.0, 1.4 + 1.3 * len(guides) * max(len(splits), 1) / 1.5)), 4.0)
    axes = figure.subplots()
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
        axes.tick_params(axis="x", length=0)
        second = axes.secondary_xaxis(-0.075)
        second.set_xticks(range(len(guides)), guides)
        second.tick_params(length=0)
        second.spines[:].set_visible(False)
    else:
        axes.set_xticks(range(len(guides)), guides)
        axes.tick_params(axis="x", length=0)
    axes.axhline(0, color="black", lw=0.8)
    axes.set_xlim(-0.6, len(guides) - 0.4)
    _plain(axes, "gap (nats per datum)", "Inference gap by guide")
    axes.grid(axis="x", visible=False)
    axes.set_ylim(top=axes.get_ylim()[1] * 1.18)
    axes.legend(frameon=False, loc="upper right", ncols=3, fontsize=9)
    return figure


def khat_against_log_p(
    pareto_k: Numbers, log_p: Numbers, limit: float = 0.7, images: Tensor | None = None, worst: int = 8
) -> Figure:
    """k-hat of each datum against its log p(x), and the data where it is worst.

    Args:
        pareto_k: k-hat per datum, (N,); -inf (constant weights) stands at the lower edge.
        log_p: Estimated log p(x) per datum, (N,), nats.
        limit: Above it weights are unreliable, `khat_limit(K)`.
        images: The data, (N, C, H, W) in [0, 1]; those of largest k-hat are shown.
        worst: How many of them.
    """
    k, x = _array(pareto_k), _array(log_p)
    shown = min(worst, len(k)) if images is not None else 0
    finite = k[np.isfinite(k)]
    low = min(float(finite.min()), limit) if len(finite) else limit - 1
    high = max(float(finite.max()), limit) if len(finite) else limit
    pad = 0.08 * max(high - low, 0.5)
    floor = low - 2 * pad
    order = np.argsort(-np.nan_to_num(k, nan=-np.inf, neginf=-np.inf), kind="stable")[:shown]
    figure = canvas(_INCHES, 4.0 + (1.3 if shown else 0))
    if shown:
        grid = figure.add_gridspec(2, shown, height_ratios=(3.6, 1))
        axes = figure.add_subplot(grid[0, :])
    else:
        axes = figure.subplots()
    good = np.isfinite(k) & (k <= limit)
    bad = np.isfinite(k) & (k > limit)
    exact = np.isneginf(k)
    axes.scatter(x[good], k[good], s=16, color=DARK, alpha=0.7, lw=0, label=f"reliable ({good.sum()})")
    if bad.any():
        axes.scatter(
            x[bad], k[bad], s=26, marker="^", color=MIDDLE, edgecolors="black", lw=0.4,
            label=f"unreliable ({bad.sum()})",
        )  # fmt: skip
    if exact.any():
        axes.scatter(
            x[exact], np.full(exact.sum(), floor + pad / 2), s=26, marker="v", color=GREY,
            label=f"constant weights, k̂ = −∞ ({exact.sum()})",
        )  # fmt: skip
    axes.axhline(limit, color="black", lw=1, ls="--", label=f"limit {limit:.2f}")
    axes.set_ylim(floor, high + 1.5 * pad)
    _plain(axes, "k̂", "Reliability of importance weights", "log p(x) (nats)")
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, -0.33 if shown else -0.3))
    halo = [withStroke(linewidth=2, foreground="white")]
    for i, datum in enumerate(order):
        axes.annotate(
            str(i + 1), (x[datum], min(k[datum], high) if np.isfinite(k[datum]) else floor + pad / 2),
            textcoords="offset points", xytext=(4, 1) if i % 2 else (-4, 1), ha="left" if i % 2 else "right",
            fontsize=7, path_effects=halo,
        )  # fmt: skip
        panel = figure.add_subplot(grid[1, i])
        assert images is not None
        panel.imshow(pixels(torch.as_tensor(images[datum])), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        panel.set_xticks([])
        panel.set_yticks([])
        panel.set_title(f"{i + 1}", fontsize=8, pad=2)
        panel.set_xlabel(f"k̂ {_number(k[datum], 2)}", fontsize=7)
    return figure


def guide_against_reference(
    guide: Numbers, reference: Numbers, dims: tuple[int, int] = (0, 1), names: Sequence[str] = ()
) -> Figure:
    """Draws of guide and reference in two latents, as regions of 50 % and 90 % mass, one panel a datum.

    Regions are of a Gaussian kernel estimate of the density: the reference filled, the guide as lines.

    Args:
        guide: Draws, (S, B, D), of at most 6 data.
        reference: Draws of HMC or another reference, (R, B, D).
        dims: Which two latents.
        names: One for each datum.
    Raises:
        ValueError: More than 6 data, or shapes that do not go together.
    """
    q, p = _array(guide), _array(reference)
    if q.ndim != 3 or p.ndim != 3 or q.shape[1:] != p.shape[1:] or not 1 <= q.shape[1] <= 6:
        raise ValueError(
            f"got draws of shapes {q.shape} and {p.shape}, wanted (S, B, D) and (R, B, D) with B at most 6. "
            "Choose data by draws[:, index]."
        )
    if max(dims) >= q.shape[2]:
        raise ValueError(f"got dims={dims}, wanted two of {q.shape[2]} latents.")
    count = q.shape[1]
    columns = min(count, 3)
    lines = -(-count // columns)
    figure = canvas(3.2 if count == 1 else 2.4 * columns, 0.7 + 2.4 * lines + (0.8 if count == 1 else 0))
    panels = figure.subplots(lines, columns, squeeze=False)
    for b, axes in enumerate(panels.flat):
        if b >= count:
            axes.set_axis_off()
            continue
        both = [draws[:, b, list(dims)] for draws in (q, p)]
        together = np.concatenate(both)
        low, high = np.quantile(together, 0.001, 0), np.quantile(together, 0.999, 0)
        middle, half = (low + high) / 2, 0.62 * max((high - low).max(), 1e-6)
        grids = np.meshgrid(*(np.linspace(m - half, m + half, 80) for m in middle))
        for draws, filled in ((both[1], True), (both[0], False)):
            density, levels = _regions(draws, grids)
            if filled:
                axes.contourf(*grids, density, levels=[*levels, density.max() * 1.01], colors=["#cbd5e0", "#8896a8"])
            else:
                axes.contour(*grids, density, levels=levels, colors=[MIDDLE], linestyles=["--", "-"], linewidths=1.5)
        for draws, marker, colour in ((both[1], "+", "black"), (both[0], "x", MIDDLE)):
            axes.plot(*draws.mean(0), marker, color=colour, ms=7, mew=1.6, ls="none")
        axes.set_aspect("equal")
        axes.set_title(names[b] if b < len(names) else f"datum {b}", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.tick_params(labelsize=7)
        axes.set_xlabel(f"z{dims[0] + 1}", fontsize=8)
        axes.set_ylabel(f"z{dims[1] + 1}", fontsize=8)
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(color="#8896a8", label="reference (50, 90 %)"),
        Line2D([], [], color=MIDDLE, label="guide (50, 90 %)"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2 if count > 1 else 1, frameon=False, fontsize=8)
    figure.suptitle("Guide against reference", x=0.02, ha="left", fontsize=11)
    return figure


def rank_histogram(ranks: Numbers, num_draws: int, num_bins: int = 20, names: Sequence[str] = ()) -> Figure:
    """Simulation-based calibration: ranks of the true latents among draws of the guide.

    The band holds 95 % of each bar's counts if ranks are uniform. A hump means a guide that is too
    wide, a valley too narrow, a slope biased.

    Args:
        ranks: Ranks from 0 to L, (N,) or (N, D).
        num_draws: L, draws of the guide that each was ranked among.
        num_bins: Bars; the nearest number that divides L + 1 is taken.
        names: Of the latents, of which the first eight are shown.
    """
    from scipy.stats import binom

    values = _array(ranks).reshape(len(_array(ranks)), -1)
    places = num_draws + 1
    # Bars that hold unequal numbers of ranks would look like a fault of the guide.
    bins = min((b for b in range(1, places + 1) if places % b == 0), key=lambda b: abs(b - num_bins))
    counts = [np.histogram(v, bins, (-0.5, num_draws + 0.5))[0] for v in values.T]
    low, high = binom.ppf([0.025, 0.975], len(values), 1 / bins)
    figure, panels = _panels(len(counts))
    edges = np.linspace(-0.5, num_draws + 0.5, bins + 1)
    for d, (axes, count) in enumerate(zip(panels, counts, strict=False)):
        axes.axhspan(low, high, color=LIGHT, alpha=0.45, lw=0, zorder=0)
        axes.bar(edges[:-1], count, np.diff(edges), align="edge", color="#cbd9ea", edgecolor=DARK, lw=0.6, zorder=1)
        axes.axhline(len(values) / bins, color=MIDDLE, lw=1.4)
        for edge in (low, high):
            axes.axhline(edge, color=MIDDLE, lw=1, ls="--")
        axes.set_title(_named(names, d), fontsize=9)
        axes.set_xlabel("rank")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_ylim(0, max(high, max(c.max() for c in counts)) * 1.08)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("simulations")
    some = f"; {len(panels)} of {len(counts)} latents" if len(panels) < len(counts) else ""
    figure.suptitle(f"Calibration: ranks, 95 % band per bar{some}", x=0.02, ha="left", fontsize=11)
    return figure


def rank_ecdf(
    ranks: Numbers, num_draws: int, level: float = 0.95, seed: int = 0, names: Sequence[str] = ()
) -> Figure:
    """Distribution function of the ranks less that of the uniform, with a simultaneous band.

    The whole curve of one latent stays in the band with the given probability if its ranks are
    uniform: |F(u) - u| < c sqrt(u (1 - u) / N), c from 1,000 simulated sets of ranks.

    Args:
        ranks: Ranks from 0 to L, (N,) or (N, D).
        num_draws: L.
        level: Probability of the band.
        seed: Of the simulation.
        names: Of the latents.
    """
    values = _array(ranks).reshape(len(_array(ranks)), -1)
    count = len(values)
    grid = np.arange(1, num_draws + 1) / (num_draws + 1)  # u after each rank but the last
    scale = np.sqrt(grid * (1 - grid) / count)
    generator = np.random.default_rng(seed)
    steps = generator.multinomial(count, np.full(num_draws + 1, 1 / (num_draws + 1)), size=1000)
    farthest = (np.abs(steps.cumsum(1)[:, :-1] / count - grid) / scale).max(1)
    band = np.quantile(farthest, level) * scale
    figure, axes = _axes("distribution less uniform", "Calibration: ranks of the true latents", "rank / draws")
    axes.fill_between(grid, -band, band, color=GREY, alpha=0.25, lw=0, label=f"{100 * level:.0f} % band")
    axes.axhline(0, color=GREY, lw=0.8)
    for d, column in enumerate(values.T):
        below = np.bincount(column.astype(int), minlength=num_draws + 1).cumsum()[:-1] / count
        _, dash, colour = _STYLES[d % len(_STYLES)]
        few = values.shape[1] <= len(_STYLES)
        label = _named(names, d) if few else "latents" if not d else None
        axes.plot(
            grid, below - grid, color=colour if few else DARK, ls=dash if few else "-", lw=1.5 if few else 0.8,
            alpha=1 if few else 0.6, label=label,
        )  # fmt: skip
    limit = 1.15 * max(band.max(), max(np.abs(line.get_ydata()).max() for line in axes.lines))
    axes.set_ylim(-limit, limit)
    axes.legend(frameon=False, fontsize=9, ncols=6, loc="lower center", bbox_to_anchor=(0.5, -0.37))
    return figure


def coverage_curve(
    levels: Numbers, coverage: Mapping[str, Numbers], num_data: int, lower: Numbers | None = None,
    upper: Numbers | None = None, level: float = 0.95,
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
    from scipy.stats import binom

    figure = canvas(4.6, 4.6)
    axes = figure.subplots()
    x = _array(levels)
    fine = np.linspace(0, 1, 201)
    low, high = (binom.ppf(q, num_data, fine) / num_data for q in (0.025, 0.975))
    low[[0, -1]], high[[0, -1]] = (0, 1), (0, 1)
    name = "95 % band, each point"
    if lower is not None and upper is not None:
        fine, low, high, name = x, _array(lower), _array(upper), f"{100 * level:.0f} % band, all points"
    axes.fill_between(fine, low, high, color=GREY, alpha=0.25, lw=0, label=name)
    axes.plot([0, 1], [0, 1], color=GREY, lw=1)
    dense = len(x) > 20
    for (marker, dash, colour), (name, values) in zip(_cycle(coverage), coverage.items(), strict=True):
        axes.plot(x, _array(values), marker="" if dense else marker, ls=dash, color=colour, ms=4, lw=1.4, label=name)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    _plain(axes, "share that holds the truth", "Coverage of central intervals", "nominal level")
    _legend(axes, loc="upper left")
    return figure


def rate_distortion(
    rate: Numbers,
    distortion: Numbers,
    names: Sequence[str] = (),
    rate_stderr: Numbers | None = None,
    distortion_stderr: Numbers | None = None,
    log_p: float | None = None,
) -> Figure:
    """Distortion against rate; lines of slope -1 join what has the same ELBO.

        ELBO = - (rate + distortion),  rate = E KL(q(z | x) || p(z)),  distortion = - E log p(x | z)

    Args:
        rate: One per model, nats per datum.
        distortion: One per model, nats per datum.
        names: What stands beside each point.
        rate_stderr: Standard errors.
        distortion_stderr: Standard errors.
        log_p: log p(x) of the data, whose line no point can be below.

    Reference: Alemi et al., Fixing a broken ELBO, 2018. arXiv:1711.00464
    """
    r, d = _array(rate), _array(distortion)
    figure, axes = _axes("distortion (nats per datum)", "Rate and distortion", "rate (nats per datum)")
    order = np.argsort(r)
    axes.plot(r[order], d[order], color=DARK, lw=1, alpha=0.5)
    axes.errorbar(
        r, d, 2 * _filled(distortion_stderr, d), 2 * _filled(rate_stderr, r), fmt="o", color=DARK, ms=5,
        ecolor=GREY, lw=1,
    )  # fmt: skip
    spans = [max(float(np.ptp(v)), 1.0) for v in (r, d)]
    axes.set_xlim(r.min() - 0.12 * spans[0], r.max() + 0.22 * spans[0])
    axes.set_ylim(d.min() - 0.15 * spans[1], d.max() + 0.15 * spans[1])
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    totals = MaxNLocator(6).tick_values(left + bottom, right + top)
    for total in totals:
        if log_p is not None and -total > log_p:
            continue
        axes.plot([left, right], [total - left, total - right], color=GREY, lw=0.7, ls=":", zorder=0)
        # Named where the line leaves the picture, at the right or at the bottom.
        at = min(right, total - bottom)
        inside = left + 0.14 * (right - left) < at and total - at < top - 0.04 * (top - bottom)
        if inside:
            axes.annotate(
                f"ELBO {_number(-total, 0 if abs(totals[1] - totals[0]) >= 1 else 1)}", (at, total - at),
                fontsize=7, zorder=0, color="#4a5568", ha="right", va="bottom", textcoords="offset points",
                xytext=(-3, 3), bbox={"color": "white", "pad": 0.4},
            )  # fmt: skip
    if log_p is not None:
        axes.plot([left, right], [-log_p - left, -log_p - right], color=MIDDLE, lw=1.4, ls="--",
                  label=f"log p(x) = {_number(log_p)} nats")  # fmt: skip
        _legend(axes, loc="lower left")
    for name, a, b in zip(names, r, d, strict=False):
        axes.annotate(name, (a, b), textcoords="offset points", xytext=(6, 5), fontsize=8)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.grid(visible=False)
    return figure


def kl_by_dimension(
    kl: Numbers, stderr: Numbers | None = None, threshold: float = 0.01, names: Sequence[str] = ()
) -> Figure:
    """KL(q(z_d | x) || p(z_d)) of each latent, averaged over data, in falling order.

    Args:
        kl: One per latent, (D,), nats.
        stderr: Standard errors, (D,).
        threshold: Below it a latent carries next to nothing.
        names: Of the latents.
    """
    values = _array(kl)
    order = np.argsort(-values, kind="stable")
    used = values[order] >= threshold
    title = f"KL by latent: {used.sum()} of {len(used)} carry {threshold:g} nats or more"
    figure, axes = _axes("KL (nats per datum)", title, "latent, by KL")
    place = np.arange(len(values))
    bars: tuple[tuple[np.ndarray, str, dict[str, Any]], ...] = (
        (used, f"at least {threshold:g}", {"color": DARK}),
        (~used, f"below {threshold:g}", {"color": LIGHT, "hatch": "///"}),
    )
    for chosen, name, style in bars:
        if chosen.any():
            axes.bar(place[chosen], values[order][chosen], 0.8, label=name, edgecolor="black", lw=0.5, **style)
    if stderr is not None:
        error = 2 * _array(stderr)[order]
        axes.errorbar(place, values[order], error, fmt="none", ecolor="black", lw=0.9, capsize=2)
    axes.axhline(threshold, color=MIDDLE, lw=1, ls="--")
    if len(values) <= 25:
        axes.set_xticks(place, [_named(names, d) for d in order], fontsize=8 if len(values) <= 15 else 6.5)
        axes.set_xlim(-0.6, max(len(values), 5) - 0.4)
    else:
        axes.set_xlabel("latents, by KL")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="x", visible=False)
    _legend(axes, loc="upper right")
    return figure


def _regions(draws: np.ndarray, grids: Sequence[np.ndarray]) -> tuple[np.ndarray, list[float]]:
    """A kernel estimate on a grid, and the densities that 90 % and 50 % of the draws exceed."""
    from scipy.stats import gaussian_kde

    kernel = gaussian_kde(draws[np.linspace(0, len(draws) - 1, min(len(draws), 2000)).astype(int)].T)
    density = kernel(np.stack([g.ravel() for g in grids])).reshape(grids[0].shape)
    at = kernel(draws[np.linspace(0, len(draws) - 1, min(len(draws), 1000)).astype(int)].T)
    return density, [float(np.quantile(at, 0.1)), float(np.quantile(at, 0.5))]


def _array(x: Numbers) -> np.ndarray:
    """Numbers as float64, None as nan."""
    return np.asarray(x.detach().cpu().numpy() if isinstance(x, Tensor) else x, dtype=float)


def _filled(error: Numbers | None, like: np.ndarray) -> np.ndarray:
    return np.zeros_like(like) if error is None else np.nan_to_num(_array(error))


def _named(names: Sequence[str], index: int) -> str:
    return names[index] if index < len(names) else f"z{index + 1}"


def _number(value: float, digits: int = 2) -> str:
    if np.isneginf(value):
        return "−∞"
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _cycle(names: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [_STYLES[i % len(_STYLES)] for i in range(len(names))]


def _axes(ylabel: str, title: str, xlabel: str) -> tuple[Figure, Axes]:
    figure = canvas(_INCHES, 3.8)
    axes = figure.subplots()
    _plain(axes, ylabel, title, xlabel)
    return figure, axes


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """At most eight small panels."""
    shown = min(count, 8)
    columns = min(shown, 4)
    lines = -(-shown // columns)
    figure = canvas(4.2 if shown == 1 else 1.9 * columns + 0.4, 0.5 + 1.9 * lines + (1 if shown == 1 else 0))
    grid = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    for axes in grid[shown:]:
        axes.set_axis_off()
    return figure, grid[:shown]


def _plain(axes: Axes, ylabel: str, title: str, xlabel: str = "") -> None:
    axes.set_ylabel(ylabel)
    axes.set_xlabel(xlabel)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(alpha=0.25, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes, **where: Any) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=9, **where)


def _log_ticks(axes: Axes, values: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([float(v) for v in values]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{int(v):,}" for v in values], fontsize=9 if len(values) <= 10 else 7)


def _curve(
    axes: Axes, x: np.ndarray, values: Numbers, stderr: Numbers | None, name: str, marker: str, dash: str, colour: str
) -> None:
    y = _array(values)
    axes.plot(x, y, color=colour, marker=marker, ls=dash, ms=4.5, lw=1.5, label=name)
    if stderr is not None:
        error = 2 * _array(stderr)
        axes.fill_between(x, y - error, y + error, color=colour, alpha=0.22, lw=0)


def _level(axes: Axes, log_p: float | None, stderr: float) -> None:
    if log_p is None:
        return
    axes.axhline(log_p, color="black", lw=1.1, ls=(0, (6, 3)), label=f"log p(x): {_number(log_p)}")
    if stderr:
        axes.axhspan(log_p - 2 * stderr, log_p + 2 * stderr, color=GREY, alpha=0.25, lw=0)
