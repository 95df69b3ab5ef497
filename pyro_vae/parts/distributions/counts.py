"""Counts by the logarithm of their mean.

log p has the term x log m, which is lost where m underflows. Towards the Poisson the usual difference log Gamma(r + x)
- log Gamma(r) loses all its digits, and Stirling's series takes over; at r -> 0, where log Gamma(r) has a pole,
Gamma(r) = Gamma(r + 1) / r leaves log r, which is given.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions.utils import broadcast_all

from pyro_vae.parts.distributions.bernoulli import polynomial
from pyro_vae.parts.distributions.levels import GreyLevels, Number, to_level

# Where Stirling's series with five terms reaches 1e-18 and log Gamma itself is still small.
_LARGE = 30.0
# Beyond r = exp(60) the negative binomial is the Poisson to every digit, and r itself would overflow float32.
_POISSON = 60.0
_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188)


class Counts(constraints.Constraint):
    """0, 1, 2, ..., or v / (L - 1) for such a v.

    Args:
        levels: L, where the counts are given as grey levels of 0 to 1 and beyond; None for the counts themselves.
    Example:
        >>> Counts().check(torch.tensor([3.0, 0.5, -1.0])), Counts(3).check(torch.tensor([0.5, 0.25]))
        (tensor([ True, False, False]), tensor([ True, False]))
    """

    is_discrete = True
    event_dim = 0
    lower_bound = 0

    def __init__(self, levels: int | None = None) -> None:
        self.levels = levels
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        count = value if self.levels is None else value * (self.levels - 1)
        # Far out a float is always whole, and v / (L - 1) times L - 1 is not v to the last digit.
        close = 0.0 if self.levels is None else 0.01
        return ((count - count.round()).abs() <= close) & (count >= 0)

    def __repr__(self) -> str:
        if self.levels is None:
            return "counts 0, 1, 2, ...: for grey levels v / 255 give the likelihood levels=256"
        return f"counts v / {self.levels - 1} with v in 0, 1, 2, ...: binarization='none' without dequantisation"


class LevelsAsCounts(Number):
    """Grey levels x = v / (L - 1) whose v is a count, such as of photons: P(x) is the probability of v.

    Args:
        counts: The distribution of v, any shape.
        levels: L.
    Example:
        >>> LevelsAsCounts(PoissonLogRate(torch.zeros(())), 256).log_prob(torch.tensor(1 / 255))
        tensor(-1.)
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, counts: TorchDistribution, levels: int, validate_args: bool | None = None) -> None:
        self.counts, self.levels = counts, GreyLevels(levels).levels
        self._support = Counts(levels)
        super().__init__(counts.batch_shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> LevelsAsCounts:
        new = super().expand(batch_shape)
        new.counts = self.counts.expand(batch_shape)
        return new

    def _score(self, value: Tensor) -> Tensor:
        return self.counts.log_prob(to_level(value, self.levels))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.counts.sample(sample_shape) / (self.levels - 1)

    @property
    def mean(self) -> Tensor:
        return self.counts.mean / (self.levels - 1)

    @property
    def variance(self) -> Tensor:
        return self.counts.variance / (self.levels - 1) ** 2


class PoissonLogRate(Number):
    """p(x) = m^x e^-m / x!,   m = exp(log_rate).

    Args:
        log_rate: log m, any shape.
    Example:
        >>> PoissonLogRate(torch.tensor(-200.0)).log_prob(torch.tensor(1.0))    # m itself underflows
        tensor(-200.)
    """

    arg_constraints = {"log_rate": constraints.real}
    support = Counts()

    def __init__(self, log_rate: Tensor, validate_args: bool | None = None) -> None:
        self.log_rate = log_rate
        super().__init__(log_rate.shape, validate_args=validate_args)

    def _score(self, value: Tensor) -> Tensor:
        return value * self.log_rate - self.log_rate.exp() - torch.lgamma(value + 1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return torch.poisson(self.mean.expand(self._extended_shape(torch.Size(sample_shape))))

    @property
    def mean(self) -> Tensor:
        return self.log_rate.exp()

    @property
    def variance(self) -> Tensor:
        return self.mean


class NegativeBinomialLogMean(Number):
    """Counts of mean m and variance m + m^2 / r: a Poisson whose rate is Gamma(r, r / m).

        p(x) = Gamma(r + x) / (Gamma(r) x!)  (r / (r + m))^r  (m / (r + m))^x

    Args:
        log_mean: log m, any shape.
        log_concentration: log r, of the same shape; the Poisson is r = infinity.
    Example:
        >>> NegativeBinomialLogMean(torch.zeros(()), torch.tensor(20.0)).log_prob(torch.tensor(0.0))
        tensor(-1.)
    """

    arg_constraints = {"log_mean": constraints.real, "log_concentration": constraints.real}
    support = Counts()

    def __init__(self, log_mean: Tensor, log_concentration: Tensor, validate_args: bool | None = None) -> None:
        self.log_mean, self.log_concentration = broadcast_all(log_mean, log_concentration)
        super().__init__(self.log_mean.shape, validate_args=validate_args)

    def _score(self, value: Tensor) -> Tensor:
        log_r = self.log_concentration.clamp(max=_POISSON)
        r, logits = log_r.exp(), self.log_mean - log_r
        large = r > _LARGE
        small_r, log_large = torch.where(large, 1.0, r), log_r.clamp(min=math.log(_LARGE))
        large_r = log_large.exp()
        rising = torch.lgamma(small_r + value.clamp(min=1)) - torch.lgamma(small_r + 1) + log_r
        near = torch.where(value > 0, rising, 0.0)
        near = near + value * F.logsigmoid(logits) + small_r * F.logsigmoid(-logits)
        # log Gamma(r + x) / Gamma(r) r^x, which tends to 0, and what is left of the powers, which tends to m^x e^-m.
        # By exp(-log r), since the derivative of 1 / r is out of float32's range before r is.
        ratio = (large_r + value - 0.5) * torch.log1p(value * torch.exp(-log_large)) - value
        ratio = ratio + _stirling(large_r + value) - _stirling(large_r)
        far = ratio + value * self.log_mean + (value + large_r) * F.logsigmoid(-logits)
        return torch.where(large, far, near) - torch.lgamma(value + 1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            log_r = self.log_concentration.clamp(max=_POISSON).expand(self._extended_shape(torch.Size(sample_shape)))
            r = log_r.exp()
            # Gamma(r) is Gamma(r + 1) U^(1/r): by its logarithm, since for a small r it lies below every float.
            log_gamma = torch._standard_gamma(r + 1).log() - torch.empty_like(r).exponential_() / r
            return torch.poisson((log_gamma + self.log_mean - log_r).exp())

    @property
    def mean(self) -> Tensor:
        return self.log_mean.exp()

    @property
    def variance(self) -> Tensor:
        return self.mean + (2 * self.log_mean - self.log_concentration).exp()


def _stirling(y: Tensor) -> Tensor:
    """log Gamma(y) - ((y - 1/2) log y - y + log(2 pi) / 2)."""
    return polynomial(_STIRLING, 1 / (y * y)) / y
