"""Likelihoods of 8-bit pixels: without a shape, and by rounded logistics."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.parts.distributions.levels import CategoricalLevels, GreyLevels
from pyro_vae.parts.distributions.levels import DiscretizedLogistic as RoundedLogistic
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


def _check_scales(initial_scale: float, minimum_scale: float) -> None:
    if not (initial_scale > 0 and minimum_scale > 0):
        raise ValueError(
            f"got initial_scale={initial_scale} and minimum_scale={minimum_scale}, wanted both positive, in units of "
            "x in [0, 1]."
        )


def _exp(t: Tensor) -> Tensor:
    # A scale of e^40 pixels gives every inner level the same mass; an infinite one would give it none.
    return t.clamp(max=40.0).exp()


class DiscretizedLogistic(Likelihood):
    """p(x | z) = prod_i P(round(y_i) = x_i),   y_i ~ Logistic(m_i(z), s_i(z)): grey levels.

        m = 1/2 + u / 2,   s = minimum_scale + initial_scale exp(t)

    for the decoder's outputs u and t, so that it starts in the middle of the grey values.

    Args:
        decoder: z, (..., D), to (u, t), twice the channels (the first dimension of x_shape).
        levels: L; 256 for 8-bit pixels x = v / 255.
        initial_scale: s where t = 0, in units of x.
        minimum_scale: Lower limit of s.
    Raises:
        ValueError: A scale that is not positive, fewer than two levels.
    Example:
        >>> DiscretizedLogistic(nn.Linear(2, 12))(torch.zeros(5, 2)).event_shape
        torch.Size([6])

    Reference: Kingma et al., Improved variational inference with inverse autoregressive flow, 2016. arXiv:1606.04934
    """

    parameters_per_pixel = 2
    values = "levels"

    def __init__(
        self, decoder: nn.Module, levels: int = 256, initial_scale: float = 0.1, minimum_scale: float = 5e-4
    ) -> None:
        super().__init__(decoder)
        _check_scales(initial_scale, minimum_scale)
        self.levels, self.initial_scale, self.minimum_scale = levels, initial_scale, minimum_scale

    def family(self, *parameters: Tensor) -> TorchDistribution:
        u, t = parameters
        return RoundedLogistic(0.5 + 0.5 * u, self.minimum_scale + self.initial_scale * _exp(t), self.levels)


class MixtureOfDiscretizedLogistics(Likelihood):
    """p(x | z) = prod_i sum_m w_im(z) P_m(x_i): a mixture of rounded logistics for each pixel and channel.

    The channels are independent given z; the paper lets green depend on red and blue on both, which an
    autoregressive decoder needs and a latent variable stands in for. The M locations start evenly spread.

        m_j = (j + 1/2) / M + u_j / 2,   s_j = minimum_scale + initial_scale exp(t_j),   w = softmax(c)

    Args:
        decoder: z, (..., D), to (c_1..c_M, u_1..u_M, t_1..t_M), 3 M times the channels.
        num_components: M.
        levels: L; 256 for 8-bit pixels x = v / 255.
        initial_scale: s where t = 0, in units of x.
        minimum_scale: Lower limit of s.
    Raises:
        ValueError: A scale that is not positive, no component.
    Example:
        >>> MixtureOfDiscretizedLogistics(nn.Linear(2, 6 * 6), num_components=2)(torch.zeros(5, 2)).event_shape
        torch.Size([6])

    Reference: Salimans et al., PixelCNN++, 2017. arXiv:1701.05517
    """

    values = "levels"

    def __init__(
        self,
        decoder: nn.Module,
        num_components: int = 5,
        levels: int = 256,
        initial_scale: float = 0.1,
        minimum_scale: float = 5e-4,
    ) -> None:
        super().__init__(decoder)
        if num_components < 1:
            raise ValueError(f"num_components must be a positive integer, got {num_components}.")
        _check_scales(initial_scale, minimum_scale)
        self.num_components, self.levels = num_components, levels
        self.initial_scale, self.minimum_scale = initial_scale, minimum_scale
        self.parameters_per_pixel = 3 * num_components

    def family(self, *parameters: Tensor) -> TorchDistribution:
        count = self.num_components
        c, u, t = (torch.stack(parameters[i * count : (i + 1) * count], -1) for i in range(3))
        start = (torch.arange(count, dtype=u.dtype, device=u.device) + 0.5) / count
        component = RoundedLogistic(start + 0.5 * u, self.minimum_scale + self.initial_scale * _exp(t), self.levels)
        return dist.MixtureSameFamily(dist.Categorical(logits=c), component)
