"""The prior that needs no learning."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn


class StandardNormal(nn.Module):
    """p(z) = N(z; 0, I) in D dimensions.

    Args:
        latent_dim: D.
    Example:
        >>> StandardNormal(2)().log_prob(torch.zeros(2))
        tensor(-1.8379)
    """

    loc: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be a positive integer, got {latent_dim}.")
        self.latent_dim = latent_dim
        # Non-persistent: a constant that follows the module's device and dtype.
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)

    def forward(self) -> TorchDistribution:
        return dist.Normal(self.loc, torch.ones_like(self.loc), validate_args=False).to_event(1)
