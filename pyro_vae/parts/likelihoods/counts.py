"""Likelihoods of counts x in 0, 1, 2, ...: photons, words, transcripts.

The mean is softplus(l) or exp(l) of the decoder's output l, times the size of the column where that was measured. Both
go in as logarithms, log softplus(l) = l for l -> -infinity: a count where the decoder expected none has a finite log
density and a gradient that does not vanish. With `levels` x is a grey level v / (L - 1) whose v is the count, and
the mean is that many times larger: the decoder's output stays of the size of x. The exponential is the canonical link,
and overflows float32 at l = 88; softplus grows no faster than l.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.parts.distributions.counts import LevelsAsCounts, NegativeBinomialLogMean, PoissonLogRate
from pyro_vae.parts.distributions.levels import GreyLevels
from pyro_vae.parts.likelihoods.likelihood import Likelihood
from pyro_vae.parts.standardize import CountScale

_LINKS = ("softplus", "exp")


class _Counts(Likelihood):
    """What the two below have in common. Not a likelihood by itself."""

    values = "counts"
    standardize: CountScale | None

    def __init__(self, decoder: nn.Module, link: str, levels: int | None, standardize: CountScale | None) -> None:
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

    def __init__(
        self,
        decoder: nn.Module,
        link: str = "softplus",
        levels: int | None = None,
        standardize: CountScale | None = None,
    ) -> None:
        super().__init__(decoder, link, levels, standardize)

    def family(self, *parameters: Tensor) -> TorchDistribution:
        (output,) = parameters
        return self._as_data(PoissonLogRate(self._log_mean(output)))


class NegativeBinomial(_Counts):
    """p(x | z) = prod_i NegativeBinomial(x_i; m_i(z), r_i): counts of mean m and variance m + m^2 / r.

    Args:
        decoder: z, (..., D), to l, (..., *x_shape); with concentration="network" to l and log r, twice as many
            along the channel dimension (the first of x_shape).
        concentration: r: a number (fixed), "learned" (one for all pixels), "per-pixel" (one for each, shared by
            all data) or "network" (a function of z). The Poisson is r = infinity.
        x_shape: Shape of one datum; needed for "per-pixel".
        initial_concentration: Where a learned r starts.
        link: "softplus" for m = log(1 + e^l), "exp" for m = e^l.
        levels: L, for data x = v / (L - 1) with counts v (256 for 8-bit images), of mean (L - 1) m; None for x itself.
        standardize: Has `scale` s, (*x_shape), such as a `CountScale`: the mean is s m; None for m.
    Raises:
        ValueError: An unknown or non-positive concentration, "per-pixel" without x_shape, another link.
    Example:
        >>> NegativeBinomial(nn.Linear(2, 6), concentration=2.0)(torch.zeros(5, 2)).event_shape
        torch.Size([6])
    """

    def __init__(
        self,
        decoder: nn.Module,
        concentration: float | str = "learned",
        x_shape: tuple[int, ...] | None = None,
        initial_concentration: float = 1.0,
        link: str = "softplus",
        levels: int | None = None,
        standardize: CountScale | None = None,
    ) -> None:
        super().__init__(decoder, link, levels, standardize)
        self.concentration = concentration
        self.parameters_per_pixel = 2 if concentration == "network" else 1
        if not initial_concentration > 0:
            raise ValueError(f"initial_concentration must be positive, got {initial_concentration}.")
        start = math.log(initial_concentration)
        if isinstance(concentration, int | float):
            if not concentration > 0:
                raise ValueError(f"concentration must be positive, got {concentration}.")
        elif concentration == "learned":
            self.log_concentration = nn.Parameter(torch.tensor(start))
        elif concentration == "per-pixel":
            if x_shape is None:
                raise ValueError('concentration="per-pixel" needs x_shape, the shape of one datum.')
            self.log_concentration = nn.Parameter(torch.full(tuple(x_shape), start))
        elif concentration != "network":
            raise ValueError(
                f'got concentration={concentration!r}, wanted a number, "learned", "per-pixel" or "network".'
            )

    def family(self, *parameters: Tensor) -> TorchDistribution:
        log_mean = self._log_mean(parameters[0])
        if self.concentration == "network":
            return self._as_data(NegativeBinomialLogMean(log_mean, parameters[1]))
        if isinstance(self.concentration, int | float):
            log_r = log_mean.new_full((), math.log(self.concentration))
            return self._as_data(NegativeBinomialLogMean(log_mean, log_r))
        shape = self.log_concentration.shape
        if shape and shape != log_mean.shape[log_mean.dim() - len(shape) :]:
            raise ValueError(
                f'concentration="per-pixel" was built for x_shape {tuple(shape)}, but the decoder returned data of '
                f"shape {tuple(log_mean.shape[log_mean.dim() - len(shape) :])}. Give both the shape of one datum."
            )
        return self._as_data(NegativeBinomialLogMean(log_mean, self.log_concentration))
