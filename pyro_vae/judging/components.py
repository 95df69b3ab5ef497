"""The latent sites of a model as columns: one for each scalar component, whatever the sites are called."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_vae.judging.densities import Scorer
from pyro_vae.sites import plates
from pyro_vae.traces import Program


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
