"""Likelihoods of whole numbers: counts x in 0, 1, 2, ..., and 8-bit pixels.

The mean of a count is softplus(l) or exp(l), which overflows float32 at l = 88, of the decoder's output l. Both go in
as logarithms: a count where the decoder expected none has a finite log density and a gradient that does not vanish.
With `levels` the mean is that many times larger: the decoder's output stays of the size of x.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.options import integer
from pyro_vae.parts.distributions.counts import LevelsAsCounts, NegativeBinomialLogMean, PoissonLogRate
from pyro_vae.parts.distributions.levels import CategoricalLevels, GreyLevels
from pyro_vae.parts.distributions.levels import DiscretizedLogistic as RoundedLogistic
from pyro_vae.parts.likelihoods.likelihood import Likelihood
from pyro_vae.parts.standardize import CountScale

_LINKS = ("softplus", "exp")


class _Counts(Likelihood):
    """What the two below have in common. Not a likelihood by itself."""

    values = "counts"
    standardize: CountScale | None

    def __init__(
        self, decoder: nn.Module, link: str = "softplus", levels: int | None = None,
        standardize: CountScale | None = None,
    ) -> None:  # fmt: skip
        super().__init__(decoder, standardize)
        if link not in _LINKS:
            raise ValueError(f"unknown link {link!r}, wanted one of {', '.join(_LINKS)}.")
        self.link, self.levels = link, None if levels is None else GreyLevels(levels).levels

    @classmethod
    def default_options(
        cls, x_shape: tuple[int, ...], scale: float | str, standardize: bool | None, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `pyro_vae.protocols.OfArchitecture`."""
        # With levels the data are of size one as they are.
        wanted = standardize is None and given.get("levels") is None
        return {"standardize": CountScale(x_shape)} if wanted else {}

    def _log_mean(self, output: Tensor) -> Tensor:
        # softplus(l) = -logsigmoid(-l) underflows far out, where its logarithm is l to 1e-13.
        if self.link == "softplus":
            output = torch.where(output < -30, output, torch.log(-F.logsigmoid(-output.clamp(min=-30))))
        output = output if self.levels is None else output + math.log(self.levels - 1)
        return output if self.standardize is None else output + self.standardize.scale.log()

    def _as_data(self, counts: TorchDistribution) -> TorchDistribution:
        return counts if self.levels is None else LevelsAsCounts(counts, self.levels)


class Poisson(_Counts):
    """p(x | z) = prod_i Poisson(x_i; m_i(z)): counts whose variance is their mean.

    Args:
        decoder: z, (..., D), to l, (..., *x_shape).
        link: "softplus" for m = log(1 + e^l), "exp" for m = e^l.
        levels: L, for data x = v / (L - 1) with counts v (256 for 8-bit images), of mean (L - 1) m; None for x itself.
        standardize: Has `scale` s, (*x_shape), such as a `CountScale`: the mean is s m; None for m.
    Raises:
        ValueError: Another link, fewer than two levels.
    Example:
        >>> Poisson(nn.Linear(2, 6))(torch.zeros(5, 2)).event_shape
        torch.Size([6])
    """

    def family(self, *parameters: Tensor) -> TorchDistribution:
        (output,) = parameters
        return self._as_data(PoissonLogRate(self._log_mean(output)))


class NegativeBinomial(_Counts):
    """p(x | z) = prod_i NegativeBinomial(x_i; m_i(z), r_i): counts of mean m and variance m + m^2 / r.

    Args:
        decoder: z, (..., D), to l, (..., *x_shape); with concentration="network" to l and log r, twice the channels.
        concentration: r: a number (fixed), "learned" (one for all pixels), "per-pixel" (one for each, shared by
            all data) or "network" (a function of z). The Poisson is r = infinity.
        x_shape: Shape of one datum; needed for "per-pixel".
        initial_concentration: Where a learned r starts.
        link, levels, standardize: As of `Poisson`.
    Raises:
        ValueError: An unknown or non-positive concentration, "per-pixel" without x_shape, another link.
    Example:
        >>> NegativeBinomial(nn.Linear(2, 6), concentration=2.0)(torch.zeros(5, 2)).event_shape
        torch.Size([6])
    """

    def __init__(
        self, decoder: nn.Module, concentration: float | str = "learned", x_shape: tuple[int, ...] | None = None,
        initial_concentration: float = 1.0, link: str = "softplus", levels: int | None = None,
        standardize: CountScale | None = None,
    ) -> None:  # fmt: skip
        super().__init__(decoder, link, levels, standardize)
        self.concentration = concentration
        if not initial_concentration > 0:
            raise ValueError(f"initial_concentration must be positive, got {initial_concentration}.")
        self._own("concentration", concentration, x_shape, math.log(initial_concentration))

    def family(self, *parameters: Tensor) -> TorchDistribution:
        log_mean = self._log_mean(parameters[0])
        if isinstance(self.concentration, str):
            log_r = self._owned("concentration", parameters)
        else:
            log_r = log_mean.new_full((), math.log(self.concentration))
        return self._as_data(NegativeBinomialLogMean(log_mean, log_r))


