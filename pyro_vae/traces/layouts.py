"""Where the data of a pair lie among its plates, as one run of it shows, without touching the random state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from pyro_vae.auxiliary import feeds
from pyro_vae.randomness import forked
from pyro_vae.sites import data_frame, depth, is_subsample, plates, sample_sites, site_log_prob
from pyro_vae.traces.runs import Program, traced


def plate_nesting(model: Program, guide: Program, *args: Any, **kwargs: Any) -> int:
    """How many batch dimensions the pair's plates occupy, without touching the random state; a guide of one density for
    all data is a ValueError."""
    with forked(), torch.no_grad():
        guide_trace, model_trace = traced(model, guide, args, kwargs)
        fed = feeds(guide, sample_sites(guide_trace), args, kwargs)
    inside = set.intersection(*({*plates(site)} for site in sample_sites(model_trace)), {*range(-9, 0)})
    for name in {source for sources in fed.values() for source in sources}:
        if inside - {*plates(guide_trace.nodes[name])}:
            raise ValueError(
                f"guide site {name!r} is one density for all data, outside their plate, so that nothing is known of "
                "single data. elbo_terms and log_likelihood take it as it is; for the rest use a guide with a density "
                "for each datum, such as AutoNormal."
            )
    return max(depth(guide_trace), depth(model_trace))


def nesting_of(model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """As `plate_nesting`, for whoever takes densities of all data together too."""
    with forked(), torch.no_grad():
        return max(depth(trace) for trace in traced(model, guide, args, kwargs))


class Layout(NamedTuple):
    """Where a pair's data lie, as one run of it showed: how many batch dimensions the plates occupy, how many data one
    density is of (as `Particles.joint`), and B, where the data plate picks B of N rows at random by itself; else 0.
    """

    nesting: int
    joint: int
    subsampled: int


def layout(model: Program, guide: Program, *args: Any, **kwargs: Any) -> Layout:
    """Run and score a pair once for its plates, without touching the random state; it raises as `particles`, and what
    torch or Pyro raise where the pair does not take these data."""
    with forked(), torch.no_grad():
        guide_trace, model_trace = traced(model, guide, args, kwargs)
        fed = feeds(guide, sample_sites(guide_trace), args, kwargs)
        shared = {source for sources in fed.values() for source in sources}
        nesting = max(depth(guide_trace), depth(model_trace))
        frame = data_frame([guide_trace, model_trace], 1, nesting, joint=shared, args=args)
        for site in (*sample_sites(guide_trace), *sample_sites(model_trace)):
            site_log_prob(site, frame)  # what was drawn for other data shows here
    fns: list[Any] = [site.get("fn") for site in guide_trace.nodes.values()]
    picks = [fn for fn in fns if is_subsample(fn)]
    random = any(fn.subsample_size == frame.data_size < fn.size for fn in picks)
    return Layout(nesting, frame.data_size if frame.joint else 0, frame.data_size if random else 0)
