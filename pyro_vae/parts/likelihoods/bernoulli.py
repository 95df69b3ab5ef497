"""The likelihood of binary pixels."""

from __future__ import annotations

from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_vae.parts.distributions.bernoulli import BernoulliLogits
from pyro_vae.parts.likelihoods.likelihood import Likelihood


class Bernoulli(Likelihood):
    """p(x | z) = prod_i Bernoulli(x_i; sigmoid(l_i(z))): binary pixels.

    Args:
        decoder: z, (..., D), to logits, (..., *x_shape).
    Example:
        >>> import torch
        >>> Bernoulli(torch.nn.Linear(2, 6))(torch.zeros(5, 2)).event_shape
        torch.Size([6])
    """

    values = "binary"

    def family(self, *parameters: Tensor) -> TorchDistribution:
        (logits,) = parameters
        return BernoulliLogits(logits)