class Categorical(Likelihood):
    """p(x | z) = prod_i softmax(l_i(z))_{v_i}: any distribution over the L grey levels x = v / (L - 1).

    log p(x) is the log of a probability: bits per dimension are `bits_per_dimension(..., levels=1)`.

    Args:
        decoder: z, (..., D), to logits, (..., L * C, *rest) for data (C, *rest), level by level.
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


class _Logistics(Likelihood):
    """Rounded logistics with a smallest scale: what the two below have in common."""

    values = "levels"

    def __init__(
        self, decoder: nn.Module, levels: int = 256, initial_scale: float = 0.1, minimum_scale: float = 5e-4
    ) -> None:
        super().__init__(decoder)
        if not (initial_scale > 0 and minimum_scale > 0):
            raise ValueError(
                f"got initial_scale={initial_scale} and minimum_scale={minimum_scale}, wanted both positive, in units "
                "of x in [0, 1]."
            )
        self.levels, self.initial_scale, self.minimum_scale = levels, initial_scale, minimum_scale

    def _rounded(self, loc: Tensor, t: Tensor) -> TorchDistribution:
        # A scale of e^40 pixels gives every inner level the same mass; an infinite one would give it none.
        scale = self.minimum_scale + self.initial_scale * t.clamp(max=40.0).exp()
        return RoundedLogistic(loc, scale, self.levels)


class DiscretizedLogistic(_Logistics):
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

    def family(self, *parameters: Tensor) -> TorchDistribution:
        u, t = parameters
        return self._rounded(0.5 + 0.5 * u, t)


class MixtureOfDiscretizedLogistics(_Logistics):
    """p(x | z) = prod_i sum_m w_im(z) P_m(x_i): a mixture of rounded logistics for each pixel and channel.

    The channels are independent given z; the paper lets green depend on red and blue on both, which an
    autoregressive decoder needs and a latent variable stands in for. The M locations start evenly spread.

        m_j = (j + 1/2) / M + u_j / 2,   s_j = minimum_scale + initial_scale exp(t_j),   w = softmax(c)

    Args:
        decoder: z, (..., D), to (c_1..c_M, u_1..u_M, t_1..t_M), 3 M times the channels.
        num_components: M.
        levels, initial_scale, minimum_scale: As of `DiscretizedLogistic`.
    Raises:
        ValueError: A scale that is not positive, no component.
    Example:
        >>> MixtureOfDiscretizedLogistics(nn.Linear(2, 6 * 6), num_components=2)(torch.zeros(5, 2)).event_shape
        torch.Size([6])

    Reference: Salimans et al., PixelCNN++, 2017. arXiv:1701.05517
    """

    def __init__(
        self, decoder: nn.Module, num_components: int = 5, levels: int = 256, initial_scale: float = 0.1,
        minimum_scale: float = 5e-4,
    ) -> None:  # fmt: skip
        super().__init__(decoder, levels, initial_scale, minimum_scale)
        self.num_components = integer("num_components", num_components)
        self.parameters_per_pixel = 3 * self.num_components

    def family(self, *parameters: Tensor) -> TorchDistribution:
        count = self.num_components
        c, u, t = (torch.stack(parameters[i * count : (i + 1) * count], -1) for i in range(3))
        start = (torch.arange(count, dtype=u.dtype, device=u.device) + 0.5) / count
        return dist.MixtureSameFamily(dist.Categorical(logits=c), self._rounded(start + 0.5 * u, t))
