"""A posterior on the sphere."""

from __future__ import annotations

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae.parts.distributions import spherical
from pyro_vae.parts.posteriors.amortized import Amortized


class VonMisesFisher(Amortized):
    """q(z | x) = C_D(k(x)) exp(k(x) mu(x)'z) on the unit sphere {z in R^D: |z| = 1}.

    It goes with the prior `HypersphericalUniform`, to which its KL is known in closed form, and
    with no prior on all of R^D. The head gives a vector, of which mu is the direction, and one
    number r for the concentration,

        k = minimum_concentration + D softplus(r):

    in units of D, since the mean A_D(k) mu has a length of about k / D for k < D.
    Samples carry the derivatives in mu and k, with what the rejection sampler asks for included
    (see `pyro_vae.parts.distributions.spherical`).

    Args:
        encoder: x, (..., *x_shape), to features, (..., F).
        latent_dim: D >= 2, the dimension of the space: z has D coordinates, the sphere D - 1 dimensions.
        features: F; read from ``encoder.out_features`` when not given.
        minimum_concentration: Keeps k where its density and its derivatives are computed to full accuracy.
    Raises:
        ValueError: latent_dim < 2, or the number of features is unknown.
    Example:
        >>> q = VonMisesFisher(nn.Linear(3, 4), latent_dim=3)(torch.zeros(5, 3))
        >>> bool((q.sample().norm(dim=-1) - 1).abs().max() < 1e-6)
        True

    Reference: Davidson et al., Hyperspherical Variational Auto-Encoders, 2018. arXiv:1804.00891
    """

    support = constraints.sphere

    def __init__(
        self, encoder: nn.Module, latent_dim: int, features: int | None = None, minimum_concentration: float = 0.01
    ) -> None:
        if latent_dim < 2:
            raise ValueError(f"got latent_dim={latent_dim}, wanted 2 or more: the sphere in R^1 is two points.")
        if not minimum_concentration > 0:
            raise ValueError(f"got minimum_concentration={minimum_concentration}, wanted a number > 0.")
        super().__init__(encoder, latent_dim, latent_dim + 1, features)
        self.minimum_concentration = minimum_concentration

    def family(self, parameters: Tensor) -> TorchDistribution:
        direction, rate = parameters[..., :-1], parameters[..., -1]
        concentration = self.minimum_concentration + self.latent_dim * softplus(rate)
        return spherical.VonMisesFisher(_normalised(direction), concentration)


def _normalised(vector: Tensor) -> Tensor:
    """Unit vectors; the first axis for a vector of zeros, with no gradient."""
    size = vector.detach().abs().amax(-1, keepdim=True)
    some = size > 0
    axis = torch.zeros_like(vector)
    axis[..., 0] = 1
    # Divided by its largest coordinate first, no vector is too short or too long to be squared.
    scaled = torch.where(some, vector, axis) / torch.where(some, size, torch.ones_like(size))
    return scaled / scaled.norm(dim=-1, keepdim=True)
