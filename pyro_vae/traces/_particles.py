"""Log densities read from Pyro programs: for K samples z_k ~ q(z | x) and B data the table

    log p(x, z_k)   and   log q(z_k | x)        each (K, B), in nats.

Inner plates are summed out, masks applied, and a constant scale common to all sites, as subsampling gives, is handed on
beside the table; any other is refused by name.

A ``Delta`` of the model is a value that is recorded, not a latent. A ``Delta`` of the guide that auxiliary sites feed
(Pyro's automatic guides, see `pyro_vae.auxiliary`) has its density there: where an auxiliary site u feeds one latent z
alone, log q(z | x) is that of u and of the ``Delta`` together. Where all data share one auxiliary site
(``AutoDiagonalNormal`` and its kin draw one vector for the whole data set), q(z_1, ..., z_N) does not fall apart into
data. The table then has a single column, which stands for all N data together (`Particles.num_data`): log of a mean
weight is a bound on log p(x_1, ..., x_N).
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from pyro_vae.auxiliary import feeds, points_among
from pyro_vae.options import integer, of_pair
from pyro_vae.parameters import own_parameters
from pyro_vae.randomness import forked
from pyro_vae.refusals import in_words, wrong_site
from pyro_vae.sites import PARTICLES, common_scale, data_frame, deterministic, sample_sites, site_log_prob, site_value
from pyro_vae.traces.agreement import other_mask, refuse_unmatched
from pyro_vae.traces.cuts import Cut
from pyro_vae.traces.given import log_q_of
from pyro_vae.traces.layouts import nesting_of
from pyro_vae.traces.runs import Program, sites, taking, traced


class Particles(NamedTuple):
    """K samples of the latents for each of B data, as log densities in nats.

    Attributes:
        log_likelihood: log p(x | z_k), (K, B), summed over observed sites.
        log_prior: log p(z_k) per latent site, (K, B) each.
        log_q: log q(z_k | x) per latent site, (K, B) each; none for point sites.
        latents: The samples, (K, *plates, *event) each: (K, B, D) in a plain VAE.
        scale: A constant scale common to all sites (N / B under subsampling). It
            multiplies a bound per datum, outside any logsumexp.
        points: Guide sites that are points (``Delta``) and carry no density.
        fixed: Guide sites whose sampler is not reparameterised.
        posteriors: The distributions at the guide's sites, as the program gave them
            (batch_shape with the K samples in front where K > 1); empty where the
            samples were drawn one by one.
        priors: Those at the model's latent sites.
        joint: How many data the one column stands for, where the guide has one density
            for all of them; 0 where each column is a datum.
        partial: Latent sites whose log_q is only a part of their density, since an auxiliary
            site that holds the rest feeds others too.
    """

    log_likelihood: Tensor
    log_prior: dict[str, Tensor]
    log_q: dict[str, Tensor]
    latents: dict[str, Tensor]
    scale: float = 1.0
    points: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    posteriors: Mapping[str, Any] = {}
    priors: Mapping[str, Any] = {}
    joint: int = 0
    partial: tuple[str, ...] = ()

    @property
    def num_data(self) -> int:
        """How many data the columns stand for."""
        return self.joint or self.log_likelihood.shape[1]

    @property
    def log_joint(self) -> Tensor:
        """log p(x, z_k), (K, B)."""
        return functools.reduce(torch.add, self.log_prior.values(), self.log_likelihood)

    @property
    def log_weight(self) -> Tensor:
        """log w_k = log p(x, z_k) - log q(z_k | x), (K, B).

        Raises:
            ValueError: The guide has a point site, so there is no q(z | x).
        """
        if self.points:
            raise ValueError(
                f"guide site {self.points[0]!r} is a point (Delta) without a density: it has no ELBO, no "
                "importance weights and no log p(x) estimate. Train it with Objective(reconstruction), "
                "or give the site a distribution such as Guide(DiagonalNormal(...))."
            )
        return functools.reduce(torch.sub, self.log_q.values(), self.log_joint)


@of_pair  # type: ignore[arg-type]  # mypy joins no names with **kwargs
def particles(
    model: Program,
    guide: Program,
    *args: Any,
    num_samples: int = 1,
    vectorize: bool | None = None,
    max_plate_nesting: int | None = None,
    **kwargs: Any,
) -> Particles:
    """Draw z_1, ..., z_K ~ q(z | x) and score them under model and guide.

    All K are drawn in one pass under a particle plate where the pair broadcasts over
    leading dimensions, one by one where it does not (a warning says so once).

    Args:
        model: A Pyro program for p(x, z).
        guide: A Pyro program for q(z | x).
        args: What both take, usually the batch.
        num_samples: K.
        vectorize: True or False to insist; None to try.
        max_plate_nesting: Depth of the pair's plates; None runs the pair once to see
            (without touching the random state).
        kwargs: Keyword arguments that both take.
    Returns:
        The table of log densities, each (K, B).
    Raises:
        ValueError: No plate is shared by all sites; a latent lies outside it; model
            and guide disagree on the latents; a batch dimension belongs to no plate;
            the sites carry different scales; model and guide mask a latent differently; a
            latent is to be enumerated (summed out); the model observes nothing, as where the pair is swapped.
    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> weights = particles(model, guide, torch.zeros(2), num_samples=3).log_weight
        >>> torch.allclose(weights, dist.Normal(0.0, 2**0.5).log_prob(torch.zeros(3, 2)))
        True
    """
    with own_parameters(model, guide):
        with contextlib.nullcontext() if vectorize else taking(args):
            found = draw(model, guide, args, kwargs, num_samples, vectorize, max_plate_nesting)
        if not _recording():
            if bool(found.log_likelihood.isnan().any()) or any(bool(v.isnan().any()) for v in found.log_q.values()):
                reason = wrong_site((guide, model), args, kwargs)
                raise ValueError(reason or "a log density of the pair is nan. Look at its data and its weights.")
            if not bool(found.log_likelihood.any()):  # of nothing observed, as of a guide in the model's place
                with forked(), torch.no_grad():
                    observed = [name for name, site in sites(model, *args, **kwargs).items() if site["is_observed"]]
                if not observed:
                    raise ValueError(
                        "the model observes nothing, so there is no p(x): wanted pyro.sample(name, distribution, "
                        "obs=x). The order is (model, guide, data)."
                    )
        return found


def draw(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    num_samples: int = 1,
    vectorize: bool | None = None,
    max_plate_nesting: int | None = None,
    cut: Cut | None = None,
) -> Particles:
    """As `particles`, leaving parameters to the surrounding handlers (for Pyro's ELBOs).

    With a `Cut`, the log densities are functions of detached samples.
    """
    num_samples = integer("num_samples", num_samples)
    if num_samples == 1:
        return _one_pass(model, guide, args, kwargs, 1, 0, cut)
    if vectorize is not False:
        if max_plate_nesting is None:
            max_plate_nesting = nesting_of(model, guide, args, kwargs)
        try:
            return _one_pass(model, guide, args, kwargs, num_samples, max_plate_nesting, cut)
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            if vectorize:
                raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if cut is not None:
            cut.passes.clear()
    singles = [_one_pass(model, guide, args, kwargs, 1, 0, cut) for _ in range(num_samples)]
    if vectorize is None:
        warnings.warn(
            f"drawing {num_samples} samples one by one, since the pair does not broadcast over a leading "
            f"dimension ({reason}). It takes longer, and estimates the same. Write networks and programs for (..., D) "
            "instead of (B, D); or silence this by warnings.filterwarnings('ignore', 'drawing .* one by one').",
            stacklevel=4,
        )
    return _stack(singles)


def _one_pass(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    num_samples: int,
    nesting: int,
    cut: Cut | None = None,
) -> Particles:
    """The table of one run of the pair, under a particle plate where there are several samples."""
    with in_words((guide, model), args, kwargs):
        given = guide
        if num_samples > 1:
            plate = functools.partial(pyro.plate, PARTICLES, num_samples, dim=-1 - nesting)
            guide, model = plate()(guide), plate()(model)
        if cut is not None:
            guide = cut(guide)  # outside the plate, so that it sees distributions already expanded
        guide_trace, model_trace = traced(model, guide, args, kwargs)
        drawn = {s["name"]: s for s in sample_sites(guide_trace)}
        unobserved = {s["name"]: s for s in sample_sites(model_trace) if not s["is_observed"]}
        latent = {name: s for name, s in unobserved.items() if name in drawn or not deterministic(s)}
        refuse_unmatched(latent, drawn)
        points = points_among(given, drawn.values(), args, kwargs)
        fed = feeds(given, drawn.values(), args, kwargs)
        shared = {source for sources in fed.values() for source in sources}
        if not _recording() and (reason := other_mask(latent, drawn, points, fed)):
            raise ValueError(reason)
        frame = data_frame([guide_trace, model_trace], num_samples, nesting, joint=shared, args=args)
        scored = [site_log_prob(s, frame) for s in sample_sites(model_trace) if s["name"] not in latent]
        zero = torch.zeros((num_samples, frame.columns))
        log_q = {name: log_q_of(site, frame, cut is not None) for name, site in drawn.items() if name not in points}
        log_q, partial = _merged(log_q, fed)
        return Particles(
            log_likelihood=functools.reduce(torch.add, scored) if scored else zero,
            log_prior={name: site_log_prob(site, frame) for name, site in latent.items()},
            log_q=log_q,
            latents={name: site_value(site, frame) for name, site in drawn.items() if not site["is_observed"]},
            scale=common_scale([guide_trace, model_trace]),
            points=points,
            fixed=tuple(name for name, site in drawn.items() if not getattr(site["fn"], "has_rsample", False)),
            posteriors={name: site["fn"] for name, site in drawn.items()},
            priors={name: site["fn"] for name, site in latent.items()},
            joint=frame.data_size if frame.joint else 0,
            partial=partial,
        )


def _recording() -> bool:
    """Whether the run is being recorded, so that values may not be looked at."""
    if get_proxy_mode() is not None or torch.compiler.is_compiling():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _merged(log_q: dict[str, Tensor], fed: Mapping[str, tuple[str, ...]]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The density of an auxiliary site counted at the latent that it feeds, where that is one; and the others."""
    users = {source: [name for name, sources in fed.items() if source in sources] for source in log_q}
    moved = {source: names[0] for source, names in users.items() if len(names) == 1}
    merged = {name: value for name, value in log_q.items() if name not in moved}
    for source, name in moved.items():
        merged[name] = merged[name] + log_q[source]
    partial = {name for names in users.values() if len(names) > 1 for name in names}
    return merged, tuple(name for name in fed if name in partial)


def _stack(singles: list[Particles]) -> Particles:
    def joined(field: str) -> dict[str, Tensor]:
        return {name: torch.cat([getattr(p, field)[name] for p in singles]) for name in getattr(singles[0], field)}

    tables: Any = {field: joined(field) for field in ("log_prior", "log_q", "latents")}
    log_likelihood = torch.cat([p.log_likelihood for p in singles])
    return singles[0]._replace(posteriors={}, priors={}, log_likelihood=log_likelihood, **tables)
