"""Bounds on log p(x): functions of the particles, one number per datum, in nats.

With w_k = p(x, z_k) / q(z_k | x) and z_k ~ q(z | x),

    log p(x) = E log w + KL(q(z | x) || p(z | x)),

so the ELBO, E log w, is short of the evidence by that divergence. Averaging weights instead of log weights shrinks it.

A bound that is a function of the log weights alone is a `WeightBound`: beside its value it knows two derivatives, from
which `pyro_vae.inference.estimators` makes every gradient estimator,

    g_k = d L / d log w_k      and      c_k = g_k - d g_k / d log w_k

the coefficients of the reparameterised and of the doubly-reparameterised gradient.
Bounds under which model and guide follow different functions are in `split_bounds`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from pyro_vae._lazy import attach
from pyro_vae.options import checked
from pyro_vae.traces import Particles
from pyro_vae.words import one_of

if TYPE_CHECKING:  # bounds of two parts, which stand on these
    from pyro_vae.inference.split_bounds import cubo as cubo
    from pyro_vae.inference.split_bounds import piwae as piwae
    from pyro_vae.inference.split_bounds import wake_sleep as wake_sleep
else:
    OWN = ("ciwae", "elbo", "iwae", "map_estimate", "miwae", "reconstruction", "renyi", "vr_max")
    __getattr__, __dir__, __all__ = attach(__name__, *OWN)

Bound: TypeAlias = Callable[[Particles], Tensor]
OfWeights: TypeAlias = Callable[[Tensor], Tensor]


def named(name: str) -> Bound:
    """The bound of a name, in whatever spelling; of one with options, the function that makes it.

    Raises:
        ValueError: There is none of that name.
    Example:
        >>> named("IWAE") is iwae
        True
    """
    here = sys.modules[__name__]
    bound: Bound = getattr(here, one_of("bound", name, vars(here)["__all__"]))
    return bound


@dataclass(frozen=True, repr=False)
class WeightBound:
    """A bound that is a function of the log weights, with its derivatives in closed form.

    Attributes:
        name: Such as "renyi(0.5)".
        value: log w, (K, B), to the bound, (B,).
        gradient: log w, (K, B), to g_k, (K, B).
        path: log w, (K, B), to c_k, (K, B).
        smooth: Whether g is continuous in log w, without which c_k misses the jumps.
    """

    name: str
    value: OfWeights  # to the bound, (B,)
    gradient: OfWeights  # to g_k, (K, B)
    path: OfWeights  # to c_k, (K, B)
    smooth: bool = True  # whether g is continuous in log w, without which c_k misses the jumps

    def __call__(self, particles: Particles) -> Tensor:
        return self.value(particles.log_weight)

    def __repr__(self) -> str:
        return self.name

    @property
    def __name__(self) -> str:
        return self.name


def elbo(particles: Particles) -> Tensor:
    """Evidence lower bound, per datum.

        ELBO(x) = E_q[log p(x, z) - log q(z | x)] = E_q[log p(x | z)] - KL(q(z | x) || p(z))

    estimated by the mean over K samples.

    Args:
        particles: Log densities of K samples for B data, each (K, B).
    Returns:
        The estimate in nats, (B,).
    Raises:
        ValueError: The guide has a point site and so no density.
    Example:
        >>> one, two = torch.tensor([[-1.0], [-3.0]]), torch.tensor([[0.0], [1.0]])
        >>> elbo(Particles(one, {}, {"z": two}, {}))
        tensor([-2.5000])

    Reference: Kingma and Welling, Auto-Encoding Variational Bayes, 2014. arXiv:1312.6114
    """
    return particles.log_weight.mean(0)


def iwae(particles: Particles) -> Tensor:
    """Importance-weighted bound, per datum.

        L_K(x) = log 1/K sum_k p(x, z_k) / q(z_k | x),   z_k ~ q(z | x)

    A lower bound on log p(x) that tightens as K grows; the ELBO at K = 1.

    Args:
        particles: Log densities of K samples for B data, each (K, B).
    Returns:
        The bound in nats, (B,).
    Raises:
        ValueError: The guide has a point site and so no density.
    Example:
        >>> one = torch.tensor([[-1.0], [-1.0]])
        >>> iwae(Particles(one, {}, {"z": torch.zeros(2, 1)}, {}))
        tensor([-1.])

    Reference: Burda et al., Importance Weighted Autoencoders, 2016. arXiv:1509.00519
    """
    return _log_mean(particles.log_weight)


@checked
def renyi(alpha: float) -> WeightBound:
    """Variational Renyi bound of order alpha, per datum.

        L_alpha(x) = 1 / (1 - alpha) log 1/K sum_k w_k^(1 - alpha)

    It falls in alpha: the IWAE bound at 0, the ELBO at 1. As K grows, orders 0 < alpha < 1
    approach a number between the ELBO and log p(x), and orders below 0 one *above* log p(x);
    but the K-sample estimate is biased downwards, so that below 0 it bounds nothing.

    Args:
        alpha: The order, any finite number.
    Returns:
        The bound: particles to nats, (B,).
    Raises:
        ValueError: alpha is not finite (for minus infinity use `vr_max`).
    Example:
        >>> p = Particles(torch.tensor([[0.0], [2.0]]), {}, {}, {})
        >>> bool(elbo(p) < renyi(0.5)(p) < iwae(p) < renyi(-1.0)(p) < vr_max(p))
        True

    Reference: Li and Turner, Renyi Divergence Variational Inference, 2016. arXiv:1602.02311
    """
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be a finite number, got {alpha}. For alpha = -inf use vr_max.")
    if alpha == 1:
        return WeightBound("renyi(1)", _mean, _share, _share)
    order = 1.0 - alpha
    return WeightBound(
        f"renyi({alpha:g})", partial(_power_mean, order), partial(_normalised, order), partial(_power_path, order)
    )


def vr_max(particles: Particles) -> Tensor:
    """Largest log weight, per datum: the Renyi bound for alpha to minus infinity.

        L(x) = max_k log w_k

    It trains on the best of the K samples only, and bounds nothing (it can exceed log p(x)).

    Args:
        particles: Log densities of K samples for B data, each (K, B).
    Returns:
        The maximum in nats, (B,).
    Example:
        >>> vr_max(Particles(torch.tensor([[-1.0], [-3.0]]), {}, {}, {}))
        tensor([-1.])

    Reference: Li and Turner, Renyi Divergence Variational Inference, 2016. arXiv:1602.02311
    """
    return particles.log_weight.amax(0)


@checked
def miwae(num_groups: int) -> WeightBound:
    """Mean of M importance-weighted bounds of K / M samples each, per datum.

        L_{M, K/M}(x) = 1/M sum_m log M/K sum_{k in group m} w_k

    The IWAE bound at M = 1, the ELBO at M = K; looser than IWAE_K, with less noisy gradients of
    the guide.

    Args:
        num_groups: M, a divisor of K.
    Returns:
        The bound: particles to nats, (B,).
    Raises:
        ValueError: M < 1; on use, M does not divide K.
    Example:
        >>> p = Particles(torch.tensor([[0.0], [2.0]]), {}, {}, {})
        >>> torch.equal(miwae(2)(p), elbo(p)), torch.equal(miwae(1)(p), iwae(p))
        (True, True)

    Reference: Rainforth et al., Tighter Variational Bounds are Not Necessarily Better, 2018.
        arXiv:1802.04537
    """
    return WeightBound(
        f"miwae({num_groups})",
        partial(_grouped, num_groups, _log_mean, False),
        partial(_grouped, num_groups, partial(_normalised, 1.0), True),
        partial(_grouped, num_groups, partial(_power_path, 1.0), True),
    )


@checked
def ciwae(beta: float) -> WeightBound:
    """Convex combination of the ELBO and the importance-weighted bound, per datum.

        L(x) = beta ELBO(x) + (1 - beta) IWAE_K(x)

    Args:
        beta: Share of the ELBO, in [0, 1].
    Returns:
        The bound: particles to nats, (B,).
    Raises:
        ValueError: beta outside [0, 1].
    Example:
        >>> p = Particles(torch.tensor([[0.0], [2.0]]), {}, {}, {})
        >>> torch.equal(ciwae(0.5)(p), (elbo(p) + iwae(p)) / 2)
        True

    Reference: Rainforth et al., Tighter Variational Bounds are Not Necessarily Better, 2018.
        arXiv:1802.04537
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], got {beta}. It is the share of the ELBO.")
    return WeightBound(
        f"ciwae({beta:g})",
        partial(_mixed, beta, _mean, _log_mean),
        partial(_mixed, beta, _share, partial(_normalised, 1.0)),
        partial(_mixed, beta, _share, partial(_power_path, 1.0)),
    )


