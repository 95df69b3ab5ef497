"""Gaussian posteriors."""

from __future__ import annotations

import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.parts.posteriors.amortized import Amortized


class DiagonalNormal(Amortized):
    """q(z | x) = N(z; mu(x), diag sigma(x)^2).

    The head gives mu and log sigma, so sigma is positive and the entropy linear in it.

    Args:
        encoder: x, (..., *x_shape), to features, (..., F).
        latent_dim: D.
        features: F; read from ``encoder.out_features`` when not given.
    Raises:
        ValueError: The number of features is unknown.
    Example:
        >>> import torch
        >>> DiagonalNormal(nn.Linear(3, 4), latent_dim=2)(torch.zeros(5, 3)).event_shape
        torch.Size([2])

    Reference: Kingma and Welling, Auto-Encoding Variational Bayes, 2014. arXiv:1312.6114
    """

    def __init__(self, encoder: nn.Module, latent_dim: int, features: int | None = None) -> None:
        super().__init__(encoder, latent_dim, 2 * latent_dim, features)

    def family(self, parameters: Tensor) -> TorchDistribution:
        loc, log_scale = parameters.chunk(2, -1)
        return dist.Normal(loc, log_scale.exp(), validate_args=False).to_event(1)
