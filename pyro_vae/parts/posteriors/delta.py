"""The posterior that is a point, and a point for every posterior."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.parts.posteriors.amortized import Amortized


class Delta(Amortized):
    """A point z(x) = mu(x): the encoder of a plain autoencoder, with no density.

    Args:
        encoder: x, (..., *x_shape), to features, (..., F).
        latent_dim: D.
        features: F; read from ``encoder.out_features`` when not given.
    Example:
        >>> Delta(nn.Linear(3, 4), latent_dim=2)(torch.zeros(5, 3)).event_shape
        torch.Size([2])
    """

    rescoring = "impossible"

    def __init__(self, encoder: nn.Module, latent_dim: int, features: int | None = None) -> None:
        super().__init__(encoder, latent_dim, latent_dim, features)

    def family(self, parameters: Tensor) -> TorchDistribution:
        return dist.Delta(parameters, event_dim=1, validate_args=False)


def mean(distribution: TorchDistribution) -> Tensor:
    """The mean of q(z | x), or, for families without one in closed form, of 64 samples."""
    try:
        return distribution.mean
    except NotImplementedError:
        return torch.stack([distribution() for _ in range(64)]).mean(0)
