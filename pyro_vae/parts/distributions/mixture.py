"""Mixtures: of diagonal Gaussians for each datum, with gradients through their samples, and one for all data.

A sample z = m_c + s_c eps has no derivative in the weights, as c is a discrete choice. But it may move in any way that
carries the density q along: v is its derivative in phi if dq/dphi + div(q v) = 0. In means and scales, with the
responsibilities r_c(z) = w_c q_c(z) / q(z),

    dz = sum_c r_c(z) (dm_c + (z - m_c) / s_c ds_c)

For the weights, the conditional distribution functions

    u_d = F_d(z_d | z_1, ..., z_{d-1}) = sum_c w_c(z_1, ..., z_{d-1}) Phi((z_d - m_cd) / s_cd)

turn a draw into independent uniform numbers. Kept fixed while the logits l move, they say how z moves, without any
inverse of F, since dF/dz is triangular, with the conditional densities on its diagonal:

    dz = -(dF / dz)^-1 (dF / dl) dl

Pyro's MixtureOfDiagNormals (Jankowiak and Karaletsos 2019, arXiv:1806.01856) divides by the density, which leaves the
range of float32 in 50 dimensions, and takes neither D = 1 nor a sample_shape.

Reference: Figurnov, Mohamed and Mnih, Implicit Reparameterization Gradients, 2018. arXiv:1805.08498

A mixture for all data, log p(z) = log sum_c w_c p_c(z), is scored without torch's table of (K, B, C, D). For C diagonal
normals the quadratic form falls apart into two matrix products,

    -1/2 sum_d (z_d - mu_cd)^2 / s_cd^2 = z^2 . (-1/2 / s_c^2) + z . (mu_c / s_c^2) - 1/2 |mu_c / s_c|^2

whose terms are large and cancel: in float32, at 500 components of scale 0.1 in 50 dimensions, the log density is off by
1e-2 nats, in float64 by 2e-6. Other components score every value one by one, in parts that are computed again on the
way back, so that 50 samples of 64 data under 500 splines take seconds and not the machine's memory.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import checkpoint

from pyro_vae.parts.distributions.normal import LOG_TWO_PI, Kept, Whole
from pyro_vae.protocols import passes


class DiagonalNormalMixture(Kept):
    """sum_c w_c N(z; m_c, diag s_c^2), with w = softmax(logits).

    `rsample` carries the derivatives in means, scales and logits, in memory O(D^2 + C D) a sample. They are first
    derivatives: a second one through a sample is not meant to be taken. Arguments are trusted, not validated.

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
    loc = Whole(2)  # m, (..., C, D)
    scale = Whole(2)  # s, (..., C, D)
    logits = Whole(1)  # log w, normalised, (..., C)

    def __init__(self, loc: Tensor, scale: Tensor, logits: Tensor) -> None:
        self._loc, self._scale, self._logits = loc, scale, logits.log_softmax(-1)
        batch_shape = torch.broadcast_shapes(loc.shape[:-2], scale.shape[:-2], logits.shape[:-1])
        super().__init__(batch_shape, loc.shape[-1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self._whole((self._logits.exp().unsqueeze(-1) * self._loc).sum(-2))

    @property
    def variance(self) -> Tensor:
        within = self._scale.square() + (self._loc - self.mean.unsqueeze(-2)).square()
        return self._whole((self._logits.exp().unsqueeze(-1) * within).sum(-2))

    def log_prob(self, value: Tensor) -> Tensor:
        log_density = _log_normal(value.unsqueeze(-2), self._loc, self._scale).sum(-1)
        shape = torch.broadcast_shapes(self.batch_shape, value.shape[:-1])
        return (log_density + self._logits).logsumexp(-1).expand(shape)

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
    return -0.5 * ((value - loc) / scale).square() - scale.log() - 0.5 * LOG_TWO_PI


def _normal_cdf(value: Tensor) -> Tensor:
    # Not torch.special.ndtr: in float32 it has lost half its value at -5.5, and all of it at -6.
    return 0.5 * torch.erfc(-value * math.sqrt(0.5))


# Numbers drawn at a time where the components have to be drawn before one of them is chosen.
_CHUNK = 2**24
# Pairs of a value and a component that are scored at a time, of components that need a table.
_PAIRS = 2**14
# Parts up to which a step over them is worth being captured as one graph.
_CAPTURED = 3


class SharedMixture(Kept):
    """p(z) = sum_c w_c p_c(z), with components that are not copied when it is expanded.

    Args:
        logits: log w_c up to a constant, (C,).
        components: Distributions p_c of batch_shape (C,) and event_shape (D,).
    Raises:
        ValueError: Components of another batch_shape or event_shape.
    Example:
        >>> components = dist.Normal(torch.tensor([[-1.0], [1.0]]), 1.0).to_event(1)
        >>> SharedMixture(torch.zeros(2), components).log_prob(torch.zeros(1))
        tensor(-1.4189)
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = False

    def __init__(self, logits: Tensor, components: TorchDistribution) -> None:
        if logits.dim() != 1 or components.batch_shape != logits.shape or len(components.event_shape) != 1:
            raise ValueError(
                f"got logits of shape {tuple(logits.shape)} and components of batch_shape "
                f"{tuple(components.batch_shape)} and event_shape {tuple(components.event_shape)}, wanted (C,), (C,) "
                "and (D,). Did you forget .to_event(1)?"
            )
        self.log_weights = logits.log_softmax(-1)
        self.components = components
        super().__init__(Size(), components.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.components.support

    @property
    def mean(self) -> Tensor:
        return self._whole(self.log_weights.exp() @ self.components.mean)

    @property
    def variance(self) -> Tensor:
        weights, means = self.log_weights.exp(), self.components.mean
        spread = means - weights @ means
        return self._whole(weights @ (self.components.variance + spread.square()))

    def log_prob(self, value: Tensor) -> Tensor:
        normal = _diagonal(self.components)
        if normal is None:
            return self._one_by_one(value)
        scores = _normal_scores(value, *normal)
        result = torch.logsumexp(scores + self.log_weights, -1).to(value.dtype)
        return result.expand(torch.broadcast_shapes(result.shape, self.batch_shape))

    @property
    def passes(self) -> int:
        """How many networks look at a value to score it: one for each component that is a flow, or none."""
        return len(self.log_weights) * passes(self.components)

    def _one_by_one(self, value: Tensor) -> Tensor:
        """log p(z) of components that have to look at every value, in parts."""

        def scored(part: Tensor) -> Tensor:
            return torch.logsumexp(self.components.log_prob(part.unsqueeze(-2)) + self.log_weights, -1)

        leading = value.shape[: value.dim() - 1]
        flat = value.reshape((math.prod(leading),) + self.event_shape)
        size = max(1, _PAIRS // len(self.log_weights))
        if len(flat) > size and torch.is_grad_enabled():
            if get_proxy_mode() is not None and len(flat) > _CAPTURED * size:
                raise RuntimeError(
                    f"{-(-len(flat) // size)} parts of a mixture of {len(self.log_weights)} networks, which to write "
                    "down takes longer than it saves"
                )
            result = torch.cat([checkpoint(scored, part, use_reentrant=False) for part in flat.split(size)])
        else:
            result = torch.cat([scored(part) for part in flat.split(size)])
        return result.reshape(leading).expand(torch.broadcast_shapes(leading, self.batch_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            shape = Size(sample_shape) + self.batch_shape
            chosen = torch.distributions.Categorical(logits=self.log_weights, validate_args=False).sample(shape)
            normal = _diagonal(self.components)
            if normal is not None:
                loc, scale = (parameter[chosen] for parameter in normal)
                return loc + scale * torch.randn_like(loc)
            flat = chosen.reshape(-1)
            size = max(1, _CHUNK // (len(self.log_weights) * self.event_shape[0]))
            every = (self.components.sample(part.shape) for part in flat.split(size))  # (n, C, D)
            drawn = [z[torch.arange(len(z), device=z.device), c] for z, c in zip(every, flat.split(size), strict=True)]
            return torch.cat(drawn).reshape(shape + self.event_shape)


def _diagonal(components: TorchDistribution) -> tuple[Tensor, Tensor] | None:
    """Means and scales, (C, D) each, of components that are diagonal normals."""
    if isinstance(components, torch.distributions.Independent):
        normal = components.base_dist
        if isinstance(normal, torch.distributions.Normal) and components.reinterpreted_batch_ndims == 1:
            return normal.loc, normal.scale
    return None


def _normal_scores(value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """log N(z; mu_c, diag s_c^2), (..., C), in float64 where the device has it."""
    if value.device.type != "mps":
        value, loc, scale = value.double(), loc.double(), scale.double()
    centre = loc.detach().mean(0)
    value, loc = value - centre, loc - centre
    precision = scale.pow(-2)
    linear = precision * loc
    constant = -0.5 * (linear * loc).sum(-1) - scale.log().sum(-1) - 0.5 * loc.shape[-1] * LOG_TWO_PI
    return value.square() @ (-0.5 * precision).mT + value @ linear.mT + constant


def normals(loc: Tensor, scale: Tensor) -> TorchDistribution:
    """C diagonal normals, from means and scales (C, D), as components of a mixture."""
    return dist.Normal(loc, scale, validate_args=False).to_event(1)
