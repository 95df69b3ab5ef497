"""Distributions of grey levels.

A pixel of L levels holds x = v / (L - 1) with v in 0, ..., L - 1, as `pyro_vae.data` gives 8-bit images with
binarization="none" and no dequantisation: x = v / 255. Its distribution is discrete, so log p(x) is the log of
a probability in nats, and bits per dimension are -log p / (dims log 2), with no correction for the scale of x
(`bits_per_dimension(..., levels=1)`).

`expand` never returns the distribution itself here, even where the shape stays: Pyro's ``Independent`` switches
the validation of what it is given back off for good, and data that no level has would be scored in silence.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor


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


class CategoricalLevels(TorchDistribution):
    """P(x = v / (L - 1)) = softmax(logits)_v: any distribution of a pixel's grey level.

    Args:
        logits: (..., L).
    Example:
        >>> CategoricalLevels(torch.zeros(3, 256)).log_prob(torch.tensor([0.0, 0.2, 1.0]))
        tensor([-5.5452, -5.5452, -5.5452])
    """

    arg_constraints = {"logits": constraints.real_vector}
    has_rsample = False

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = logits
        self._support = GreyLevels(logits.shape[-1])
        super().__init__(logits.shape[:-1], validate_args=validate_args)

    @property
    def levels(self) -> int:
        """L."""
        return self.logits.shape[-1]

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        return self._support

    def expand(self, batch_shape: Any, _instance: Any = None) -> CategoricalLevels:
        logits = self.logits.expand(*batch_shape, self.levels)
        return CategoricalLevels(logits, validate_args=self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        log_p = self.logits.log_softmax(-1)
        index, log_p = torch.broadcast_tensors(to_level(value, self.levels).long().unsqueeze(-1), log_p)
        return log_p.gather(-1, index[..., :1]).squeeze(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            level = dist.Categorical(logits=self.logits, validate_args=False).sample(torch.Size(sample_shape))
            return level.to(self.logits.dtype) / (self.levels - 1)

    @property
    def mean(self) -> Tensor:
        grey = torch.linspace(0, 1, self.levels, dtype=self.logits.dtype, device=self.logits.device)
        return self.logits.softmax(-1) @ grey

    @property
    def variance(self) -> Tensor:
        grey = torch.linspace(0, 1, self.levels, dtype=self.logits.dtype, device=self.logits.device)
        deviation = grey - self.mean.unsqueeze(-1)
        return (self.logits.softmax(-1) * deviation.square()).sum(-1)
