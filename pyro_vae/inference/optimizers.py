"""One optimiser step for all parameters, behind Pyro's optimiser interface.

``pyro.optim.PyroOptim`` keeps one torch optimiser per tensor, so that no fused kernel
can run and clipping is per tensor. `Fused` keeps one for all, and ``pyro.infer.SVI``
drives it just the same.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from pyro.optim import PyroOptim
from torch import Tensor

Schedule: TypeAlias = Callable[[float], float]


def constant(fraction: float) -> float:
    """1 throughout."""
    return 1.0


def cosine(fraction: float) -> float:
    """From 1 to 0 along half a cosine. Loshchilov and Hutter 2017, arXiv:1608.03983."""
    return 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))


def one_cycle(fraction: float, warm: float = 0.1) -> float:
    """Linearly up to 1 in the first tenth, then to 0 along half a cosine.

    Reference: Smith and Topin, Super-Convergence, 2018. arXiv:1708.07120
    """
    return (fraction + 1e-3) / (warm + 1e-3) if fraction < warm else cosine((fraction - warm) / (1 - warm))


SCHEDULES: dict[str, Schedule] = {"constant": constant, "cosine": cosine, "one-cycle": one_cycle}


class Fused(PyroOptim):
    """One torch optimiser for all parameters, with a schedule and global clipping.

    Args:
        constructor: A torch optimiser class.
        options: Its keyword arguments; ``fused=True`` is added where it is supported.
        clip_norm: Upper limit of the joint gradient norm of all parameters, in units of `scale`.
    Attributes:
        scale: What the loss is a multiple of, such as the scale of a plate; 1 if nobody says.
        parameters: The tensors that had a gradient so far.
        count: Steps taken.
    Raises:
        ValueError: A learning rate or clip_norm that is not positive.
    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0]))
        >>> weight.grad = torch.tensor([4.0])
        >>> Fused(torch.optim.SGD, {"lr": 1.0}, clip_norm=1.0)([weight])
        >>> weight.data
        tensor([2.0000])
    """

    def __init__(
        self,
        constructor: type[torch.optim.Optimizer] = torch.optim.Adam,
        options: dict[str, Any] | None = None,
        clip_norm: float | None = None,
    ) -> None:
        options = {"lr": 1e-3} | (options or {})
        if not options["lr"] > 0:
            raise ValueError(f"the learning rate must be positive, got {options['lr']}.")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be positive or None, got {clip_norm}.")
        super().__init__(constructor, options)
        self.constructor, self.options = constructor, options
        self.clip_norm = clip_norm
        self.scale = 1.0
        self.learning_rate: float = options["lr"]
        self.parameters: set[Tensor] = set()
        self._factor = 1.0
        self._optimizer: torch.optim.Optimizer | None = None
        self.count = 0
        self._even = True  # whether all parameters took part in every step
        self._update: Update | None = None

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Step all parameters that have a gradient; new ones join the optimiser."""
        params = [p for p in params if p.grad is not None]
        new = [p for p in params if p not in self.parameters]
        if new:
            self.parameters.update(new)
            self._add(new)
        if self._optimizer is None:
            return
        self._even = self._even and len(params) == len(self.parameters)
        if self.clip_norm is not None:
            self._clip(params)
        self._optimizer.step()
        self.count += 1
        # SVI zeroes gradients with a fresh tensor for each; None spares that and an addition in backward.
        for p in params:
            p.grad = None

    def set_learning_rate(self, factor: float) -> None:
        """Scale the initial learning rate by a factor, for parameters yet to join as well."""
        self._factor = factor
        for group in self._optimizer.param_groups if self._optimizer is not None else ():
            group["lr"] = self.learning_rate * factor

    def inside(self) -> Update | None:
        """This optimiser's step as tensor operations, for a graph that holds a whole training step.

        None where there is no such form: before the first step, for another algorithm than Adam and AdamW, where
        parameters took part in different numbers of steps, or where an option changes the algorithm.
        """
        optimizer = self._optimizer
        if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or not self._even:
            return None
        assert optimizer is not None
        (group, *more) = optimizer.param_groups
        tensors = group["params"]
        made = self._update
        if made is not None and made.optimizer is optimizer and len(made.parameters) == len(tensors):
            return made
        plain = not any(group[name] for name in ("amsgrad", "maximize", "differentiable"))
        known = all(p in optimizer.state and p.is_floating_point() for p in tensors)
        if more or not plain or not known or len({(p.dtype, p.device) for p in tensors}) != 1:
            return None
        if {int(optimizer.state[p]["step"]) for p in tensors} != {self.count}:
            return None
        self._update = Update(self, optimizer)
        return self._update

    def get_state(self) -> dict[str, Any]:
        """State of the torch optimiser."""
        return {} if self._optimizer is None else self._optimizer.state_dict()

    def moments(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """The optimiser's state of each of these tensors that has one, by name."""
        state = {} if self._optimizer is None else self._optimizer.state
        return {
            name: {key: torch.as_tensor(value) for key, value in state[tensor].items() if value is not None}
            for name, tensor in tensors.items()
            if tensor in state
        }

    def restore(self, tensors: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take up `moments` again, in a new process too."""
        joining = [tensors[name] for name in sorted(moments)]
        if not joining:
            return
        self.parameters.update(joining)
        self._add(joining)
        assert self._optimizer is not None
        for name in moments:
            self._optimizer.state[tensors[name]] = dict(moments[name])
        self.count = max(int(state.get("step", 0)) for state in moments.values())

    def _add(self, new: list[Tensor]) -> None:
        if self._optimizer is not None:
            self._optimizer.add_param_group({"params": new})
        else:
            options = dict(self.options)
            floating = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in new)
            if floating and "fused" in inspect.signature(self.constructor).parameters:
                options.setdefault("fused", True)
            self._optimizer = self.constructor(new, **options)
        # The optimiser is made by the first step, which has a rate of its own already.
        self.set_learning_rate(self._factor)

    def _clip(self, params: list[Tensor]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(grads))
        # SVI hands over a set: sorted, the sum does not depend on its order.
        total = torch.linalg.vector_norm(norms.sort().values)
        assert self.clip_norm is not None
        torch._foreach_mul_(grads, (self.clip_norm * self.scale / (total + 1e-6)).clamp(max=1.0))


class Update:
    """Adam's step as plain tensor operations, on the moments that a torch optimiser holds.

        m <- m + (1 - b1) (g - m),   v <- b2 v + (1 - b2) g^2
        p <- p - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)

    What changes from step to step (t, the learning rate, the limit of a clip) enters as a tensor, written
    by `advance` before each step, so that a graph of the operations need not change.

    Args:
        owner: Who counts the steps.
        optimizer: Its torch Adam or AdamW, which has taken its first step.
    """

    def __init__(self, owner: Fused, optimizer: torch.optim.Optimizer) -> None:
        self.owner, self.optimizer, self.clip_norm = owner, optimizer, owner.clip_norm
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
        """Step these parameters along these gradients, in place.

        Raises:
            ValueError: Not exactly the optimiser's parameters.
        """
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
