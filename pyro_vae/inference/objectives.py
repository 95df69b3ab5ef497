"""Objectives: a bound turned into a loss that ``pyro.infer.SVI`` minimises."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

from pyro_vae.evaluation import evaluating
from pyro_vae.inference.batches import Batches, NoiseOfData, one_draw
from pyro_vae.inference.bounds import Bound, elbo, named
from pyro_vae.inference.estimators import advantage, coefficients, needs_cut, needs_path, refusal, weight_bound
from pyro_vae.inference.regularizers import Regularizer, free_bits, mmd, total_correlation
from pyro_vae.inference.split_bounds import SplitBound, sleep_phase
from pyro_vae.options import checked, number, of_pair
from pyro_vae.parameters import device_of
from pyro_vae.protocols import closed_form_sites
from pyro_vae.traces import Cut, Particles, Program, draw, nesting_of

_EXAMPLES = ("renyi(0.5)", "miwae(8)", "ciwae(0.5)", "piwae(8)", "cubo(2)", "wake_sleep()")  # of what makes bounds


class Objective(ELBO):
    """Minus a bound, summed over data, as a loss for ``pyro.infer.SVI``.

        loss = - scale * sum_x bound(particles(x)) + scale * B * sum of regularizers

    Its value is always that; its gradient is that of the estimator (see
    `pyro_vae.inference.estimators`). With beta the differentiated ELBO is
    E_q[log p(x | z) - beta (log q(z | x) - log p(z))]; the reported one stays that of
    beta = 1. B is the number of data. An upper bound (`cubo`) is minimised, by the guide
    alone: then the loss is plus the bound.

    Args:
        bound: Particles to one number per datum: `elbo`, `iwae`, `renyi(0.5)`, ..., or a name such as "iwae".
        num_samples: K, drawn in one pass where the pair broadcasts.
        estimator: "reparameterized" (the total derivative), "sticking-the-landing",
            "doubly-reparameterized", or "score-function" (for samples that cannot be
            reparameterised; with a leave-one-out baseline, for which K must be at least 2).
        beta: Weight of log q - log p(z), for the `elbo` only.
        regularizers: Functions of (particles, model, guide), each to one number in nats
            per datum that is added to the loss, and not to the bound: `mmd(10.0)`, ... The
            densities that they see are never tempered.
        max_plate_nesting: Depth of the pair's plates; guessed at the first call with
            K > 1 when not given (by one run that leaves the random state alone).
    Attributes:
        last_bound: The bound of the most recent call in nats, summed over data, with
            the scale and at beta = 1; a tensor without gradient.
    Raises:
        ValueError: K < 1; a beta that is negative or no number, or not 1 with another bound; a
            bound and an estimator that do not go together; a guide site that the estimator needs reparameterised, or
            able to score a sample, and that is not; all that `particles` refuses.
    Example:
        >>> from pyro_vae.inference.bounds import iwae
        >>> Objective(iwae, num_samples=50)
        Objective(iwae, num_samples=50)
        >>> Objective(iwae, num_samples=50, estimator="doubly-reparameterized")
        Objective(iwae, num_samples=50, estimator='doubly-reparameterized')
    """

    @checked
    def __init__(
        self,
        bound: Bound | str = elbo,
        num_samples: int = 1,
        *,
        estimator: str = "reparameterized",
        beta: float | Tensor = 1.0,
        regularizers: Sequence[Regularizer] = (),
        max_plate_nesting: int | None = None,
    ) -> None:
        number("beta", beta)
        if not float(beta) >= 0 or math.isinf(float(beta)):
            raise ValueError(
                f"beta must be a finite number that is not negative, got {float(beta):g}: it is the weight of log q - "
                "log p(z), which a negative one would drive apart. Pass 1 for the ELBO, below 1 for less of it."
            )
        bound = named(bound) if isinstance(bound, str) else bound
        for name, example in ((each.partition("(")[0], each) for each in _EXAMPLES):
            if bound is named(name):
                raise ValueError(f"got the function {name}, wanted what it returns, such as {example}.")
        reason = refusal(bound, estimator, num_samples)
        if reason is not None:
            raise ValueError(reason)
        if not _is_one(beta) and bound is not elbo:
            raise ValueError(_beside_elbo(bound, beta))
        factories: tuple[object, ...] = (mmd, free_bits, total_correlation)
        for regularizer in regularizers:
            if not callable(regularizer) or regularizer in factories:
                name = getattr(regularizer, "__name__", repr(regularizer))
                raise ValueError(
                    f"got {name} among the regularizers, wanted functions of (particles, model, guide): what "
                    "mmd(10.0), free_bits(0.5) or total_correlation(5.0) return."
                )
        super().__init__(
            num_particles=num_samples,
            max_plate_nesting=math.inf if max_plate_nesting is None else max_plate_nesting,
            vectorize_particles=False,
        )
        self.bound = bound
        self.num_samples = num_samples
        self.estimator = estimator
        self.beta: float | Tensor = beta
        self.regularizers = tuple(regularizers)
        self.last_bound: Tensor | None = None
        self._of_weights = weight_bound(bound, num_samples) if needs_cut(bound, estimator) else None

    def __repr__(self) -> str:
        name = getattr(self.bound, "__name__", repr(self.bound))
        estimator = "" if self.estimator == "reparameterized" else f", estimator={self.estimator!r}"
        beta = "" if _is_one(self.beta) else f", beta={self.beta:g}"
        extra = "" if not self.regularizers else f", regularizers={list(self.regularizers)!r}"
        return f"Objective({name}, num_samples={self.num_samples}{estimator}{beta}{extra})"

    @property
    def upper(self) -> bool:
        """Whether the bound is one from above, so that the loss is plus the bound."""
        return isinstance(self.bound, SplitBound) and self.bound.upper

    def particles(self, model: Program, guide: Program, *args: Any, cut: Cut | None = None, **kwargs: Any) -> Particles:
        """Draw the K particles that the bound is computed from."""
        if self.num_samples > 1 and self.max_plate_nesting == math.inf:
            self.max_plate_nesting = nesting_of(model, guide, args, kwargs)
        nesting = None if self.max_plate_nesting == math.inf else int(self.max_plate_nesting)
        return draw(model, guide, args, kwargs, self.num_samples, max_plate_nesting=nesting, cut=cut)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, with gradients to the parameters of model and guide."""
        cut = Cut() if torch.is_grad_enabled() and needs_cut(self.bound, self.estimator) else None
        particles = self.particles(model, guide, *args, cut=cut, **kwargs)
        if torch.is_grad_enabled() and particles.fixed:
            self._refuse_fixed(particles.fixed[0])
        values = self.bound(particles)
        self.last_bound = particles.scale * values.detach().sum()
        if cut is not None and particles.points:
            raise ValueError(
                f"guide site {particles.points[0]!r} is a point (Delta) without a density, so estimator="
                f"{self.estimator!r} has nothing to score. Use estimator='reparameterized'."
            )
        log_q = particles.log_likelihood
        if cut is not None:
            log_q = functools.reduce(torch.add, particles.log_q.values(), log_q.new_zeros(()))
        plain = particles
        if not _is_one(self.beta):
            if self.bound is not elbo:
                raise ValueError(_beside_elbo(self.bound, self.beta))
            particles = _tempered(particles, self.beta)
            values = self.bound(particles)
        sign = particles.scale if self.upper else -particles.scale
        loss = sign * values.sum()
        weight = plain.scale * plain.num_data
        extra = sum((weight * r(plain, model, guide) for r in self.regularizers), loss.new_zeros(()))
        if cut is None:
            return loss + extra if self.regularizers else loss
        surrogate = self._surrogate(particles, log_q, cut, sign, extra)
        if isinstance(self.bound, SplitBound) and self.bound.sleep:
            asleep = sleep_phase(model, guide, *args, **kwargs).sum()
            surrogate = surrogate - self.bound.sleep * particles.scale * asleep
        return surrogate + (loss + extra - surrogate).detach()

    def _surrogate(self, particles: Particles, log_q: Tensor, cut: Cut, sign: float, extra: Tensor) -> Tensor:
        """A scalar with the estimator's gradient, made of densities that are functions of cut samples."""
        known = self._of_weights
        if known is None:  # the score function of what depends on more than the weights
            direct = self.bound(particles).sum() + (advantage(self.bound, particles) * log_q).sum()
            return sign * direct + extra + cut.pathwise(extra)
        log_weight = particles.log_weight
        joint, path, score = coefficients(known, self.estimator, log_weight, self.beta)
        wake = 1 - known.sleep if isinstance(known, SplitBound) else 1.0
        direct, through = extra, extra
        if joint is not None:
            direct = direct + sign * (joint * particles.log_joint).sum()
        if score is not None:
            direct = direct + sign * wake * (score * log_q).sum()
        if path is not None:
            through = through + sign * wake * (path * log_weight).sum()
        return direct + cut.pathwise(through)

    def _refuse_fixed(self, site: str) -> None:
        if needs_path(self.bound, self.estimator):
            raise ValueError(
                f"guide site {site!r} has no reparameterised sampler, so its gradient along the sample does not exist. "
                "Use estimator='score-function', Pyro's Trace_ELBO or TraceGraph_ELBO (score function too), or "
                "TraceEnum_ELBO, which sums a discrete site out."
            )
        if self.regularizers:
            raise ValueError(
                f"guide site {site!r} has no reparameterised sampler, and a regularizer is differentiated along the "
                "samples. Leave regularizers empty."
            )

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss as a number."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss as a number; its gradients are added to the parameters' ``.grad``."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    def _get_trace(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("Objective reads its particles through pyro_vae.traces.")


def _beside_elbo(bound: Bound, beta: float | Tensor) -> str:
    name = getattr(bound, "__name__", repr(bound))
    return f"beta={float(beta):g} tempers the elbo only, got the bound {name}. Leave beta at 1."


def _is_one(beta: float | Tensor) -> bool:
    return not isinstance(beta, Tensor) and beta == 1


def _tempered(particles: Particles, beta: float | Tensor) -> Particles:
    """Prior and posterior to the power of beta."""
    return particles._replace(
        log_prior={name: beta * value for name, value in particles.log_prior.items()},
        log_q={name: beta * value for name, value in particles.log_q.items()},
    )


@of_pair
def mean_bound(
    model: Program,
    guide: Program,
    data: Any,
    bound: Bound = elbo,
    *,
    num_samples: int = 1,
    batch_size: int = 500,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> float:
    """A bound averaged over data, at fixed noise and in evaluation mode, in nats per datum.

    Data are as for `fit`, or `Batches` of them, and `batch_size` of them are scored at a time; the seed is that of the
    noise, so that epochs are compared on the same draws. Batches go where the modules are, if no device is given.
    """
    objective = Objective(bound, num_samples)
    place = device_of(model, guide) if device is None else device
    total, count = 0.0, 0
    with evaluating(model, guide, seed=seed):
        batches = data
        if not isinstance(data, Batches):
            batches = Batches(one_draw(data, seed), batch_size, place, shuffle=False, programs=(model, guide))
        for batch in NoiseOfData(seed).passed(batches):
            particles = objective.particles(model, guide, *batch)
            total += bound(particles).double().sum().item()
            count += particles.num_data
    return total / count


class ClosedForm(TraceMeanField_ELBO):
    """Pyro's ``TraceMeanField_ELBO`` at the sites that are named, its ``Trace_ELBO`` at all others.

    `fit` takes it by default where a guide says so (`closed_form_sites`), as the zoo's
    `Hierarchical` does. Where a pair of distributions has no closed form, the sample stays; a guide
    with a site that is not reparameterised gets Pyro's ``Trace_ELBO`` throughout.

    ``TraceMeanField_ELBO`` replaces log q(z_l) - log p(z_l) by its expectation over z_l. That leaves the ELBO unbiased
    only where p(z_l | ...) does not depend on what the guide drew *from* z_l: for a guide that climbs from the data,
    q(z_1 | x) q(z_2 | z_1), under a model that comes down, p(z_2) p(z_1 | z_2), at its last layer only:

        E_q[log q(z_2 | z_1) - log p(z_2)] = E_q(z_1)[KL(q(z_2 | z_1) || p(z_2))].

    Example:
        >>> ClosedForm(["z2"]).sites
        ('z2',)
    """

    def __init__(self, sites: Collection[str], **options: Any) -> None:
        super().__init__(**options)
        self.sites = tuple(sites)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        # Pyro's own warns of a guide in another order than the model's, wherever it integrates.
        return Trace_ELBO._get_trace(self, model, guide, args, kwargs)

    def _differentiable_loss_particle(self, model_trace: Any, guide_trace: Any) -> Any:
        drawn = [site for site in guide_trace.nodes.values() if site["type"] == "sample" and not site["is_observed"]]
        if not all(getattr(site["fn"], "has_rsample", True) for site in drawn):
            return Trace_ELBO._differentiable_loss_particle(self, model_trace, guide_trace)
        sampled = [site for site in drawn if site["name"] not in self.sites]
        kept = [site["fn"] for site in sampled]
        for site in sampled:
            site["fn"] = _NoClosedForm()
        try:
            return super()._differentiable_loss_particle(model_trace, guide_trace)
        finally:
            for site, fn in zip(sampled, kept, strict=True):
                site["fn"] = fn


class _NoClosedForm:
    """What has no divergence from anything, so that Pyro takes the sample's."""

    has_rsample = True


def default_loss(guide: Any) -> Any:
    """The loss of a fit to which none was given."""
    sites = closed_form_sites(guide)
    return ClosedForm(sites) if sites else Trace_ELBO()
