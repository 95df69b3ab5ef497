"""The sites of a program, apart: their log densities at given latents, and the latents as columns of scalars.

`simulated_batch` puts a model's own data into its arguments, by their values: a site replaces the argument that it
equals up to shape, as ``obs=x.reshape(-1, 784)`` does, and where none or several do, the caller says which.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.inference.capture import capturing
from pyro_vae.inference.graphs import Uncapturable
from pyro_vae.randomness import forked
from pyro_vae.sites import Frame, common_scale, data_frame, depth, plates, sample_sites, site_log_prob
from pyro_vae.traces import Particles, Program, run_at, simulate, sites


class Scorer:
    """log p of a program's sites at given latents, for all chains in one run of the program.

    Of a guide with one site, whose distribution depends on x only, the first run serves for all.
    `sites` and `frame`: its sites, as one plain run gave them, and where their data lie.
    """

    def __init__(self, program: Program, args: tuple[Any, ...], guide: bool = False) -> None:
        self.program, self.args = program, args
        with forked(), torch.no_grad():
            plain = poutine.trace(program).get_trace(*args)
        common_scale([plain])
        self.nesting = depth(plain)
        self.frame = data_frame([plain], 1, self.nesting, args=args)
        self.sites = {site["name"]: site for site in sample_sites(plain)}
        self._fixed = next(iter(self.sites.values())) if guide and len(self.sites) == 1 else None
        self._broadcasts: bool | None = None

    def __call__(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Log densities per site, (C, B), at latents (C, *plates, *event)."""
        chains = len(next(iter(latents.values())))
        if self._fixed is not None:
            name, dim = self._fixed["name"], -1 - max(-dim for dim in plates(self._fixed))
            frame = Frame(len(latents[name]), dim, self.frame.data_dim, self.frame.data_size)
            return {name: site_log_prob({**self._fixed, "value": latents[name]}, frame)}
        if chains == 1 or self._broadcasts:
            return self._score(latents, chains)
        if self._broadcasts is None:
            try:
                scores = self._score(latents, chains)
                self._broadcasts = True
                return scores
            except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
                self._broadcasts = False
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                warnings.warn(
                    f"running {chains} chains one by one, since the program does not broadcast over a leading "
                    f"dimension ({reason}). Write networks and programs for (..., D) instead of (B, D).",
                    stacklevel=2,
                )
        if capturing():
            raise Uncapturable("the program does not broadcast, so its chains run one by one")
        singles = [self._score({name: z[c : c + 1] for name, z in latents.items()}, 1) for c in range(chains)]
        return {name: torch.cat([single[name] for single in singles]) for name in singles[0]}

    def _score(self, latents: Mapping[str, Tensor], chains: int) -> dict[str, Tensor]:
        trace = run_at(self.program, self.sites, latents, self.nesting, self.args, {})
        dim = -1 - self.nesting if chains > 1 else None
        frame = Frame(chains, dim, self.frame.data_dim, self.frame.data_size)
        return {site["name"]: site_log_prob(site, frame) for site in sample_sites(trace)}


