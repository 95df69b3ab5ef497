"""Estimates of log p(x) and of the ELBO, which never travel without their errors; and which data are strange.

With w_k = p(x, z_k) / q(z_k | x), the mean weight is an unbiased estimate of p(x); its logarithm is biased downwards
by about Var(w) / (2 K p(x)^2), which the jackknife measures. Two errors are told apart: that of the Monte Carlo sum for
these data, and that of these data for the population they come from.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_vae.inference.trees import joined
from pyro_vae.judging.densities import Pair
from pyro_vae.judging.evidence import Curve, Estimate
from pyro_vae.judging.grids import Quadrature, cost, least_points, on_grids, served
from pyro_vae.judging.results import Mean, Measured, averaged, one_of
from pyro_vae.judging.sweeps import Sweep, sweep
from pyro_vae.judging.weights import Scored, at_fewer, fewer
from pyro_vae.options import of_pair
from pyro_vae.traces import Program

# Points of a grid for each sample of an importance-sampling estimate that "auto" affords.
_POINTS_PER_SAMPLE = 64


@dataclass(frozen=True)
class ElboTerms(Measured):
    """The ELBO and its two terms, averaged over data, in nats: value = reconstruction - kl.

    Attributes:
        value, mc_stderr, data_stderr, num_samples: Of E_q[log p(x, z) - log q(z | x)], as in `Measured`.
        pointwise: The ELBO per datum, (N,); where the guide has one density for all data, (1,).
        reconstruction: E_q[log p(x | z)].
        kl: KL(q(z | x) || p(z)), as E_q[log q(z | x) - log p(z)].
    """

    reconstruction: float
    kl: float

    def __str__(self) -> str:
        return f"ELBO = {self.with_errors} = reconstruction {self.reconstruction:.2f} - KL {self.kl:.2f}"


@dataclass(frozen=True)
class RateDistortion(Measured):
    """The ELBO and its two parts with their errors, averaged over data, in nats: value = -(rate + distortion).

    Attributes:
        value, mc_stderr, data_stderr, pointwise, num_samples: Of the ELBO, as in `Measured`.
        rate: R = E KL(q(z | x) || p(z)).
        distortion: D = -E log p(x | z).
    """

    rate: Mean
    distortion: Mean

    def __str__(self) -> str:
        over = f"{len(self.pointwise)} data, {self.num_samples} samples each"
        return f"rate {self.rate.with_errors}, distortion {self.distortion.with_errors}, {over}"


@of_pair
def log_likelihood(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_samples: int = 5000,
    method: str = "auto",
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    compile: bool | str = "auto",
) -> Estimate:
    """Estimate log p(x) by importance sampling from the guide, or by quadrature where that serves better.

        log p(x) ~ log 1/K sum_k p(x, z_k) / q(z_k | x),   z_k ~ q(z | x)

    Data and samples go through in chunks, so that memory is bounded: some tens of megabytes beside the data.

    Where k-hat says that the weights miss mass of the posterior, so that their estimate is no more than a lower bound
    (`kind_of`), and there are at most three latent dimensions, log p(x) is an integral that a grid does to many digits
    (`quadrature`). "auto" takes it there if the grids of all data have converged, none of them lies below what
    importance sampling found, and a grid has at most 64 points for each sample; see `Estimate.method`.

    Args:
        model: A Pyro program for p(x, z).
        guide: A Pyro program for q(z | x).
        data: As for `fit`: a tensor, a tuple of tensors, a `Split`, batches.
        num_samples: K.
        method: "auto", "importance" or "quadrature".
        seed: Seed of the samples, and of a binarisation drawn on the way: an unfrozen split is scored as
            ``split.frozen(seed)``, by all functions of one seed. None goes on with torch's random state.
        device: Where it is computed: data and modules go there for that time. Where the modules are when not given.
        progress: Show a bar; None shows it on a terminal only.
        compile: "auto" captures the computation of a chunk (see `pyro_vae.inference.replays`) where there are
            600 or more of them, and hands it to Inductor where that pays; True does so at once, False runs the
            programs for every chunk. The samples are the same, and the numbers to rounding.
    Returns:
        The estimate with its errors and diagnostics; `advice` says which K is enough.
    Raises:
        ValueError: K < 1, a guide without density, and all that `particles` refuses; by quadrature, more than three
            latent dimensions, and grids that have not converged.
    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_vae import Guide, Model
        >>> model = Model(lambda: dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0))
        >>> guide = Guide(lambda x: dist.Normal(x / 2, 0.5**0.5))
        >>> print(log_likelihood(model, guide, torch.zeros(3), num_samples=100))
        log p(x) = -1.27 ± 0.00 (Monte Carlo; data ± 0.00) nats, k̂ ok for 100.0 %
        >>> print(log_likelihood(model, guide, torch.zeros(3), method="quadrature"))
        log p(x) = -1.27 nats (data ± 0.00), by quadrature

    References: Burda et al., Importance Weighted Autoencoders, 2016. arXiv:1509.00519; Vehtari et
        al., Pareto Smoothed Importance Sampling, 2024. arXiv:1507.02646
    """
    one_of(("auto", "importance", "quadrature"), method=method)
    options: dict[str, Any] = {"seed": seed, "device": device, "progress": progress}
    if method == "quadrature":
        exact = _by_quadrature(model, guide, data, None, **options)
        assert exact is not None
        return exact
    steps = fewer(num_samples)
    with sweep(model, guide, data=data, title="log p(x)", **options) as run:
        table = run.table(num_samples, compile)

        def weighed(batch: tuple[Any, ...]) -> tuple[Scored, Tensor, bool]:
            log_weight, _, joint = table(batch)
            sums = at_fewer(log_weight.double().cpu(), steps) / torch.tensor([[joint], [joint**2]])
            return Scored.of(log_weight, joint), sums, joint == 1

        parts, sums, alone = zip(*run.each(weighed), strict=True)
    scored: Scored = joined(parts)
    totals, single = torch.stack(sums).sum(0), all(alone)
    _warn_not_finite(scored.log_p, "log p(x)")
    count = len(scored.log_p)
    found = Estimate(
        **averaged(scored.log_p, scored.log_p_variance),
        bias=scored.bias.mean().item(),
        ess=scored.ess,
        pareto_k=scored.pareto_k,
        num_samples=num_samples,
        smoothed=scored.smoothed,
        smoothed_stderr=scored.smoothed_variance.sum().sqrt().item() / count,
        curve=Curve(tuple(steps), totals[0] / count, totals[1].sqrt() / count),
    )
    if method == "importance" or found.kind != "lower bound" or not single or seed is None:
        return found
    return _by_quadrature(model, guide, data, (scored, num_samples), **options) or found


def _by_quadrature(
    model: Program, guide: Program, data: Any, beside: tuple[Scored, int] | None, **options: Any
) -> Estimate | None:
    """The estimate on grids; None where a grid does not serve and there is another estimate to take: K weights."""
    with sweep(model, guide, data=data, batch_size=50, validate=False, title="quadrature", **options) as run:
        dims = served(run.programs, run.first)
        if beside is not None and (dims is None or cost(dims) > _POINTS_PER_SAMPLE * beside[1]):
            return None
        failed = False

        def integrated(batch: tuple[Any, ...]) -> Quadrature | None:
            nonlocal failed
            if failed:  # one datum that a grid does not serve is enough
                return None
            found = on_grids(Pair(model, guide, batch))
            if beside is not None:
                rows = slice(run.start, run.start + len(found.error))
                log_p, error = beside[0].log_p[rows], beside[0].log_p_variance[rows].sqrt()
                below = found.log_evidence.cpu() < log_p - 4 * error - 1e-3
                failed = bool(below.any()) or not bool(found.converged.all())
            return None if failed else found

        parts = run.each(integrated)
    if any(part is None for part in parts):
        return None
    grids: Quadrature = joined(parts)
    count, done = grids.mean.shape[1], len(grids.error)
    stuck = (~grids.converged).nonzero().flatten().tolist()
    if stuck:
        raise ValueError(
            f"the grids of {len(stuck)} of {done} data have not converged (first: {stuck[:5]}): mass at the rim up to "
            f"{grids.rim.max():.2g}, outside {grids.outside.max():.2g}, error {grids.error.max():.2g} nats. Use "
            "method='importance', or quadrature(model, guide, data, num_points=..., width=...) to look closer."
        )
    points = least_points(count)
    return Estimate(
        **averaged(grids.log_evidence, grids.error.square()),
        bias=math.nan,
        ess=torch.full_like(grids.error, points),
        pareto_k=torch.full_like(grids.error, math.nan),
        num_samples=points,
        method="quadrature",
    )


@of_pair
def elbo_terms(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_samples: int = 100,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    compile: bool | str = "auto",
) -> ElboTerms:
    """Estimate the ELBO and split it into reconstruction and KL.

        ELBO(x) = E_q[log p(x | z)] - KL(q(z | x) || p(z))

    Args:
        num_samples: K, samples averaged per datum.
        model, guide, data, seed, device, progress, compile: As for `log_likelihood`.
    Returns:
        The terms with their errors.
    Raises:
        ValueError: A guide without density, and all that `particles` refuses.
    """
    with sweep(model, guide, data=data, seed=seed, device=device, progress=progress, title="ELBO") as run:
        bound, likelihood, _ = moments(run, num_samples, compile)
    _warn_not_finite(bound.pointwise, "the ELBO")
    kl = (likelihood.pointwise - bound.pointwise).mean().item()
    return ElboTerms(**bound.measured(), reconstruction=likelihood.value, kl=kl)


@of_pair
def rate_distortion(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_samples: int = 100,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    compile: bool | str = "auto",
) -> RateDistortion:
    """Rate and distortion of a pair.

    Args:
        num_samples: K, samples averaged per datum.
        model, guide, data, seed, device, progress, compile: As for `log_likelihood`.
    Returns:
        Both with their errors.

    Reference: Alemi et al., Fixing a broken ELBO, 2018. arXiv:1711.00464
    """
    with sweep(model, guide, data=data, seed=seed, device=device, progress=progress, title="rate") as run:
        bound, likelihood, rate = moments(run, num_samples, compile)
    distortion = replace(likelihood, value=-likelihood.value, pointwise=-likelihood.pointwise)
    return RateDistortion(**bound.measured(), rate=rate, distortion=distortion)


def moments(run: Sweep, num_samples: int, compile: bool | str = "auto") -> tuple[Mean, Mean, Mean]:
    """The ELBO, its reconstruction and its KL over the data of a sweep."""
    table = run.table(num_samples, compile)

    def averages(batch: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        *tables, joint = table(batch)
        weight, likelihood = (each.double().cpu() / joint for each in tables)
        both = torch.stack([weight, likelihood, likelihood - weight])  # (3, K, B)
        variance = both.var(1) / num_samples if num_samples > 1 else torch.full_like(both[:, 0], math.nan)
        return both.mean(1), variance

    means, variances = zip(*run.each(averages), strict=True)
    columns = zip(torch.cat(means, 1), torch.cat(variances, 1), strict=True)
    bound, reconstruction, kl = (Mean.of(mean, variance, num_samples) for mean, variance in columns)
    return bound, reconstruction, kl


def _warn_not_finite(pointwise: Tensor, what: str) -> None:
    """Which rows of an estimate are no number, and what to look at."""
    bad = (~torch.isfinite(pointwise)).nonzero().flatten()
    if len(bad):
        rows = ", ".join(str(int(row)) for row in bad[:3]) + (", ..." if len(bad) > 3 else "")
        warnings.warn(
            f"{what} is not finite for {len(bad)} of {len(pointwise)} data (row {rows}): a density there has left the "
            "range of its floats, or a scale has become 0. Look at these rows, scale the data, or take float64.",
            stacklevel=4,
        )
