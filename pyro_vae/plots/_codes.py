"""Figures of q(z | x) as what it is for each datum: a point, or a small or large cloud, in the plane of the codes."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vae.plots._canvas import GREY, ORANGE, array, axes_of, label_axes


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
        title: Above the picture.
        ax: Axes to draw into; a figure of its own if omitted.
    Raises:
        ValueError: Not two latents.
    """
    own = getattr(vae, "vae", vae)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        posterior = own.posterior(x)
        z: Tensor = posterior.sample((num_samples,)).transpose(0, 1)
        codes = None if data is None else own.encode(data, seed=0)
    _refuse_all_but_two(z)
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
        title: Above the picture.
        ax: Axes to draw into; a figure of its own if omitted.
    Raises:
        ValueError: Not two latents.
    """
    own = getattr(vae, "vae", vae)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        z: Tensor = own.posterior(data).sample()
        _refuse_all_but_two(z)
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


def _refuse_all_but_two(z: Tensor) -> None:
    if z.shape[-1] != 2:
        raise ValueError(
            f"got a pair of {z.shape[-1]} latents, wanted two, which make a plane. Build it with latent_dim=2."
        )
