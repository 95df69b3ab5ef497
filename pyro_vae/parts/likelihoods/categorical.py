"""The likelihood of 8-bit pixels without a shape."""

from __future__ import annotations

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.parts.distributions.levels import CategoricalLevels, GreyLevels
from pyro_vae.parts.likelihoods.likelihood import Likelihood


class Categorical(Likelihood):
    """p(x | z) = prod_i softmax(l_i(z))_{v_i}: any distribution over the L grey levels x = v / (L - 1).

    log p(x) is the log of a probability: bits per dimension are `bits_per_dimension(..., levels=1)`.

    Args:
        decoder: z, (..., D), to logits, (..., L * C, *rest) for data (C, *rest): the channels of level 0, then
            those of level 1, and so on.
        levels: L; 256 for 8-bit pixels x = v / 255.
    Raises:
        ValueError: Fewer than two levels.
    Example:
        >>> Categorical(nn.Linear(2, 24), levels=4)(torch.zeros(5, 2)).event_shape
        torch.Size([6])
    """

    values = "levels"

    def __init__(self, decoder: nn.Module, levels: int = 256) -> None:
        super().__init__(decoder)
        self.parameters_per_pixel = GreyLevels(levels).levels

    def family(self, *parameters: Tensor) -> TorchDistribution:
        return CategoricalLevels(torch.stack(parameters, -1))
