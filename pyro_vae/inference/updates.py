"""Adam's step as tensor operations, for a graph that holds a whole training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pyro_vae.inference.optimizers import Fused


class Update:
    """Adam's step as plain tensor operations, on the moments that a torch optimiser holds.

        m <- m + (1 - b1) (g - m),   v <- b2 v + (1 - b2) g^2
        p <- p - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)

    What changes from step to step (t, the learning rate, the limit of a clip) enters as a tensor, written
    by `advance` before each step, so that a graph of the operations need not change.
    """

    def __init__(self, owner: Fused, optimizer: torch.optim.Optimizer) -> None:
        self.owner, self.optimizer, self.clip_norm = owner, optimizer, owner.clip_norm
        self.settings = owner.settings
        (self.group,) = optimizer.param_groups
        self.decoupled = type(optimizer) is torch.optim.AdamW or self.group.get("decoupled_weight_decay", False)
        self.parameters: list[Tensor] = list(self.group["params"])
        self._counters = [optimizer.state[p]["step"] for p in self.parameters]
        self._numbers = self.parameters[0].detach().new_zeros(4)

    def advance(self, steps: int = 1) -> None:
        """Count a step (or take one back), and write down what the operations need to know of it."""
        self.owner.count += steps
        torch._foreach_add_(self._counters, steps)
        (first, second), rate, count = self.group["betas"], float(self.group["lr"]), self.owner.count
        if count > 0:
            limit = (self.clip_norm or 0.0) * self.owner.scale
            numbers = [rate / (1 - first**count), (1 - second**count) ** -0.5, rate, limit]
            self._numbers.copy_(torch.tensor(numbers, dtype=self._numbers.dtype), non_blocking=True)

    def tensors(self) -> list[Tensor]:
        """All that a step changes in place."""
        moments = [self.optimizer.state[p][name] for p in self.parameters for name in ("exp_avg", "exp_avg_sq")]
        return [*self.parameters, *moments]

    def __call__(self, leaves: list[Tensor], gradients: list[Tensor]) -> None:
        """Step these parameters, exactly the optimiser's, along these gradients, in place."""
        if {id(p) for p in leaves} != {id(p) for p in self.parameters}:
            raise ValueError("the gradients are not those of the optimiser's parameters")
        scaled_rate, inverse_root, rate, limit = self._numbers.unbind()
        if self.clip_norm is not None:
            total = sum((g.square().sum() for g in gradients), self._numbers.new_zeros(())).sqrt()
            factor = (limit / (total + 1e-6)).clamp(max=1.0)
            gradients = [g * factor for g in gradients]
        (first, second), decay, eps = self.group["betas"], self.group["weight_decay"], self.group["eps"]
        for p, g in zip(leaves, gradients, strict=True):
            m, v = (self.optimizer.state[p][name] for name in ("exp_avg", "exp_avg_sq"))
            if decay and self.decoupled:
                p.mul_(1 - rate * decay)
            elif decay:
                g = g + decay * p
            m.lerp_(g, 1 - first)
            v.mul_(second).addcmul_(g, g, value=1 - second)
            p.sub_(scaled_rate * m / (v.sqrt() * inverse_root + eps))

    def kernel(self, leaves: list[Tensor]) -> Callable[[Sequence[Tensor]], None] | None:
        """The same step by torch's fused kernel, as a function of the gradients; None where it cannot be had.

        One pass over the memory instead of nine. The gradients have the layout of the parameters, and are changed.
        """
        state = self.optimizer.state
        for p in leaves:
            mine = [state[p][name] for name in ("exp_avg", "exp_avg_sq")]
            dense = torch.empty_like(p).stride() == p.stride()
            same = all(each.stride() == p.stride() and each.dtype == p.dtype for each in mine)
            step = state[p]["step"]
            if p.device.type != "cpu" or p.dtype not in (torch.float32, torch.float64) or not dense or not same:
                return None
            if not isinstance(step, Tensor) or step.device.type != "cpu" or step.dtype != torch.float32:
                return None
        adam = torch._fused_adamw_ if self.decoupled else torch._fused_adam_

        def step_along(given: Sequence[Tensor]) -> None:
            gradients = list(given)
            if self.clip_norm is not None:
                clip(gradients, self.clip_norm * self.owner.scale)
            (first, second), group = self.group["betas"], self.group
            moments, squares, steps = ([state[p][key] for p in leaves] for key in ("exp_avg", "exp_avg_sq", "step"))
            adam(
                leaves, gradients, moments, squares, [], steps, lr=float(group["lr"]), beta1=first, beta2=second,
                weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
            )  # fmt: skip

        return step_along


def clip(gradients: list[Tensor], limit: float) -> None:
    """Shorten gradients, in place, where their joint norm is above a limit."""
    norms = torch.stack(torch._foreach_norm(gradients))
    # SVI hands over a set: sorted, the sum does not depend on its order.
    total = torch.linalg.vector_norm(norms.sort().values)
    torch._foreach_mul_(gradients, (limit / (total + 1e-6)).clamp(max=1.0))
