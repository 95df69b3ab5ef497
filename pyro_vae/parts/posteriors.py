"""Posteriors q(z | x): modules that turn data into a distribution over the latent.

A posterior owns an encoder (data to features) and a linear head from the features to
its parameters, so that families are swapped without touching the network.
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn


def _features(encoder: nn.Module, features: int | None) -> int:
    found = features if features is not None else getattr(encoder, "out_features", None)
    if found is None and isinstance(encoder, nn.Sequential):
        found = next((m.out_features for m in reversed(encoder) if hasattr(m, "out_features")), None)
    if not isinstance(found, int):
        raise ValueError(
            f"{type(encoder).__name__} does not say how many features it returns. Give it an attribute "
            "out_features, or pass features=... to the posterior."
        )
    return found


class DiagonalNormal(nn.Module):
    """q(z | x) = N(z; mu(x), diag sigma(x)^2).

    The head gives mu and log sigma, so sigma is positive and the entropy linear in it.

    Args:
        encoder: x, (..., *x_shape), to features, (..., F).
        latent_dim: D.
        features: F; read from ``encoder.out_features`` when not given.
    Raises:
        ValueError: The number of features is unknown.
    Example:
        >>> DiagonalNormal(nn.Linear(3, 4), latent_dim=2)(torch.zeros(5, 3)).event_shape
        torch.Size([2])

    Reference: Kingma and Welling, Auto-Encoding Variational Bayes, 2014. arXiv:1312.6114
    """

    def __init__(self, encoder: nn.Module, latent_dim: int, features: int | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.latent_dim = latent_dim
        self.head = nn.Linear(_features(encoder, features), 2 * latent_dim)

    def forward(self, x: Tensor) -> TorchDistribution:
        loc, log_scale = self.head(self.encoder(x)).chunk(2, -1)
        return dist.Normal(loc, log_scale.exp(), validate_args=False).to_event(1)


class Point(nn.Module):
    """A point z(x) = mu(x): the encoder of a plain autoencoder, with no density.

    Args:
        encoder: x, (..., *x_shape), to features, (..., F).
        latent_dim: D.
        features: F; read from ``encoder.out_features`` when not given.
    Example:
        >>> Point(nn.Linear(3, 4), latent_dim=2)(torch.zeros(5, 3)).event_shape
        torch.Size([2])
    """

    def __init__(self, encoder: nn.Module, latent_dim: int, features: int | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.latent_dim = latent_dim
        self.head = nn.Linear(_features(encoder, features), latent_dim)

    def forward(self, x: Tensor) -> TorchDistribution:
        return dist.Delta(self.head(self.encoder(x)), event_dim=1, validate_args=False)


def mean(distribution: TorchDistribution) -> Tensor:
    """The mean of q(z | x), or, for families without one in closed form, of 64 samples."""
    try:
        return distribution.mean
    except NotImplementedError:
        return torch.stack([distribution() for _ in range(64)]).mean(0)