def placed(site: Any, data_dim: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Which axis of a site's value is that of the data, and the shapes of its plates and of its event."""
    value, deepest = site["value"].shape, max(-dim for dim in plates(site))
    end = len(value) - site["fn"].event_dim
    return deepest + data_dim, tuple(value[end - deepest : end]), tuple(value[end:])


def refuse_other_scores(who: str, whose: str, again: Tensor, first: Tensor) -> None:
    """Refuse a program that scores the same values differently a second time."""
    if not torch.allclose(again, first, rtol=1e-3, atol=1e-2, equal_nan=True):
        raise ValueError(
            f"{who} scores the same values differently a second time, though {whose} networks are in evaluation mode: "
            "it draws noise that no site knows of, such as torch.randn or F.dropout(..., training=True) in its code. "
            "Make that noise a latent site (pyro.sample), or leave it out."
        )


def refuse_points(drawn: Particles, consequence: str) -> None:
    """Refuse a guide with a point site, of whose density something is asked."""
    if drawn.points:
        raise ValueError(
            f"guide site {drawn.points[0]!r} is a point (Delta) without a density{consequence}. Give the site a "
            "distribution."
        )


class Components:
    """Names and columns of all latent components of a model: C of them.

    Attributes:
        names: "z[0]", "z[1]", ..., "top" for a scalar site, "low[3,1]" with inner plates or larger events, (C,).
        sites: Number of components by site, in the order of the model.
        shapes: Shape of the components by site, as the names index it.
    Raises:
        ValueError: The model has no latent site, or no plate that all sites share.
    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_vae import Model
        >>> model = Model(lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1), lambda z: dist.Normal(z.sum(-1), 1.0))
        >>> components = Components(model, (torch.zeros(5),))
        >>> components.names, components.columns({"z": torch.zeros(7, 5, 2)}).shape
        (('z[0]', 'z[1]'), torch.Size([7, 5, 2]))
    """

    def __init__(self, model: Program, args: tuple[Any, ...]) -> None:
        scorer = Scorer(model, args)
        self._axes: dict[str, int] = {}
        self.sites: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        names: list[str] = []
        for name, site in scorer.sites.items():
            if site["is_observed"]:
                continue
            axis, batch, event = placed(site, scorer.frame.data_dim)
            shape = (*batch[:axis], *batch[axis + 1 :], *event)
            self._axes[name], self.sites[name], self.shapes[name] = 1 + axis, math.prod(shape), shape
            # A dimension that no plate has, as beside a data plate at dim -2, is none to speak of.
            named = [size != 1 or i - len(batch) in plates(site) for i, size in enumerate(batch)] + [True] * len(event)
            del named[axis]
            for index in itertools.product(*map(range, shape)):
                shown = ",".join(str(i) for i, show in zip(index, named, strict=True) if show)
                names.append(f"{name}[{shown}]" if shown else name)
        if not names:
            raise ValueError("the model has no latent site, so there is no posterior to judge.")
        self.names = tuple(names)

    def column(self, name: str, value: Tensor) -> Tensor:
        """One site's value (K, *plates, *event) as (K, B, components of the site)."""
        return value.movedim(self._axes[name], 1).reshape(len(value), value.shape[self._axes[name]], -1)

    def columns(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Values per site, (K, *plates, *event), side by side: (K, B, C) in float64."""
        return torch.cat([self.column(name, latents[name]).double() for name in self.sites], -1)

    def rows(self, name: str, value: Tensor) -> Tensor:
        """One site's value (K, *plates, *event) as one row for each sample and datum, (K B, *shape)."""
        return value.movedim(self._axes[name], 1).flatten(0, 1)

    def shared(self, name: str, rows: Tensor, size: int) -> Tensor:
        """Rows as samples that all of B data share, (rows, *plates, *event)."""
        wide = rows.unsqueeze(1).expand(len(rows), size, *rows.shape[1:])
        return wide.movedim(1, self._axes[name])


def simulated_batch(
    model: Program, args: tuple[Any, ...], observed: Mapping[str, int] | None = None
) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    """Draw (z, x) ~ p(z) p(x | z) in the shape of a batch: its arguments with simulated data in them, and the latents.

    Raises:
        ValueError: A site equals no argument, or several; or the model observes nothing.
    """
    given = {name: site["value"] for name, site in sites(model, *args).items() if site["is_observed"]}
    if not given:
        raise ValueError(
            "the model observes no site with these arguments, so there are no data to simulate. "
            "Write the data site as pyro.sample(name, distribution, obs=x)."
        )
    named = dict(observed or {})
    unknown = [name for name in named if name not in given]
    if unknown:
        raise ValueError(f"got observed={{{unknown[0]!r}: ...}}, wanted one of the model's data sites, {list(given)}.")
    places = {name: _place(name, value, args, named.get(name)) for name, value in given.items()}
    if len(set(places.values())) < len(places):
        raise ValueError(
            f"two observed sites are one and the same argument, {places}, so simulated data have no place. Make them "
            "one site, or two arguments."
        )
    drawn = simulate(model, *args)
    replaced = list(args)
    for name, place in places.items():
        replaced[place] = drawn.observations[name].reshape(args[place].shape).to(args[place].dtype)
    return tuple(replaced), drawn.latents


def _place(site: str, value: Tensor, args: tuple[Any, ...], named: int | None) -> int:
    if named is not None:
        if not -len(args) <= named < len(args) or not isinstance(args[named], Tensor):
            raise ValueError(
                f"got observed={{{site!r}: {named}}}, wanted the position of a tensor among {len(args)} arguments."
            )
        if args[named].numel() != value.numel():
            raise ValueError(
                f"argument {named} has {args[named].numel()} values, and site {site!r} {value.numel()}: wanted as many."
            )
        return named % len(args)
    tensors = {i: x.flatten() for i, x in enumerate(args) if isinstance(x, Tensor) and x.numel() == value.numel()}
    same = [i for i, x in tensors.items() if bool((x == value.flatten()).all())]
    if len(same) != 1:
        found = "none" if not same else f"those at {same}"
        raise ValueError(
            f"simulated data of site {site!r} replace the argument that it equals up to shape, and of {len(args)} "
            f"arguments {found} did. Say which it is by its position: observed={{{site!r}: 0}}."
        )
    return same[0]
