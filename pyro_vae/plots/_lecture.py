"""Figures that ask a pair for what they show: a `VAE`, a run, or what has `encode`, `decode`, `posterior` like it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vae.plots._canvas import (
    DARK,
    GREY,
    ORANGE,
    array,
    axes_of,
    label_axes,
    pair_of,
    panels_of,
    plane_check,
    show_legend,
    styles,
)
from pyro_vae.plots._pictures import latent_space, mosaic
from pyro_vae.randomness import forked


def latent_scatter(
    vae: Any, data: Any, labels: Tensor | None = None, title: str = "", marks: Tensor | None = None,
    ax: Axes | None = None,
) -> Figure:  # fmt: skip
    """Where a pair puts data in its latent space, coloured by label.

    Args:
        vae: The pair, or a run.
        data: As for `VAE.encode`.
        labels: One integer per datum, (N,); those of a `Split` if omitted.
        marks: Other places in the plane of two latents, (M, 2), shown as crosses.
    Raises:
        ValueError: Marks that are no places in the plane.
    """
    labels = getattr(data, "labels", None) if labels is None else labels
    codes = pair_of(vae).encode(data, seed=0)
    if marks is not None and (codes.shape[-1] != 2 or marks.dim() != 2 or marks.shape[-1] != 2):
        raise ValueError(
            f"got marks of shape {tuple(marks.shape)} for a pair of {codes.shape[-1]} latents, wanted (M, 2) and two."
        )
    figure = latent_space(codes, labels, ax=ax)
    axes = figure.axes[0] if ax is None else ax
    if title:
        axes.set_title(title, loc="left", fontsize=11)
    if marks is not None:
        axes.scatter(array(marks[:, 0]), array(marks[:, 1]), s=50, marker="x", color="black", lw=1.4, zorder=3)
    return figure


def latent_grid(vae: Any, side: int = 15, reach: float = 0.98, ax: Axes | None = None) -> Figure:
    """E[x | z] over the plane of two latents, at equal steps in probability under N(0, 1).

    Args:
        vae: The pair, of images and two latents.
        side: Pictures a side.
        reach: Share of the mass of each latent that is shown.
    Raises:
        ValueError: Not two latents.
    """
    if side < 2 or not 0 < reach < 1:
        raise ValueError(f"got side={side} and reach={reach}, wanted at least 2 pictures a side and a share in (0, 1).")
    share = torch.linspace((1 - reach) / 2, (1 + reach) / 2, side)
    line = 2**0.5 * torch.erfinv(2 * share - 1)
    z = torch.stack(torch.meshgrid(line.flip(0), line, indexing="ij")[::-1], -1)  # z1 to the right, z2 upwards
    own = pair_of(vae)
    plane_check(own.model.prior().event_shape[-1])
    with torch.no_grad():
        x = own.decode(z.reshape(-1, 2)).mean
    return mosaic(list(x.reshape(side, side, *x.shape[1:])), "E[x | z]: z1 to the right, z2 upwards", ax=ax)


def attribute(
    vae: Any, x: Any, data: Any, has: Any, strengths: Sequence[float] = (-2, -1, 0, 1, 2), ax: Axes | None = None
) -> Figure:
    """Data with more or less of an attribute: E[x | z + t v], v from the mean of those without to those with it.

    Args:
        vae: The pair, of images.
        x: Data to change, (B, *x_shape).
        data: Data with and without the attribute.
        has: Whether each has it, (N,), such as ``labels == 3``.
        strengths: t.
    Raises:
        ValueError: All have it, or none.
    """
    own, mask = pair_of(vae), torch.as_tensor(has).bool()
    if not mask.any() or mask.all():
        raise ValueError(
            f"got {int(mask.sum())} data of {len(mask)} with the attribute, wanted some with and some without."
        )
    codes = own.encode(data, seed=0)
    direction = codes[mask].mean(0) - codes[~mask].mean(0)
    with torch.no_grad():
        steps = [own.decode(own.encode(x, seed=0) + t * direction).mean for t in strengths]
    title = f"E[x | z + t v], t from {strengths[0]:g} to {strengths[-1]:g}"
    return mosaic(list(torch.stack(steps, 1)), title, ax=ax)


def morph(vae: Any, start: Any, end: Any, steps: int = 11, ax: Axes | None = None) -> Figure:
    """From one datum to another: E[x | z] along the straight line between their codes, a row for each two.

    Args:
        vae: The pair, of images, or a run.
        start: Data, (B, *x_shape).
        end: Data, (B, *x_shape).
        steps: Pictures a row, both ends included.
    Raises:
        ValueError: Fewer than two steps, or not as many ends as starts.
    """
    own = pair_of(vae)
    with torch.no_grad():
        a, b = own.encode(start, seed=0), own.encode(end, seed=0)
        if steps < 2 or a.shape != b.shape:
            raise ValueError(
                f"got {steps} steps between {len(a)} and {len(b)} data, wanted at least 2 steps and as many ends as "
                "starts."
            )
        share = torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device)[:, None]
        x = own.decode(a[:, None] + share * (b - a)[:, None]).mean
    return mosaic(list(x), "E[x | z] on straight lines between two codes", ax=ax)


def traverse(
    vae: Any, x: Any = None, latents: Sequence[int] | None = None, values: Sequence[float] = (-3, -2, -1, 0, 1, 2, 3),
    ax: Axes | None = None,
) -> Figure:  # fmt: skip
    """Latents one by one, a row each: E[x | z] while one coordinate takes the values and the others stay.

    Args:
        vae: The pair, of images, or a run.
        x: One datum, x_shape or (1, *x_shape), at whose code the others stay; z = 0 if omitted.
        latents: Which, from 0; the ten that change E[x | z] most, in this order, if omitted.
        values: Of the coordinate that moves.
    Raises:
        ValueError: A latent that there is not, fewer than two values, more than one datum.
    """
    own = pair_of(vae)
    count = own.model.prior().event_shape[-1]
    wrong = [d for d in latents or () if not 0 <= d < count]
    if wrong or len(values) < 2:
        raise ValueError(
            f"got latents {list(latents or ())} and {len(values)} values, wanted some of 0 to {count - 1} and at least "
            "two values."
        )
    with torch.no_grad():
        still = own.model.prior().sample() * 0 if x is None else _code(own, x)
        moving = torch.as_tensor(values, dtype=still.dtype, device=still.device)
        rows = []
        for d in range(count) if latents is None else latents:
            z = still.repeat(len(values), 1)
            z[:, d] = moving
            rows.append((d, own.decode(z).mean))
    if latents is None:
        rows = sorted(rows, key=lambda row: -float(row[1].var(0, correction=0).sum()))[:10]
    some = "" if len(rows) == count else f"; {len(rows)} of {count} latents"
    title = f"E[x | z], one latent from {values[0]:g} to {values[-1]:g}{some}"
    return mosaic([each for _, each in rows], title, [f"z{d + 1}" for d, _ in rows], ax=ax)


def _code(own: Any, x: Any) -> Tensor:
    """E_q[z | x] of one datum, (D,)."""
    x = _batched(own, x)
    if len(x) != 1:
        raise ValueError(f"got {len(x)} data, wanted one, whose code stays but for one coordinate.")
    return own.encode(x, seed=0)[0]


def _batched(own: Any, x: Any) -> Tensor:
    """One datum, or (1, *x_shape), as a batch."""
    x = torch.as_tensor(x)
    return x if x.dim() > len(own.decode(own.model.prior().sample()).event_shape) else x[None]


def histograms(vae: Any, data: Any, num_samples: int = 1, num_bins: int = 40, ax: Axes | None = None) -> Figure:
    """Each z_d over the data, z ~ q(z | x), against p(z_d): where they differ, samples look unlike the data.

        q(z_d) = 1/N sum_n q(z_d | x_n)

    The latents whose means vary most over the data come first; one that carries nothing lies on the prior.

    Args:
        vae: The pair, or a run.
        data: As for `VAE.encode`.
        num_samples: Draws for each datum.
        num_bins: Bars.
        ax: Axes to draw the first one into; a figure of its own with eight at most if omitted.
    """
    own = pair_of(vae)
    with torch.no_grad(), forked():
        torch.manual_seed(0)
        parts = [data[i : i + 1000] for i in range(0, len(data), 1000)]
        means = torch.cat([own.encode(part, seed=0).flatten(1) for part in parts])
        z = torch.cat([own.posterior(part).sample((num_samples,)).flatten(0, 1).flatten(1) for part in parts])
        prior = own.model.prior()
        drawn = prior.expand([max(10_000, len(z))]).sample().flatten(1)
    order = means.var(0, correction=0).argsort(descending=True).tolist()
    figure, panels = panels_of(len(order), "Each latent over the data (bars) and under the prior (line)", ax)
    for axes, d in zip(panels, order, strict=False):
        both = array(torch.cat([z[:, d], drawn[:, d]]))
        edges = np.linspace(both.min(), both.max(), num_bins + 1)
        look: dict[str, Any] = {"color": "#cbd9ea", "edgecolor": DARK, "lw": 0.4, "label": "q(z), the data"}
        axes.hist(array(z[:, d]), edges.tolist(), density=True, **look)
        across, height = _marginal(prior, drawn[:, d], d, edges)
        axes.plot(across, height, color=ORANGE, lw=1.6, label="p(z), the prior")
        axes.set_title(f"z{d + 1}", fontsize=9)
        axes.set_yticks([])
        axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def _marginal(prior: Any, drawn: Tensor, d: int, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where and how high p(z_d) is: exact for a product of normals, else the histogram of draws."""
    base = getattr(prior, "base_dist", prior)
    if isinstance(base, torch.distributions.Normal):
        across = np.linspace(edges[0], edges[-1], 200)
        loc, scale = (float(value.flatten()[d]) for value in (base.mean, base.stddev))
        return across, np.exp(-0.5 * ((across - loc) / scale) ** 2) / (scale * (2 * np.pi) ** 0.5)
    height, _ = np.histogram(array(drawn), edges, density=True)
    return np.repeat(edges, 2)[1:-1], np.repeat(height, 2)


