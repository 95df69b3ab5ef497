"""Log densities of given latents, under the model or under the guide."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.auxiliary import points_among
from pyro_vae.options import of_guide, of_model
from pyro_vae.parameters import own_parameters
from pyro_vae.refusals import in_words
from pyro_vae.sites import Frame, common_scale, delta, kind, sample_sites, site_log_prob, unwrapped
from pyro_vae.traces.runs import Program, replayed, taking


@of_model
def log_joint(model: Program, latents: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """log p(x, z_k) of given latents.

    Args:
        model: A Pyro program for p(x, z).
        latents: Values per latent site, (K, *plates, *event), as `Particles.latents`.
        args: What the model takes.
        kwargs: Keyword arguments that the model takes.
    Returns:
        Log densities in nats, (K, B), without the constant scale that all sites share.
    Raises:
        ValueError: A latent site has no value, or the sites carry different scales.
    """
    with own_parameters(model), taking(args), in_words((model,), args, kwargs):
        trace, frame = replayed(model, latents, args, kwargs)
        common_scale([trace])
        return sum((site_log_prob(site, frame) for site in sample_sites(trace)), torch.zeros(()))


@of_guide
def log_q(guide: Program, latents: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """log q(z_k | x) of given latents, also of samples that the guide did not draw.

    Args:
        guide: A Pyro program for q(z | x).
        latents: Values per latent site, (K, *plates, *event), as `Particles.latents`.
        args: What the guide takes.
        kwargs: Keyword arguments that the guide takes.
    Returns:
        Log densities in nats, (K, B), without the constant scale that all sites share.
    Raises:
        ValueError: A latent has no value, the guide has a point site, its distribution cannot
            score a sample that it did not draw, or the sites carry different scales.
    """
    with own_parameters(guide), taking(args), in_words((guide,), args, kwargs):
        look = functools.partial(_refuse_points, guide, args, kwargs)
        trace, frame = replayed(guide, latents, args, kwargs, look=look)
        common_scale([trace])
        return sum((log_q_of(site, frame, True) for site in sample_sites(trace)), torch.zeros(()))


def _refuse_points(guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], trace: Trace) -> None:
    for name in points_among(guide, sample_sites(trace), args, kwargs):
        raise ValueError(f"guide site {name!r} is a point (Delta) without a density.")
    for site in sample_sites(trace):
        if not site["is_observed"] and delta(site["fn"]) is not None:
            raise _carries_its_own(site["name"])


def log_q_of(site: Any, frame: Frame, foreign: bool) -> Tensor:
    """log q of a guide's site; where it is foreign, of a sample that its distribution does not know."""
    name = site["name"]
    if foreign and isinstance(unwrapped(site["fn"]), Delta):
        raise _carries_its_own(name)
    try:
        return site_log_prob(site, frame)
    except (KeyError, NotImplementedError) as error:
        if not foreign:
            raise
        raise ValueError(
            f"guide site {name!r} ({kind(site['fn'])}) cannot score a sample that it did not draw: its transform has "
            f"no inverse. {_AS_DRAWN}, or a posterior with an inverse, such as a coupling flow."
        ) from error


_AS_DRAWN = "Use estimator='reparameterized' or particles(), which score as they draw"


def _carries_its_own(name: str) -> ValueError:
    return ValueError(
        f"guide site {name!r} is a Delta that carries the density of its own draw, so it cannot score a sample that it "
        f"did not draw. {_AS_DRAWN}."
    )
