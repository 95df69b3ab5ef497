"""The prior on the sphere that needs no learning."""

from __future__ import annotations

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn

from pyro_vae.parts.distributions import spherical


class HypersphericalUniform(nn.Module):
    """p(z) uniform on the unit sphere {z in R^D: |z| = 1}, for the posterior `VonMisesFisher`.

        log p(z) = log Gamma(D/2) - log 2 - D/2 log pi

    with respect to the sphere's surface, of D - 1 dimensions.

    Args:
        latent_dim: D >= 2, the dimension of the space: z has D coordinates.
    Raises:
        ValueError: latent_dim < 2.
    Example:
        >>> HypersphericalUniform(3)().log_prob(torch.tensor([0.0, 0.0, 1.0]))     # -log 4 pi
        tensor(-2.5310)

    Reference: Davidson et al., Hyperspherical Variational Auto-Encoders, 2018. arXiv:1804.00891
    """

    support = constraints.sphere
    like: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        if latent_dim < 2:
            raise ValueError(f"got latent_dim={latent_dim}, wanted 2 or more: the sphere in R^1 is two points.")
        self.latent_dim = latent_dim
        # Non-persistent: it tells samples the module's device and dtype.
        self.register_buffer("like", torch.zeros(()), persistent=False)

    def forward(self) -> TorchDistribution:
        return spherical.HypersphericalUniform(self.latent_dim, like=self.like)