def rate_distortion(points: Mapping[str, Any], ax: Axes | None = None) -> Figure:
    """Rate against distortion of several fits, with two standard errors over the data; dashed lines are of equal ELBO.

    Args:
        points: By name what `rate_distortion` gives.
    """
    figure, axes = axes_of(ax, 5.6, 4.6)
    for name, (marker, _, colour) in zip(points, styles(points), strict=True):
        rate, distortion = points[name].rate, points[name].distortion
        axes.errorbar(rate.value, distortion.value, 2 * distortion.data_stderr, 2 * rate.data_stderr, fmt=marker,
                      color=colour, ms=6, capsize=2, label=name)  # fmt: skip
    low, high = axes.get_xlim()
    limits = axes.get_ylim()
    for total in np.linspace(low + limits[0], high + limits[1], 9)[1:-1]:
        axes.plot([low, high], [total - low, total - high], color=GREY, lw=0.7, ls="--", zorder=0)
    axes.set_xlim(low, high)
    axes.set_ylim(limits)
    label_axes(axes, "distortion, -E log p(x | z) (nats)", "Rate and distortion", "rate, KL(q || p) (nats)")
    show_legend(axes, loc="upper right")
    return figure


def posterior_contours(
    vaes: Mapping[str, Any] | Any, x: Any, side: int = 121,
    title: str = "Posterior and approximation, 50 and 95 % of the mass", ax: Axes | None = None,
) -> Figure:  # fmt: skip
    """p(z | x) of one datum on a grid, as shades, and contours of one or several q(z | x) over it, of two latents.

    Args:
        vaes: A pair, or several by name, of one model: the first makes p(z | x).
        x: One datum, x_shape or (1, *x_shape).
        side: Grid points a side.
    Raises:
        ValueError: Not two latents, or pairs with different models.
    """
    pairs = {
        name: pair_of(each) for name, each in (vaes.items() if isinstance(vaes, Mapping) else [("q(z | x)", vaes)])
    }
    first = next(iter(pairs.values()))
    other = [name for name, each in pairs.items() if each.model is not first.model]
    if other:
        raise ValueError(
            f"got {other[0]!r} with another model, which has another p(z | x), wanted pairs of one model. "
            "Fit guides under it: pv.fit_guide(model, guide, data)."
        )
    plane_check(first.model.prior().event_shape[-1])
    with torch.no_grad(), forked():
        x = _batched(first, x)
        torch.manual_seed(0)
        drawn = torch.cat([each.posterior(x).sample((500,))[:, 0] for each in pairs.values()])
        # The prior's plane first, as there may be mass where no guide ever draws; then closer, three times.
        every = torch.cat([drawn, first.model.prior().sample((2000,))])
        low, high = every.min(0).values, every.max(0).values
        for _ in range(3):
            z, density = _density(first, x, low, high, side)
            inside = z[density > density.max() * 1e-4]
            pad = 0.15 * (inside.max(0).values - inside.min(0).values) + (high - low) * 0.02
            low = torch.minimum(drawn.min(0).values, inside.min(0).values - pad)
            high = torch.maximum(drawn.max(0).values, inside.max(0).values + pad)
        z, density = _density(first, x, low, high, side)
        own = {name: each.posterior(x).log_prob(z[:, None])[:, 0].exp() for name, each in pairs.items()}
    figure, axes = axes_of(ax, 5.4, 5.0)
    across, up = (array(z[:, d]).reshape(side, side) for d in (0, 1))
    shades = [*_levels(density), float(density.max()) * 1.001]
    axes.contourf(across, up, array(density).reshape(side, side), shades, colors=["#cbd5e0", GREY])
    for name, (_, dash, colour) in zip(own, styles({**own}), strict=True):
        shown = array(own[name]).reshape(side, side)
        axes.contour(across, up, shown, _levels(own[name]), colors=colour, linestyles=dash)
        axes.plot([], [], color=colour, ls=dash, label=name)
    axes.fill_between([], [], color=GREY, label="p(z | x)")
    label_axes(axes, "z2", title, "z1")
    show_legend(axes, loc="best")
    return figure


def _density(pair: Any, x: Tensor, low: Tensor, high: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Points, (side * side, 2), and p(z | x) there, up to a constant."""
    lines = [torch.linspace(float(a), float(b), side, dtype=low.dtype) for a, b in zip(low, high, strict=True)]
    z = torch.stack([axis.flatten() for axis in torch.meshgrid(*lines, indexing="ij")], -1).to(low.device)
    likelihood = torch.cat([pair.decode(part[:, None]).log_prob(x)[:, 0] for part in z.split(2000)])
    log_f = pair.model.prior().log_prob(z) + likelihood
    return z, (log_f - log_f.max()).exp()


def _levels(density: Tensor) -> list[float]:
    """The densities above which 95 and 50 % of the mass lie."""
    ordered = density.flatten().double().sort(descending=True).values
    share = ordered.cumsum(0) / ordered.sum()
    return [float(ordered[int((share < level).sum())]) for level in (0.95, 0.5)]
