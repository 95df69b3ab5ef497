"""The log densities of a pair as functions of unconstrained latents, with their gradients.

Markov chains want one vector per chain and datum, u: (C, B, U) for C chains, B data and U unconstrained dimensions:

    log f(u) = log f(z) + log |det dT / du|,   z = T(u)
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import IndependentTransform

from pyro_vae.auxiliary import points_among
from pyro_vae.judging.components import Scorer, placed, refuse_other_scores
from pyro_vae.sites import deterministic, kind, unwrapped
from pyro_vae.traces import Program, draw

Density = Callable[[Tensor], tuple[Tensor, Tensor]]  # u, (C, B, U), to (J, C, B) and (J, C, B, U)


class Site(NamedTuple):
    """Where one latent site lies in u, and how to get there."""

    name: str
    transform: Any  # u to z; None for the identity
    data_axis: int  # of a value (C, *plates, *event)
    shape: tuple[int, ...]  # of its unconstrained value, (*plates, *event) without the data
    size: int


class Latents:
    """The latent sites of a model side by side, in its order: u, (C, B, U); U is their size.

    Raises:
        ValueError: No latent, a discrete or enumerated one, or one whose support has no unconstrained coordinates.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.sites: list[Site] = []
        for name, site in scorer.sites.items():
            if site["is_observed"] or deterministic(site):
                continue
            _continuous(name, site)
            transform, event = _transform(name, site)
            axis, inner, _ = placed(site, scorer.frame.data_dim)
            shape = (*inner[:axis], *inner[axis + 1 :], *event)
            self.sites.append(Site(name, transform, 1 + axis, shape, math.prod(shape)))
        if not self.sites:
            raise ValueError("the model has no latent site, so there is nothing to sample. Its log_prob is exact.")
        self.size = sum(site.size for site in self.sites)

    def pack(self, latents: Mapping[str, Tensor]) -> Tensor:
        """u, (C, B, U), of values per site, (C, *plates, *event), which have to lie in the supports of the model."""
        columns = []
        for site in self.sites:
            value = latents[site.name]
            raw = value if site.transform is None else site.transform.inv(value)
            if not bool(torch.isfinite(raw).all()):
                raise ValueError(
                    f"a value of latent site {site.name!r} lies outside the support of the model's distribution there. "
                    "Give the guide a distribution with the support of the prior."
                )
            raw = raw.movedim(site.data_axis, 1)
            columns.append(raw.reshape(*raw.shape[:2], site.size))
        return torch.cat(columns, -1)

    def unpack(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """Values per site, (C, *plates, *event), and log |det dT / du|, (C, B), None where all are unconstrained."""
        latents, jacobian = {}, None
        for site, raw in zip(self.sites, u.split([site.size for site in self.sites], -1), strict=True):
            raw = raw.reshape(*raw.shape[:2], *site.shape).movedim(1, site.data_axis)
            if site.transform is None:
                latents[site.name] = raw
                continue
            latents[site.name] = value = site.transform(raw)
            term = site.transform.log_abs_det_jacobian(raw, value).movedim(site.data_axis, 1)
            term = term.flatten(2).sum(-1) if term.dim() > 2 else term
            jacobian = term if jacobian is None else jacobian + term
        return latents, jacobian


class Pair:
    """What chains need of a model/guide pair at one batch; without a guide only the prior is used.

    Raises:
        ValueError: Discrete, enumerated, auxiliary or point sites, by name with a remedy.
    """

    def __init__(self, model: Program, guide: Program | None, args: tuple[Any, ...]) -> None:
        self.model, self.guide, self.args = model, guide, args
        self.joint = Scorer(model, args)
        self.latents = Latents(self.joint)
        self.names = [site.name for site in self.latents.sites]
        if guide is not None:
            self._guide_score = Scorer(guide, args, guide=True)
            self._check_guide(guide, self._guide_score)

    def from_guide(self, num_chains: int) -> Tensor:
        """Draws u ~ q(z | x), (C, B, U)."""
        assert self.guide is not None
        drawn = draw(self.model, self.guide, self.args, {}, num_chains).latents
        return self.latents.pack({name: drawn[name] for name in self.names})

    def from_prior(self, num_chains: int) -> Tensor:
        """Draws u ~ p(z), (C, B, U)."""
        # Parameters are not blocked: they must reach `own_parameters`, or the param store would answer for them.
        prior = poutine.block(self.model, hide_fn=lambda m: m["type"] == "sample" and m["name"] not in self.names)
        return self.latents.pack(draw(self.model, prior, self.args, {}, num_chains).latents)

    def posterior_density(self) -> Density:
        """log p(x, T(u)) + log |dT/du|, as the one row of J = 1."""
        self._check_repeatable()
        return functools.partial(_evaluate, lambda u: [self.log_posterior(u)])

    def path_density(self, start: str) -> Density:
        """The two ends of an annealing path, J = 2: log p0(u), of the guide or the prior, and log p(x, u)."""
        self._check_repeatable()
        if start == "guide":
            self._check_rescoring()
        return functools.partial(_evaluate, functools.partial(self._ends, start == "guide"))

    def log_posterior(self, u: Tensor) -> Tensor:
        """log p(x, T(u)) + log |dT/du|, (C, B), without gradients."""
        latents, jacobian = self.latents.unpack(u)
        return _total(self.joint(latents).values(), jacobian)

    def _ends(self, by_guide: bool, u: Tensor) -> list[Tensor]:
        latents, jacobian = self.latents.unpack(u)
        own = self._guide_score(latents) if by_guide else {}
        scores = self.joint(latents)
        first = _total([(own or scores)[name] for name in self.names], jacobian)
        if by_guide:
            return [first, _total(scores.values(), jacobian)]
        return [first, _total([s for name, s in scores.items() if name not in self.names], first)]

    def _check_guide(self, guide: Program, scorer: Scorer) -> None:
        remedy = 'anneal from the prior: ais(model, None, data, start="prior").'
        points = points_among(guide, scorer.sites.values(), self.args, {})
        for name, site in scorer.sites.items():
            if name in points:
                raise ValueError(
                    f"guide site {name!r} is a point (Delta) without a density, so chains cannot start from it. Give "
                    f"the site a distribution, or {remedy}"
                )
            if name not in self.names and not site["is_observed"]:
                raise ValueError(
                    f"guide site {name!r} is none of the model's latent sites, {self.names}, so the density of the "
                    f"guide's draws is not known. A{remedy[1:]}"
                )
        absent = [name for name in self.names if name not in scorer.sites]
        if absent:
            raise ValueError(
                f"latent site {absent[0]!r} of the model has no counterpart in the guide, which has "
                f"{list(scorer.sites)}. Add it, or {remedy}"
            )

    def _check_repeatable(self) -> None:
        drawn = self.latents.unpack(self.from_prior(2))[0]
        first, second = self.joint(drawn), self.joint(drawn)
        for name, score in first.items():
            refuse_other_scores(f"site {name!r} of the model", "its", second[name], score)

    def _check_rescoring(self) -> None:
        """Score draws as if another had made them, and compare with their own densities."""
        assert self.guide is not None
        drawn = draw(self.model, self.guide, self.args, {}, 2)
        remedy = 'Anneal from the prior (start="prior"), or use a guide with an inverse, such as a coupling flow.'
        for name, site in self._guide_score.sites.items():
            if isinstance(unwrapped(site["fn"]), Delta):
                raise ValueError(
                    f"guide site {name!r} is a Delta that carries the density of its own draw, so it cannot score "
                    f"another. {remedy}"
                )
        try:
            again = self._guide_score({name: drawn.latents[name].clone() for name in self.names})
        except (KeyError, NotImplementedError) as error:
            kinds = {name: kind(site["fn"]) for name, site in self._guide_score.sites.items()}
            raise ValueError(
                f"the guide, {kinds}, cannot score a sample that it did not draw (rescoring is impossible): its "
                f"transform has no inverse. {remedy}"
            ) from error
        for name in self.names:
            refuse_other_scores(f"guide site {name!r}", "the guide's", again[name], drawn.log_q[name])


def _evaluate(ends: Callable[[Tensor], list[Tensor]], u: Tensor) -> tuple[Tensor, Tensor]:
    """Values and gradients of the ends of a path at u, for all chains and data."""
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        values = ends(u)
        gradients = [
            torch.autograd.grad(v.sum(), u, retain_graph=i + 1 < len(values), allow_unused=True)[0]
            if v.requires_grad
            else None
            for i, v in enumerate(values)
        ]
    found = [torch.zeros_like(u) if g is None else g for g in gradients]
    return torch.stack([v.detach() for v in values]), torch.stack(found)


def _total(terms: Any, start: Tensor | None) -> Tensor:
    terms = [*terms] if start is None else [start, *terms]
    return functools.reduce(torch.add, terms)


def _continuous(name: str, site: Any) -> None:
    fn = site["fn"]
    discrete = (site["infer"] or {}).get("enumerate") or getattr(fn, "has_enumerate_support", False)
    with contextlib.suppress(NotImplementedError):
        discrete = discrete or fn.support.is_discrete
    if discrete:
        raise ValueError(
            f"latent site {name!r} ({kind(fn)}) is discrete or to be enumerated, and Hamiltonian moves need "
            "gradients. Sum it out of the model (of the zoo's Mixture take pair.marginal), or use log_likelihood."
        )


def _transform(name: str, site: Any) -> tuple[Any, tuple[int, ...]]:
    """T from unconstrained coordinates to the support, and the shape of an unconstrained event."""
    fn = site["fn"]
    event = tuple(site["value"].shape[site["value"].dim() - fn.event_dim :])
    try:
        support = fn.support
    except NotImplementedError:
        return None, event  # a distribution that does not say: all of R^D
    inner = support
    while hasattr(inner, "base_constraint"):
        inner = inner.base_constraint
    if inner is torch.distributions.constraints.real:
        return None, event
    try:
        transform = biject_to(support)
        raw = transform.inv(site["value"])
    except NotImplementedError as error:
        raise ValueError(
            f"latent site {name!r} ({kind(fn)}) has the support {support}, which has no unconstrained coordinates for "
            "Hamiltonian moves. Use log_likelihood, which needs none."
        ) from error
    batch = site["value"].dim() - fn.event_dim
    rest = fn.event_dim - transform.codomain.event_dim  # over which its log determinant is summed, too
    if rest:  # of the same cache, since not every transform can be made with another
        transform = IndependentTransform(transform, rest, cache_size=getattr(transform, "_cache_size", 0))
    return transform, tuple(raw.shape[batch:])
