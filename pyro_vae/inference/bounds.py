"""Bounds on log p(x): functions of the particles, one number per datum, in nats.

With w_k = p(x, z_k) / q(z_k | x) and z_k ~ q(z | x),

    log p(x) = E log w + KL(q(z | x) || p(z | x)),

so the ELBO, E log w, is short of the evidence by exactly the divergence between the
guide and the true posterior. Averaging weights instead of log weights shrinks it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from pyro_vae.traces import Particles

Bound: TypeAlias = Callable[[Particles], Tensor]


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
    log_weight = particles.log_weight
    return torch.logsumexp(log_weight, 0) - math.log(len(log_weight))


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

    Not a bound on log p(x). With a point guide its maximum is the amortised
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
