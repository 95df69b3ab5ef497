"""Guides that draw in other coordinates: a density at an auxiliary site, and a ``Delta`` for the latent.

Pyro's automatic guides draw u from a distribution on all of R^D, at a site that is marked as
auxiliary, and write the latent z = T(u) as a ``Delta`` with

    log q(z) = log q(u) - log |det dT / du|,

where the second term is the log density of the ``Delta``. That is 0 for a ``Delta`` that is nothing but a point, too:
what tells them apart is whether z is a function of u, which `feeds` finds out by changing u alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from pyro_vae.evaluation import unmoved
from pyro_vae.randomness import forked
from pyro_vae.reach import modules_of
from pyro_vae.sites import delta, is_point

_TRIES = 3  # other draws of a discrete site may happen to be the same

_known: weakref.WeakKeyDictionary[Any, dict[Any, dict[str, tuple[str, ...]]]] = weakref.WeakKeyDictionary()


def auxiliary_among(sites: Iterable[Any]) -> list[str]:
    """The random sites of a guide that are no latents of the model."""
    return [
        site["name"]
        for site in sites
        if not site["is_observed"] and (site["infer"] or {}).get("is_auxiliary") and delta(site["fn"]) is None
    ]


def feeds(
    guide: Any, sites: Iterable[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, tuple[str, ...]]:
    """Per ``Delta`` site of a guide, the auxiliary sites that its value is a function of; those that none feeds are
    left out.

    It is found out once for each guide, by running it again under the same noise with another draw of one auxiliary
    site at a time; random state and buffers stay as they are.
    """
    sites = list(sites)
    names = auxiliary_among(sites)
    points = [s["name"] for s in sites if not s["is_observed"] and delta(s["fn"]) is not None]
    if not names or not points:
        return {}
    owner = getattr(guide, "__self__", guide)
    key = (getattr(guide, "__func__", None), tuple(names), tuple(points))
    try:
        known = _known.setdefault(owner, {})
    except TypeError:  # an object that cannot be referred to weakly
        known = {}
    if key not in known:
        known[key] = _found(guide, names, points, args, kwargs)
    return known[key]


def undetermined(guide: Any, sites: Iterable[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Why a guide has no density of its latents: an auxiliary site u that none of them is a function of; None where it
    has.

    With log q(u) log q(z | u) in the place of log q(z) the "ELBO" is off by E[log r(u | z)], which no program gives: it
    may lie above log p(x).
    """
    sites = list(sites)
    names = auxiliary_among(sites)
    fed = {source for sources in feeds(guide, sites, args, kwargs).values() for source in sources}
    idle = [name for name in names if name not in fed]
    if not idle:
        return None
    return (
        f"guide site {idle[0]!r} is none of the model's latent sites: it is auxiliary, and no latent is a function of "
        f"it (a Delta at a value made of it). q(z) would have to be integrated over {idle[0]!r}, and "
        f"log q({idle[0]}) + log q(z) is no bound's. Make it a latent of the model as well, with a density given z, or "
        "draw z from one distribution."
    )


def points_among(guide: Any, sites: Iterable[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """The sites of a guide that are points: neither the ``Delta`` nor what it is a function of has a density."""
    sites = list(sites)
    found = [site for site in sites if not site["is_observed"] and delta(site["fn"]) is not None]
    if not found:
        return ()
    fed = feeds(guide, sites, args, kwargs)
    return tuple(site["name"] for site in found if site["name"] not in fed and is_point(site["fn"]))


def _found(
    guide: Any, names: list[str], points: list[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, tuple[str, ...]]:
    fed: dict[str, tuple[str, ...]] = {name: () for name in points}
    with disable_proxy_modes_tracing(), torch.no_grad(), forked(), unmoved(modules_of(guide)):

        def values(changed: str | None, seed: int) -> dict[str, Tensor]:
            torch.manual_seed(0)
            with poutine.trace() as outer, _Another(changed, seed):
                guide(*args, **kwargs)
            nodes: dict[str, Any] = outer.trace.nodes
            return {name: nodes[name]["value"] for name in points}

        before = values(None, 0)
        for name in names:
            for seed in range(1, 1 + _TRIES):
                after = values(name, seed)
                moved = [point for point in points if not torch.equal(before[point], after[point])]
                if moved:
                    fed |= {point: (*fed[point], name) for point in moved}
                    break
    return {name: sources for name, sources in fed.items() if sources}


class _Another(Messenger):
    """Another draw at one site, while the noise of all others stays the same."""

    def __init__(self, name: str | None, seed: int) -> None:
        super().__init__()
        self.name, self.seed = name, seed

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] != self.name:
            return
        with forked():
            torch.manual_seed(self.seed)
            msg["value"] = msg["fn"](*msg["args"], **msg["kwargs"])
