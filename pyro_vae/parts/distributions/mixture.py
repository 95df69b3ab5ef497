"""Mixtures of diagonal Gaussians with gradients through their samples.

Which component a sample came from is a discrete choice, so a sample z = m_c + s_c eps has no
derivative in the weights. But a sample may move in any way that carries the density q along:
v is the derivative of z in a parameter phi if dq/dphi + div(q v) = 0.

Means and scales. Each component moves its own mass, and at z they share it in proportion to
their responsibilities r_c(z) = w_c q_c(z) / q(z):

    dz = sum_c r_c(z) (dm_c + (z - m_c) / s_c ds_c)

Weights. The conditional distribution functions

    u_d = F_d(z_d | z_1, ..., z_{d-1}) = sum_c w_c(z_1, ..., z_{d-1}) Phi((z_d - m_cd) / s_cd)

turn a draw of the mixture into independent uniform numbers. Keeping those fixed while the
logits l move defines how z moves, without any inverse of F, since dF/dz is triangular, with
the conditional densities on its diagonal:

    dz = -(dF / dz)^-1 (dF / dl) dl

Both are exact. The price of the second is variance: to make one component heavier, mass has
to be moved there through whatever lies between, and the less lies there the faster it moves.
For two components a standard deviations apart in one dimension the variance of the weights'
gradient grows as exp(a^2 / 8). From about eight on, the weights learn slowly. The gradients
of means and scales never suffer.

Pyro's MixtureOfDiagNormals (Jankowiak and Karaletsos 2019, arXiv:1806.01856) moves the
weights' mass along other paths, with the density itself as a divisor, which leaves the range
of float32 in 50 dimensions, and it takes neither D = 1 nor a sample_shape.

Reference: Figurnov, Mohamed and Mnih, Implicit Reparameterization Gradients, 2018. arXiv:1805.08498
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

_LOG_TWO_PI = math.log(2 * math.pi)


class DiagonalNormalMixture(TorchDistribution):
    """sum_c w_c N(z; m_c, diag s_c^2), with w = softmax(logits).

    `rsample` carries the derivatives in means, scales and logits, in memory O(D^2 + C D) a
    sample. They are first derivatives: a second one through a sample is not meant to be
    taken. Arguments are trusted, not validated.

    Args:
        loc: m, (..., C, D).
        scale: s > 0, (..., C, D).
        logits: Logarithms of the weights up to a constant, (..., C).
    Example:
        >>> mixture = DiagonalNormalMixture(torch.tensor([[-1.0], [3.0]]), torch.ones(2, 1), torch.zeros(2))
        >>> mixture.mean, mixture.variance
        (tensor([1.]), tensor([5.]))
    """

    arg_constraints = {
        "loc": constraints.independent(constraints.real, 2),
        "scale": constraints.independent(constraints.positive, 2),
        "logits": constraints.real_vector,
    }
    support = constraints.real_vector
    has_rsample = True
    twice_differentiable = False  # samples carry first derivatives only: see rsample

    def __init__(self, loc: Tensor, scale: Tensor, logits: Tensor) -> None:
        self._loc, self._scale, self._logits = loc, scale, logits.log_softmax(-1)
        batch_shape = torch.broadcast_shapes(loc.shape[:-2], scale.shape[:-2], logits.shape[:-1])
        super().__init__(batch_shape, loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiagonalNormalMixture:
        new = self._get_checked_instance(DiagonalNormalMixture, _instance)
        new._loc, new._scale, new._logits = self._loc, self._scale, self._logits
        shape = torch.Size(batch_shape)
        if torch.broadcast_shapes(self.batch_shape, shape) != shape:
            raise ValueError(f"cannot expand batch_shape {tuple(self.batch_shape)} to {tuple(shape)}.")
        super(DiagonalNormalMixture, new).__init__(shape, self.event_shape, validate_args=False)
        return new

    @property
    def loc(self) -> Tensor:
        """m, (..., C, D)."""
        return self._loc.expand(self.batch_shape + self._loc.shape[-2:])

    @property
    def scale(self) -> Tensor:
        """s, (..., C, D)."""
        return self._scale.expand(self.batch_shape + self._loc.shape[-2:])

    @property
    def logits(self) -> Tensor:
        """log w, normalised, (..., C)."""
        return self._logits.expand(self.batch_shape + self._logits.shape[-1:])

    @property
    def mean(self) -> Tensor:
        mean = (self._logits.exp().unsqueeze(-1) * self._loc).sum(-2)
        return mean.expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        within = self._scale.square() + (self._loc - self.mean.unsqueeze(-2)).square()
        variance = (self._logits.exp().unsqueeze(-1) * within).sum(-2)
        return variance.expand(self.batch_shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        log_density = _log_normal(value.unsqueeze(-2), self._loc, self._scale).sum(-1)
        return (log_density + self._logits).logsumexp(-1).expand(
            torch.broadcast_shapes(self.batch_shape, value.shape[:-1])
        )

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        z = self._draw(torch.Size(sample_shape)).detach()
        wanted = any(tensor.requires_grad for tensor in (self._loc, self._scale, self._logits))
        return self._attached(z) if wanted and torch.is_grad_enabled() else z

    def _draw(self, sample_shape: torch.Size) -> Tensor:
        shape = self._extended_shape(sample_shape)
        noise = self._loc.new_empty(shape).normal_()
        # The maximum of Gumbel noise, -log of exponential noise, on the logits is a categorical draw.
        gumbel = -self._loc.new_empty(shape[:-1] + self._logits.shape[-1:]).exponential_().log()
        which = (self._logits + gumbel).argmax(-1)[..., None, None].expand(shape[:-1] + (1,) + shape[-1:])
        wide = shape[:-1] + self._loc.shape[-2:]
        loc, scale = (tensor.expand(wide).gather(-2, which).squeeze(-2) for tensor in (self._loc, self._scale))
        return loc + scale * noise

    def _attached(self, z: Tensor) -> Tensor:
        """A detached z with its derivatives: adds nothing but what they multiply."""
        with torch.no_grad():
            white = (z.unsqueeze(-2) - self._loc) / self._scale
            log_density = _log_normal(z.unsqueeze(-2), self._loc, self._scale)
            share = (self._logits + log_density.sum(-1)).softmax(-1).unsqueeze(-1)
            spread = share * white
        z = z + (share * (self._loc - self._loc.detach()) + spread * (self._scale - self._scale.detach())).sum(-2)
        if not self._logits.requires_grad:
            return z
        with torch.no_grad():
            velocity = self._velocity(white, log_density)
        return z + (velocity @ (self._logits - self._logits.detach()).unsqueeze(-1)).squeeze(-1)

    def _velocity(self, white: Tensor, log_density: Tensor) -> Tensor:
        """-(dF/dz)^-1 dF/dl, (..., D, C)."""
        # Weights of the components once z_1, ..., z_{d-1} are known.
        weight = (self._logits.unsqueeze(-1) + log_density.cumsum(-1) - log_density).softmax(-2)
        # F or F - 1, whichever is smaller in size: in the upper tail the sums of F cancel.
        side = 1 - 2 * ((weight * _normal_cdf(white)).sum(-2, keepdim=True) > 0.5).to(white)
        each = side * _normal_cdf(side * white)
        density = (weight * log_density.exp()).sum(-2, keepdim=True).clamp(min=torch.finfo(white.dtype).tiny)
        # Rows divided by the density, dF/dz has ones on its diagonal; below it z_e acts through the weights.
        through = (weight * (each - (weight * each).sum(-2, keepdim=True)) / density).mT
        below = (through @ (-white / self._scale)).tril(-1)
        return -torch.linalg.solve_triangular(below, through, upper=False, unitriangular=True)


def _log_normal(value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return -0.5 * ((value - loc) / scale).square() - scale.log() - 0.5 * _LOG_TWO_PI


def _normal_cdf(value: Tensor) -> Tensor:
    # Not torch.special.ndtr: in float32 it has lost half its value at -5.5, and all of it at -6.
    return 0.5 * torch.erfc(-value * math.sqrt(0.5))
