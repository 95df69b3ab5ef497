"""The likelihood of grey pixels in [0, 1]."""

from __future__ import annotations

from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_vae.parts.distributions.continuous_bernoulli import ContinuousBernoulliLogits
from pyro_vae.parts.likelihoods.likelihood import Likelihood


class ContinuousBernoulli(Likelihood):
    """p(x | z) = prod_i ContinuousBernoulli(x_i; l_i(z)): grey values in [0, 1].

    What the cross-entropy of grey pixels lacks to be the log of a density. A density of x in [0, 1]: bits per
    dimension are those of `bits_per_dimension(..., levels=256)`, and a bound only for dequantised data.

    Args:
        decoder: z, (..., D), to logits, (..., *x_shape).
    Example:
        >>> import torch
        >>> ContinuousBernoulli(torch.nn.Linear(2, 6))(torch.zeros(5, 2)).event_shape
        torch.Size([6])

    Reference: Loaiza-Ganem and Cunningham, The continuous Bernoulli, 2019. arXiv:1907.06845
    """

    values = "continuous"

    def family(self, *parameters: Tensor) -> TorchDistribution:
        (logits,) = parameters
        return ContinuousBernoulliLogits(logits)
