"""Grey levels x = v / (L - 1), v in 0, ..., L - 1: any distribution over them, and a rounded logistic.

log p(x) is the log of a probability in nats: bits per dimension are -log p / (dims log 2), with no correction for the
scale of x (`bits_per_dimension(..., levels=1)`). A logistic variable of location m and scale s, in units of levels, is
rounded to the nearest level, beyond the ends to the ends. With a = (v - 1/2 - m) / s and b = (v + 1/2 - m) / s,

    P(v) = S(b) - S(a) = S(b) S(-a) (1 - e^-1/s),   S(t) = 1 / (1 + e^-t)

The product has no cancellation however narrow or remote the bin is, so nothing has to be replaced by the density
at its centre. The lowest level drops S(-a) and the last factor, the highest drops S(b) and the last factor.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions.utils import broadcast_all

_Self = TypeVar("_Self", bound="Number")


class GreyLevels(constraints.Constraint):
    """x = v / (L - 1) for a whole number v in 0, ..., L - 1.

    Args:
        levels: L.
    Raises:
        ValueError: Fewer than two levels.
    Example:
        >>> GreyLevels(256).check(torch.tensor([0.0, 7 / 255, 7.5 / 255, 256 / 255]))
        tensor([ True,  True, False, False])
    """

    is_discrete = True
    event_dim = 0

    def __init__(self, levels: int) -> None:
        if levels < 2:
            raise ValueError(f"levels must be a whole number of at least 2, got {levels}.")
        self.levels = levels
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        level = value * (self.levels - 1)
        return ((level - level.round()).abs() < 0.01) & (value > -1e-6) & (value < 1 + 1e-6)

    def __repr__(self) -> str:
        top = self.levels - 1
        return f"grey levels v / {top} with v in 0, ..., {top}: binarization='none' without dequantisation"


def to_level(x: Tensor, levels: int) -> Tensor:
    """v of x = v / (L - 1), exactly."""
    return (x * (levels - 1)).round()


class Number(TorchDistribution):
    """A distribution of one number, whose parameters have its batch_shape; abstract.

    `expand` never returns the distribution itself, even where the shape stays: Pyro's ``Independent`` switches the
    validation of what it is given back off for good, and data that no level has would be scored in silence.
    """

    has_rsample = False
    _support: constraints.Constraint  # of values that are whole numbers of something

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        return self._support

    def expand(self: _Self, batch_shape: Any, _instance: Any = None) -> _Self:
        new, dims = copy.copy(self), len(self.batch_shape)
        new._batch_shape = torch.Size(batch_shape)
        for name in self.arg_constraints:
            parameter = getattr(self, name)
            setattr(new, name, parameter.expand(new._batch_shape + parameter.shape[dims:]))
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self._score(value)

    def _score(self, value: Tensor) -> Tensor:
        """log p of values that may be trusted."""
        raise NotImplementedError


class CategoricalLevels(Number):
    """P(x = v / (L - 1)) = softmax(logits)_v: any distribution of a pixel's grey level.

    Args:
        logits: (..., L).
    Example:
        >>> CategoricalLevels(torch.zeros(3, 256)).log_prob(torch.tensor([0.0, 0.2, 1.0]))
        tensor([-5.5452, -5.5452, -5.5452])
    """

    arg_constraints = {"logits": constraints.real_vector}

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = logits
        self._support = GreyLevels(logits.shape[-1])
        super().__init__(logits.shape[:-1], validate_args=validate_args)

    @property
    def levels(self) -> int:
        """L."""
        return self.logits.shape[-1]

    def _score(self, value: Tensor) -> Tensor:
        log_p = self.logits.log_softmax(-1)
        index, log_p = torch.broadcast_tensors(to_level(value, self.levels).long().unsqueeze(-1), log_p)
        return log_p.gather(-1, index[..., :1]).squeeze(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            level = dist.Categorical(logits=self.logits, validate_args=False).sample(torch.Size(sample_shape))
            return level.to(self.logits.dtype) / (self.levels - 1)

    @property
    def _grey(self) -> Tensor:
        return torch.linspace(0, 1, self.levels, dtype=self.logits.dtype, device=self.logits.device)

    @property
    def mean(self) -> Tensor:
        return self.logits.softmax(-1) @ self._grey

    @property
    def variance(self) -> Tensor:
        deviation = self._grey - self.mean.unsqueeze(-1)
        return (self.logits.softmax(-1) * deviation.square()).sum(-1)


class DiscretizedLogistic(Number):
    """P(x = v / (L - 1)): a logistic of the grey value, rounded to L levels.

    Args:
        loc: Location in units of x, any shape; it may lie outside [0, 1].
        scale: s > 0 in units of x, of the same shape.
        levels: L.
    Example:
        >>> pixel = DiscretizedLogistic(torch.tensor(0.5), torch.tensor(0.1), levels=3)
        >>> pixel.log_prob(torch.tensor([0.0, 0.5, 1.0])).exp()
        tensor([0.0759, 0.8483, 0.0759])

    Reference: Salimans et al., PixelCNN++, 2017. arXiv:1701.05517; Kingma et al., Improved variational inference
        with inverse autoregressive flow, 2016. arXiv:1606.04934
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}

    def __init__(self, loc: Tensor, scale: Tensor, levels: int = 256, validate_args: bool | None = None) -> None:
        self.loc, self.scale = broadcast_all(loc, scale)
        self.levels = levels
        self._support = GreyLevels(levels)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def _score(self, value: Tensor) -> Tensor:
        # In units of levels the edges of neighbouring bins are the same float, so the sum telescopes to one.
        level, top = to_level(value, self.levels), self.levels - 1
        loc, scale = self.loc * top, self.scale * top
        lowest, highest = level <= 0, level >= top
        below = torch.where(highest, 0.0, F.logsigmoid((level + 0.5 - loc) / scale))
        above = torch.where(lowest, 0.0, F.logsigmoid((loc - level + 0.5) / scale))
        return below + above + torch.where(lowest | highest, 0.0, torch.log(-torch.expm1(-1 / scale)))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            top = self.levels - 1
            shape = self._extended_shape(torch.Size(sample_shape))
            tiny = torch.finfo(self.loc.dtype).eps
            u = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device).clamp(tiny, 1 - tiny)
            return ((self.loc + self.scale * torch.logit(u)) * top).round().clamp(0, top).abs() / top  # abs: no -0

    @property
    def mean(self) -> Tensor:
        """E[x] = sum_{v < L - 1} P(level > v) / (L - 1), exactly."""
        return self._tail_sum(lambda v: torch.ones_like(v))

    @property
    def variance(self) -> Tensor:
        """E[x^2] - E[x]^2, with E[v^2] = sum_{v < L - 1} (2 v + 1) P(level > v)."""
        top = self.levels - 1
        return (self._tail_sum(lambda v: 2 * v + 1) / top - self.mean.square()).clamp(min=0)

    def _tail_sum(self, weight: Any) -> Tensor:
        top = self.levels - 1
        loc, scale = (self.loc * top).unsqueeze(-1), (self.scale * top).unsqueeze(-1)
        total = torch.zeros_like(self.loc)
        for v in torch.arange(top, dtype=self.loc.dtype, device=self.loc.device).split(16):  # memory of 16 images
            total = total + (weight(v) * torch.sigmoid((loc - v - 0.5) / scale)).sum(-1)
        return total / top