def reconstruction(particles: Particles) -> Tensor:
    """Expected reconstruction log-likelihood, per datum: E_q[log p(x | z)].

    Not a bound on log p(x): the objective of a plain autoencoder, and the first term
    of the ELBO. The only objective, with `map_estimate`, for a guide with point sites.

    Args:
        particles: Log densities of K samples for B data, each (K, B).
    Returns:
        The mean over samples in nats, (B,).
    Example:
        >>> reconstruction(Particles(torch.tensor([[-1.0], [-3.0]]), {}, {}, {}))
        tensor([-2.])
    """
    return particles.log_likelihood.mean(0)


def map_estimate(particles: Particles) -> Tensor:
    """Log joint density at the guide's samples, per datum: E_q[log p(x, z)].

    Not a bound on log p(x). With a point guide its maximum is the amortized
    maximum-a-posteriori estimate of z.

    Args:
        particles: Log densities of K samples for B data, each (K, B).
    Returns:
        The mean over samples in nats, (B,).
    Example:
        >>> prior = {"z": torch.tensor([[-2.0]])}
        >>> map_estimate(Particles(torch.tensor([[-1.0]]), prior, {}, {}))
        tensor([-3.])
    """
    return particles.log_joint.mean(0)


def _mean(log_weight: Tensor) -> Tensor:
    return log_weight.mean(0)


