"""Regularizers: what is added to the training loss, and is no part of any bound.

Each is a function of (particles, model, guide) to one number in nats per datum, which an `Objective` multiplies by the
number of data (and their scale, under subsampling). They are differentiated along the samples whatever the estimator of
the bound. Of the aggregate q(z) = 1/N sum_x q(z | x) the minibatch stands for all data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pyro_vae.options import checked
from pyro_vae.sites import factors, kind
from pyro_vae.traces import Particles, Program

Regularizer: TypeAlias = Callable[[Particles, Program, Program], Tensor]
Kernel: TypeAlias = Callable[[Tensor, int], Tensor]

_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def imq(squared_distance: Tensor, dim: int) -> Tensor:
    """Inverse multiquadric kernel, mean over scales s of 2 D s / (2 D s + d^2).

    Its heavy tails give a gradient to samples far from the prior, where a Gaussian kernel is flat.

    Example:
        >>> imq(torch.zeros(1), 3)
        tensor([1.])

    Reference: Tolstikhin et al., Wasserstein Auto-Encoders, 2018. arXiv:1711.01558
    """
    return torch.stack([2 * dim * s / (2 * dim * s + squared_distance) for s in _SCALES]).mean(0)


def rbf(squared_distance: Tensor, dim: int) -> Tensor:
    """Gaussian kernel, mean over scales s of exp(-d^2 / (2 D s)).

    Example:
        >>> rbf(torch.zeros(1), 3)
        tensor([1.])
    """
    return torch.stack([torch.exp(-squared_distance / (2 * dim * s)) for s in _SCALES]).mean(0)


KERNELS: dict[str, Kernel] = {"imq": imq, "rbf": rbf}


@dataclass(frozen=True)
class MMD:
    """As made by `mmd`."""

    weight: float
    kernel: str | Kernel
    site: str | None

    def __call__(self, particles: Particles, model: Program, guide: Program) -> Tensor:
        site, _ = _site(particles, self.site, "mmd")
        with torch.no_grad():
            drawn = particles.priors[site].sample()
        drawn = drawn[0] if len(particles.log_likelihood) > 1 else drawn
        z, drawn = particles.latents[site][0].flatten(1), drawn.flatten(1)
        size, dim = z.shape
        if size < 2:  # one datum, such as the last of an epoch, has no pairs
            return z.new_zeros(())
        kernel = KERNELS[self.kernel] if isinstance(self.kernel, str) else self.kernel
        off = 1 - torch.eye(size, dtype=z.dtype, device=z.device)
        within = (kernel(_squared(z, z), dim) * off).sum() + (kernel(_squared(drawn, drawn), dim) * off).sum()
        return self.weight * (within / (size * (size - 1)) - 2 * kernel(_squared(z, drawn), dim).mean())


@checked
def mmd(weight: float, kernel: str | Kernel = "imq", site: str | None = None) -> Regularizer:
    """Maximum mean discrepancy between the batch's posterior samples and the prior, squared.

        MMD^2 = E k(z, z') + E k(y, y') - 2 E k(z, y),   z, z' ~ q(z),   y, y' ~ p(z)

    by the unbiased U-statistic, which can be negative. z is the first sample for each datum; the
    gradient pulls the guide towards the prior, not the prior towards the guide. With
    beta = 1 - alpha it makes the InfoVAE objective.

    Args:
        weight: Nats per datum for one unit of squared discrepancy (kernels are 1 at distance 0).
        kernel: "imq", "rbf" (both over several scales), or a function of (squared distances, D).
        site: The latent site; the only one when not given.
    Returns:
        The regularizer.
    Raises:
        ValueError: A negative weight or an unknown kernel; on use, several sites and none named.
    Example:
        >>> mmd(10.0)
        MMD(weight=10.0, kernel='imq', site=None)

    References: Zhao et al., InfoVAE, 2017. arXiv:1706.02262; Gretton et al., A Kernel
        Two-Sample Test, 2012.
    """
    _check_weight("mmd", weight)
    if isinstance(kernel, str) and kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}, wanted one of {', '.join(KERNELS)} or a function.")
    return MMD(float(weight), kernel, site)


@dataclass(frozen=True)
class TotalCorrelation:
    """As made by `total_correlation`."""

    weight: float
    site: str | None

    def __call__(self, particles: Particles, model: Program, guide: Program) -> Tensor:
        site, posterior = _site(particles, self.site, "total_correlation")
        marginal = _factors(posterior, f"guide site {site!r}", "total_correlation")
        z = particles.latents[site]  # (K, B, D)
        if len(particles.log_likelihood) == 1:
            pairs = marginal.log_prob(z[0].unsqueeze(1)).unsqueeze(1)  # (i, 1, j, D)
        else:
            pairs = marginal.log_prob(z.transpose(0, 1).unsqueeze(2))  # (i, K, j, D)
        size = len(pairs)
        joint = torch.logsumexp(pairs.sum(-1), -1) - math.log(size)
        return self.weight * (joint - (torch.logsumexp(pairs, -2) - math.log(size)).sum(-1)).mean()


@checked
def total_correlation(weight: float, site: str | None = None) -> Regularizer:
    """Total correlation of the aggregate posterior, by minibatch weighting.

        TC = KL(q(z) || prod_d q_d(z_d)),   q(z) ~ 1/B sum_j q(z | x_j)

    With weight beta - 1 it makes the beta-TCVAE objective. (The paper divides by the size N of the
    data set too, which shifts the value by a constant and not the gradient.) It needs
    log q(z_i | x_j) for all pairs and each dimension, so that q(z | x) must be factorised.

    Args:
        weight: Of one nat of total correlation, per datum.
        site: The latent site; the only one when not given.
    Returns:
        The regularizer.
    Raises:
        ValueError: A negative weight; on use, a posterior that is not factorised, or several
            sites and none named.
    Example:
        >>> total_correlation(5.0)
        TotalCorrelation(weight=5.0, site=None)

    Reference: Chen et al., Isolating Sources of Disentanglement in VAEs, 2018. arXiv:1802.04942
    """
    _check_weight("total_correlation", weight)
    return TotalCorrelation(float(weight), site)


@dataclass(frozen=True)
class FreeBits:
    """As made by `free_bits`."""

    nats: float
    per: str

    def __call__(self, particles: Particles, model: Program, guide: Program) -> Tensor:
        total = particles.log_likelihood.new_zeros(())
        for site, log_prior in particles.log_prior.items():
            if site in particles.partial:
                raise ValueError(
                    f"free_bits is about the divergence of each site, and the density of guide site {site!r} lies at "
                    "an auxiliary site that others share. Use a guide with a density for each site, such as AutoNormal."
                )
            if self.per == "site":
                divergence = (particles.log_q[site] - log_prior).mean()
            else:
                value = particles.latents[site]
                value = value if len(particles.log_likelihood) > 1 else value[0]
                _site(particles, site, "free_bits")
                q = _factors(particles.posteriors[site], f"guide site {site!r}", "free_bits(per='dimension')")
                p = _factors(particles.priors[site], f"the prior of site {site!r}", "free_bits(per='dimension')")
                rate = q.log_prob(value) - p.log_prob(value)
                divergence = rate.reshape(-1, rate.shape[-1]).mean(0)
            total = total + (self.nats - divergence).relu().sum()
        return total


@checked
def free_bits(nats: float, per: str = "site") -> Regularizer:
    """No reward for a divergence below a given number of nats.

        sum_j max(lambda, KL_j) - KL_j,   KL_j = mean over the batch of log q(z_j | x) - log p(z_j)

    over sites or over dimensions j. Added to minus the ELBO, it turns each KL_j into
    max(lambda, KL_j), so that a latent below lambda is not pushed further towards the prior. Beside
    a tempered divergence beta KL_j it adds the same: with beta < 1 (a warm-up) a latent below lambda
    is pulled up to it, with beta > 1 what is left pushes on at a rate of beta - 1.
    The divergences are estimated by the samples of the ELBO itself, so that their gradients cancel exactly.

    Args:
        nats: lambda, per site or per dimension.
        per: "site" or "dimension" (for a factorised posterior and prior).
    Returns:
        The regularizer.
    Raises:
        ValueError: A negative number of nats; another `per`; on use, distributions that are not factorised.
    Example:
        >>> free_bits(0.1, per="dimension")
        FreeBits(nats=0.1, per='dimension')

    Reference: Kingma et al., Improving Variational Inference with Inverse Autoregressive Flow, 2016.
        arXiv:1606.04934
    """
    _check_weight("free_bits", nats)
    if per not in ("site", "dimension"):
        raise ValueError(f"got per={per!r}, wanted 'site' or 'dimension'.")
    return FreeBits(float(nats), per)


def _check_weight(name: str, weight: float) -> None:
    if not weight >= 0:
        raise ValueError(f"the weight of {name} must not be negative, got {weight}.")


def _site(particles: Particles, site: str | None, name: str) -> tuple[str, Any]:
    """A latent site and the distribution that the guide drew it from."""
    if not particles.posteriors:
        raise ValueError(
            f"{name} needs all samples from one pass, but this pair does not broadcast over a leading dimension. "
            "Take num_samples=1, or write networks and programs for (..., D) instead of (B, D)."
        )
    latent = list(particles.priors)
    if site is None and len(latent) != 1:
        raise ValueError(f"the model has the latent sites {latent}: say which {name} is about, with site=....")
    site = latent[0] if site is None else site
    if site not in particles.priors:
        raise ValueError(f"{name} is about the site {site!r}, but the model has the latent sites {latent}.")
    return site, particles.posteriors[site]


def _factors(distribution: Any, which: str, name: str) -> Any:
    """The distribution of the dimensions of a factorised one, batch_shape (..., D)."""
    base = factors(distribution)
    if base is None or len(distribution.event_shape) != 1:
        raise ValueError(
            f"{name} needs a factorised distribution, and {which} is {kind(distribution)} with event_shape "
            f"{tuple(distribution.event_shape)}. Use a posterior such as DiagonalNormal (and a prior such as "
            "StandardNormal), or leave this regularizer out."
        )
    return base


def _squared(one: Tensor, other: Tensor) -> Tensor:
    return (one.unsqueeze(1) - other.unsqueeze(0)).square().sum(-1)
