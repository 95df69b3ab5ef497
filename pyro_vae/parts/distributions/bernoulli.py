"""Bernoulli and continuous Bernoulli by their logits, accurate at all of them.

The density on [0, 1] proportional to p^x (1 - p)^(1 - x) is, in its logit l = log p / (1 - p), the exponential family

    p(x; l) = exp(l x - A(l)),   A(l) = log (e^l - 1) / l = l/2 + log (sinh(l/2) / (l/2))

with mean A'(l) and variance A''(l). That is 0/0 at l = 0, and e^l overflows at the other end. Here two branches, whose
derivatives of any order keep their digits, meet at |l| = 1:

    |l| <= 1   l (x - 1/2) - sum_k B_2k l^2k / (2k (2k)!)      Bernoulli numbers B_2k; converges for |l| < 2 pi
    |l| > 1    l (x - [l > 0]) - log (1 - e^-|l|) / |l|
"""

from __future__ import annotations

import copy
import math
from typing import Any, TypeVar

import numpy as np
import torch
from pyro.distributions import Bernoulli as PyroBernoulli
from pyro.distributions import Independent, MaskedDistribution, constraints
from torch import Tensor

from pyro_vae.parts.distributions.levels import Number

_Self = TypeVar("_Self", bound="BernoulliLogits")
_TOGETHER = 64  # factors 1 + exp(-|l|) under one logarithm: they are at most 2, and lose no more digits than its sum
_LANES = 16  # numbers that a processor multiplies at once


class _BernoulliLogProb(torch.autograd.Function):
    """x l - softplus(l), summed over the last dimensions, with the gradient x - sigmoid(l).

    In half the passes of autograd's; where no gradient is wanted, with one logarithm of many numbers, log a + log b =
    log a b. The maximum is taken off first, where it cancels x l exactly at x = 1.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, x: Tensor, dims: int, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(logits, x, mask)
        ctx.dims = dims
        rest = logits.abs().neg_().exp_().add_(1)  # in place: these passes are bound by memory
        linear = (x * logits).sub_(logits.clamp(min=0))
        if mask is not None:
            rest, linear = rest.masked_fill_(~mask, 1.0), linear.masked_fill_(~mask, 0.0)
        if not dims or any(ctx.needs_input_grad):
            linear = linear.sub_(rest.log_())
            return linear.flatten(-dims).sum(-1) if dims else linear
        rest, linear = rest.flatten(-dims), linear.flatten(-dims)
        together = _together_of(rest.shape[-1])
        if together > 1 and torch.finfo(rest.dtype).eps <= torch.finfo(torch.float32).eps:
            # Along the rows of a table, and both in one pass: nothing is moved between lanes.
            rest, linear = (part.unflatten(-1, (together, -1)) for part in (rest, linear))
            rest, linear = rest.prod(-2), linear.sum(-2)
        return (linear - rest.log_()).sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        logits, x, mask = ctx.saved_tensors
        grad = grad[(..., *[None] * ctx.dims)]
        grad = grad if mask is None else grad.expand(mask.shape).masked_fill(~mask, 0)
        in_logits = grad * (x - torch.sigmoid(logits)) if ctx.needs_input_grad[0] else None
        in_x = grad * logits if ctx.needs_input_grad[1] else None
        return in_logits, in_x, None, None


def _together_of(size: int) -> int:
    """How many of so many factors go under one logarithm: the tables that are left have whole lanes where they can."""
    divisors = (n for n in range(1, _TOGETHER + 1) if size % n == 0)
    return max(divisors, key=lambda n: (math.gcd(size // n, _LANES), n), default=1)


def _scored(logits: Tensor, value: Tensor, dims: int = 0, mask: Tensor | None = None) -> Tensor:
    logits, value = torch.broadcast_tensors(logits, value)
    return _BernoulliLogProb.apply(logits, value, dims, None if mask is None else mask.expand(logits.shape))


class _Pixels(Independent):
    """Independent `BernoulliLogits`, some of which a mask may leave out, scored together."""

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> Any:
        more = len(self.batch_shape) if reinterpreted_batch_ndims is None else reinterpreted_batch_ndims
        return self.base_dist.to_event(more + self.reinterpreted_batch_ndims)

    def log_prob(self, value: Tensor) -> Tensor:
        pixel, mask = self.base_dist, None
        if isinstance(pixel, _SomePixels):
            pixel, mask = pixel.base_dist, pixel._mask
            if not isinstance(mask, Tensor):
                return super().log_prob(value)
        return _scored(pixel.logits, value, self.reinterpreted_batch_ndims, mask)


def _together(pixel: Any, independent: Any) -> Any:
    dims = getattr(independent, "reinterpreted_batch_ndims", 0)
    base = pixel.base_dist if isinstance(pixel, _SomePixels) else pixel
    ours = type(base).log_prob is BernoulliLogits.log_prob
    return _Pixels(pixel, dims) if dims > 0 and ours else independent


class _SomePixels(MaskedDistribution):
    """`BernoulliLogits` under a mask."""

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> Any:
        return _together(self, super().to_event(reinterpreted_batch_ndims))


class BernoulliLogits(PyroBernoulli):
    """Bernoulli with logits l: log p(x) = x l - log(1 + exp(l)).

    The numbers are Pyro's; its ``log_prob`` is about four times faster on a CPU.
    Grey values 0 < x < 1 are scored by the same formula, which is then no density.

    Args:
        logits: l, any shape.
    Reference: torch.distributions.Bernoulli.
    """

    def __init__(self, logits: Tensor, validate_args: bool | None = False) -> None:
        super().__init__(logits=logits, validate_args=validate_args)

    def expand(self: _Self, batch_shape: Any, _instance: Any = None) -> _Self:
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        return super().expand(batch_shape, copy.copy(self) if _instance is None else _instance)  # of its own class

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> Any:
        return _together(self, super().to_event(reinterpreted_batch_ndims))

    def mask(self, mask: Any) -> Any:
        return _SomePixels(self, mask)

    def log_prob(self, value: Tensor) -> Tensor:
        return _scored(self.logits, value)


_BERNOULLI_NUMBERS = (
    1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510, 43867 / 798, -174611 / 330, 854513 / 138,
)  # fmt: skip
_SERIES = tuple(b / (2 * k * math.factorial(2 * k)) for k, b in enumerate(_BERNOULLI_NUMBERS, 1))
_FIRST = tuple(2 * k * c for k, c in enumerate(_SERIES, 1))
_SECOND = tuple((2 * k - 1) * c for k, c in enumerate(_FIRST, 1))
# Gauss-Legendre on [0, 1]: 8 nodes integrate the smooth integrand of `icdf` to 1e-17.
_NODES = tuple((0.5 + 0.5 * float(s), 0.5 * float(w)) for s, w in zip(*np.polynomial.legendre.leggauss(8), strict=True))


def polynomial(coefficients: tuple[float, ...], t: Tensor) -> Tensor:
    """sum_k c_k t^k, of series."""
    # At |l| <= 1 each term is 40 times smaller than the last: six are float32's share.
    used = coefficients if torch.finfo(t.dtype).eps < 1e-10 else coefficients[:6]
    total = torch.full_like(t, used[-1])
    for c in used[-2::-1]:
        total = total * t + c
    return total


def _branches(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where |l| > 1; |l| and l for either branch, held where they are finite if the other branch counts, well beyond
    |l| = 1, since a clamp has no derivative at its end."""
    size = logits.abs()
    return size > 1, size.clamp(min=0.5), logits.clamp(-2, 2)