def _share(log_weight: Tensor) -> Tensor:
    return torch.full_like(log_weight, 1 / len(log_weight))


def _log_mean(log_weight: Tensor) -> Tensor:
    return torch.logsumexp(log_weight, 0) - math.log(len(log_weight))


def _power_mean(order: float, log_weight: Tensor) -> Tensor:
    if order == 1:
        return _log_mean(log_weight)
    # Measured from the largest power, so that neither a small nor a large order loses digits.
    top = (log_weight.amax(0) if order > 0 else log_weight.amin(0)).detach()
    return top + torch.expm1(order * (log_weight - top)).mean(0).log1p() / order


def _normalised(order: float, log_weight: Tensor) -> Tensor:
    return torch.softmax(order * log_weight, 0)


def _power_path(order: float, log_weight: Tensor) -> Tensor:
    share = _normalised(order, log_weight)
    return share - order * (share - share.square())


def _largest(log_weight: Tensor) -> Tensor:
    return torch.zeros_like(log_weight).scatter(0, log_weight.argmax(0, keepdim=True), 1.0)


def _grouped(num_groups: int, each: OfWeights, per_sample: bool, log_weight: Tensor) -> Tensor:
    size = len(log_weight)
    if size % num_groups:
        raise ValueError(
            f"got num_samples={size} and num_groups={num_groups}, wanted groups of equal size. "
            f"Take a multiple of {num_groups} samples."
        )
    grouped = log_weight.reshape(num_groups, size // num_groups, -1).transpose(0, 1)  # samples first, then groups
    values = each(grouped)
    if per_sample:
        return values.transpose(0, 1).reshape(log_weight.shape) / num_groups
    return values.mean(0)


def _mixed(beta: float, one: OfWeights, other: OfWeights, log_weight: Tensor) -> Tensor:
    return beta * one(log_weight) + (1 - beta) * other(log_weight)


ELBO = WeightBound("elbo", _mean, _share, _share)
IWAE = WeightBound("iwae", _log_mean, partial(_normalised, 1.0), partial(_power_path, 1.0))
VR_MAX = WeightBound("vr_max", partial(torch.amax, dim=0), _largest, _largest, smooth=False)
