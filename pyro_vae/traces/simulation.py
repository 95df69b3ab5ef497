"""Draws from a model: latents and data together, or data at given latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.options import of_model
from pyro_vae.parameters import own_parameters
from pyro_vae.refusals import in_words
from pyro_vae.sites import deterministic, sample_sites, site_value
from pyro_vae.traces.runs import Program, replayed, sites, taking


class Simulation(NamedTuple):
    """A draw from a model: its latent and its observed sites, by name."""

    latents: dict[str, Tensor]
    observations: dict[str, Tensor]


@of_model
def simulate(model: Program, *args: Any, **kwargs: Any) -> Simulation:
    """Draw latents and data from a model, whatever it was observing.

    The data are the sites that it observes with these arguments; where it observes
    none, as `Model` with size=n, the last site.

    Args:
        model: A Pyro program for p(x, z).
        args: What the model takes (a batch serves for its shape only).
        kwargs: Keyword arguments, such as size=100 for `Model`.
    Returns:
        The latent and the observed sites.
    """
    with own_parameters(model), torch.no_grad(), taking(args), in_words((model,), args, kwargs):
        observed = poutine.trace(model).get_trace(*args, **kwargs)
        trace = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
    # Run as a prior, a model that takes no data says which site is the data by its name.
    data = [s["name"] for s in sample_sites(observed) if s["is_observed"]]
    data = data or [[s for s in sample_sites(observed) if not deterministic(s)][-1]["name"]]
    values = {site["name"]: site["value"] for site in sample_sites(trace) if not deterministic(site)}
    return Simulation(
        {name: value for name, value in values.items() if name not in data},
        {name: value for name, value in values.items() if name in data},
    )


def predict(model: Program, latents: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Draw data x_k ~ p(x | z_k) at given latents, one for each: (K, *plates, *event) per observed site.

    `latents` have values per latent site, (K, *plates, *event), as `Particles.latents`; one without is a ValueError.
    The model's arguments serve for their shape only.
    """
    with own_parameters(model), torch.no_grad():
        data = [name for name, site in sites(model, *args, **kwargs).items() if site["is_observed"]]
        trace, frame = replayed(poutine.uncondition(model), latents, args, kwargs, free=data)
        return {name: site_value(trace.nodes[name], frame) for name in data}
