"""The sites of a program, apart: their log densities at given latents, and the latents as columns of scalars.

`Scorer` runs a program once to learn its structure, and then once per evaluation for all
chains and data together. `Components` has one column for each scalar component of a model's latents, whatever its
sites are called.
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

from pyro_vae.inference.capture import Uncapturable, capturing
from pyro_vae.sites import (
    Frame,
    common_scale,
    data_frame,
    depth,
    plates,
    sample_sites,
    site_log_prob,
)
from pyro_vae.traces import Program, run_at


class Scorer:
    """log p of a program's sites at given latents, for all chains in one run of the program.

    Args:
        program: A Pyro program.
        args: What it takes.
    Attributes:
        sites: Its sites, as one plain run gave them.
        frame: Where its data lie.
    Raises:
        ValueError: What `data_frame` and `common_scale` refuse.
    """

    def __init__(self, program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
        self.program, self.args, self.kwargs = program, args, dict(kwargs or {})
        with torch.random.fork_rng(), torch.no_grad():
            plain = poutine.trace(program).get_trace(*args, **self.kwargs)
        common_scale([plain])
        self.nesting = depth(plain)
        self.frame = data_frame([plain], 1, self.nesting, args=args)
        self.sites = {site["name"]: site for site in sample_sites(plain)}
        self._broadcasts: bool | None = None

    def __call__(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Log densities per site, (C, B), at latents (C, *plates, *event)."""
        chains = len(next(iter(latents.values())))
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
        trace = run_at(self.program, self.sites, latents, self.nesting, self.args, self.kwargs)
        dim = -1 - self.nesting if chains > 1 else None
        frame = Frame(chains, dim, self.frame.data_dim, self.frame.data_size)
        return {site["name"]: site_log_prob(site, frame) for site in sample_sites(trace)}


class FixedScorer:
    """As `Scorer`, for a guide of one site: its distribution depends on x only, so the network runs once."""

    def __init__(self, scorer: Scorer) -> None:
        (self.site,) = scorer.sites.values()
        self.data_dim, self.data_size = scorer.frame.data_dim, scorer.frame.data_size

    def __call__(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        value = latents[self.site["name"]]
        deepest = max(-dim for dim in plates(self.site))
        chains = len(value)
        frame = Frame(chains, -1 - deepest, self.data_dim, self.data_size)
        return {self.site["name"]: site_log_prob({**self.site, "value": value}, frame)}


class Components:
    """Names and columns of all latent components of a model: C of them.

    Args:
        model: A Pyro program for p(x, z).
        args: A batch.
    Attributes:
        names: "z[0]", "z[1]", ..., "top" for a scalar site, "low[3,1]" with inner plates or larger events, (C,).
        sites: Number of components by site, in the order of the model.
        shapes: Shape of the components by site, as the names index it.
    Raises:
        ValueError: The model has no latent site, or no plate that all sites share.
    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)
        >>> components = Components(model, (torch.zeros(5),))
        >>> components.names
        ('z[0]', 'z[1]')
        >>> components.columns({"z": torch.zeros(7, 5, 2)}).shape
        torch.Size([7, 5, 2])
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
            value, event = site["value"], site["fn"].event_dim
            batch = value.shape[: value.dim() - event]
            deepest = max(-dim for dim in plates(site))
            whole = (*batch[len(batch) - deepest :], *value.shape[value.dim() - event :])
            axis = deepest + scorer.frame.data_dim
            shape = whole[:axis] + whole[axis + 1 :]
            self._axes[name] = 1 + axis
            self.sites[name] = math.prod(shape)
            self.shapes[name] = shape
            # A dimension that no plate has, as beside a data plate at dim -2, is none to speak of.
            empty = [batch[len(batch) + dim] == 1 and dim not in plates(site) for dim in range(-deepest, 0)]
            told = [not e for i, e in enumerate([*empty, *[False] * event]) if i != axis]
            for index in itertools.product(*map(range, shape)):
                index = tuple(i for i, say in zip(index, told, strict=True) if say)
                names.append(f"{name}[{','.join(map(str, index))}]" if index else name)
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
        axis = self._axes[name]
        wide = rows.unsqueeze(1).expand(len(rows), size, *rows.shape[1:])
        return wide.movedim(1, axis)