def _mean_from_end(logits: Tensor) -> Tensor:
    """E[x] - [l > 0]: the mean from the end of [0, 1] that it is drawn to, whose digits a mean near 1 would lose."""
    far, a, near = _branches(logits)
    distance = 1 / a + torch.exp(-a) / torch.expm1(-a)
    middle = near * polynomial(_FIRST, near * near) + (0.5 - (logits > 0).to(logits.dtype))
    return torch.where(far, -torch.sign(logits) * distance, middle)


class _LogProb(torch.autograd.Function):
    """l x - A(l) with the gradient x - E[x], in half the time of autograd's."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(logits, x)
        far, a, near = _branches(logits)
        # x - 1 before the product: at l = 1000 the difference of l x and l would keep four digits.
        outer = logits * (x - (logits > 0).to(x.dtype)) - torch.log(-torch.expm1(-a) / a)
        square = near * near
        return torch.where(far, outer, near * (x - 0.5) - square * polynomial(_SERIES, square))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        logits, x = ctx.saved_tensors
        slope = x - (logits > 0).to(x.dtype) - _mean_from_end(logits) if ctx.needs_input_grad[0] else None
        return None if slope is None else grad * slope, grad * logits if ctx.needs_input_grad[1] else None


class ContinuousBernoulliLogits(Number):
    """p(x) = exp(l x - A(l)) on [0, 1], A(l) = log (e^l - 1) / l.

    torch's ``ContinuousBernoulli`` clips its probabilities, so that in float32 log p is off by 2.5 nats at
    l = 200, and its Taylor branch is so narrow that beside it the second derivative is off by 0.17.

    Args:
        logits: l, any shape.
    Example:
        >>> ContinuousBernoulliLogits(torch.tensor([-1e3, 2.0])).log_prob(torch.tensor([0.0, 0.7]))
        tensor([6.9078, 0.2386])

    Reference: Loaiza-Ganem and Cunningham, The continuous Bernoulli: fixing a pervasive error in variational
        autoencoders, 2019. arXiv:1907.06845
    """

    arg_constraints = {"logits": constraints.real}
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=validate_args)

    def _score(self, value: Tensor) -> Tensor:
        logits, value = torch.broadcast_tensors(self.logits, value)
        return _LogProb.apply(logits, value)

    @property
    def mean(self) -> Tensor:
        return _mean_from_end(self.logits) + (self.logits > 0).to(self.logits.dtype)

    @property
    def variance(self) -> Tensor:
        far, a, near = _branches(self.logits)
        outer = 1 / a.square() - torch.exp(-a) / torch.expm1(-a).square()
        return torch.where(far, outer, polynomial(_SECOND, near * near))

    def entropy(self) -> Tensor:
        """A(l) - l E[x], in nats: log p is linear in x."""
        return -ContinuousBernoulliLogits(self.logits, validate_args=False).log_prob(self.mean)

    def icdf(self, value: Tensor) -> Tensor:
        """The x below which lies a share u of the mass.

            x = log (1 + u (e^l - 1)) / l = 1/2 + int_0^1 (w + t) / (1 + w t) / 2 ds,   t = tanh(s l / 2), w = 2 u - 1

        The integral is smooth at l = 0 in all its derivatives, the logarithm is not.
        """
        far, a, near = _branches(self.logits)
        positive = self.logits > 0
        y = -torch.log1p(torch.where(positive, 1 - value, value) * torch.expm1(-a)) / a
        w = 2 * value - 1
        inner = torch.full_like(near * w, 0.5)
        for s, weight in _NODES:
            t = torch.tanh(near * (s / 2))
            inner = inner + 0.5 * weight * (w + t) / (1 + w * t)
        return torch.where(far, torch.where(positive, 1 - y, y), inner).clamp(0, 1)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        eps = torch.finfo(self.logits.dtype).eps  # at u = 0 and 1 the path has no derivative
        u = torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device).clamp(eps, 1 - eps)
        return self.icdf(u)
