"""Objectives: a bound turned into a loss that ``pyro.infer.SVI`` minimises.

An `Objective` is a ``pyro.infer.ELBO``. It draws the particles, applies the bound per
datum, and sums. What it reports is always the bound; tempering changes only what is
differentiated.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_vae.inference.batches import Batches, seeded
from pyro_vae.inference.bounds import Bound, elbo
from pyro_vae.parameters import device_of, own_parameters
from pyro_vae.traces import Particles, Program, draw, plate_nesting


class Objective(ELBO):
    """Minus a bound, summed over data, as a loss for ``pyro.infer.SVI``.

        loss = - scale * sum_x bound(particles(x))

    The gradient is the total derivative along reparameterised samples. With beta the
    differentiated ELBO is E_q[log p(x | z) - beta (log q(z | x) - log p(z))]; the
    reported one stays that of beta = 1.

    Args:
        bound: Particles to one number per datum: `elbo`, `iwae`, `reconstruction`, ...
        num_samples: K, drawn in one pass where the pair broadcasts.
        beta: Weight of log q - log p(z), for the `elbo` only.
        max_plate_nesting: Depth of the pair's plates; guessed at the first call with
            K > 1 when not given (by one run that leaves the random state alone).
    Attributes:
        last_bound: The bound of the most recent call in nats, summed over data, with
            the scale and at beta = 1; a tensor without gradient.
    Raises:
        ValueError: K < 1; beta != 1 with another bound; a guide site that cannot be
            reparameterised; all that `particles` refuses.
    Example:
        >>> from pyro_vae.inference.bounds import iwae
        >>> Objective(iwae, num_samples=50)
        Objective(iwae, num_samples=50)
    """

    def __init__(
        self,
        bound: Bound = elbo,
        num_samples: int = 1,
        *,
        beta: float = 1.0,
        max_plate_nesting: int | None = None,
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples must be a positive integer, got {num_samples}.")
        super().__init__(
            num_particles=num_samples,
            max_plate_nesting=math.inf if max_plate_nesting is None else max_plate_nesting,
            vectorize_particles=False,
        )
        self.bound = bound
        self.num_samples = num_samples
        self.beta = beta
        self.last_bound: Tensor | None = None

    def __repr__(self) -> str:
        name = getattr(self.bound, "__name__", repr(self.bound))
        beta = "" if self.beta == 1 else f", beta={self.beta:g}"
        return f"Objective({name}, num_samples={self.num_samples}{beta})"

    def particles(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Particles:
        """Draw the K particles that the bound is computed from."""
        if self.num_samples > 1 and self.max_plate_nesting == math.inf:
            self.max_plate_nesting = plate_nesting(model, guide, *args, **kwargs)
        nesting = None if self.max_plate_nesting == math.inf else int(self.max_plate_nesting)
        return draw(model, guide, args, kwargs, self.num_samples, max_plate_nesting=nesting)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, with gradients to the parameters of model and guide."""
        particles = self.particles(model, guide, *args, **kwargs)
        if torch.is_grad_enabled() and particles.fixed:
            raise ValueError(
                f"guide site {particles.fixed[0]!r} has no reparameterised sampler, so its gradient along the sample "
                "does not exist. Use Pyro's Trace_ELBO or TraceGraph_ELBO (score function), or TraceEnum_ELBO."
            )
        values = self.bound(particles)
        self.last_bound = particles.scale * values.detach().sum()
        if self.beta != 1:
            values = self._tempered(particles)
        return -particles.scale * values.sum()

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss as a number."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss as a number; its gradients are added to the parameters' ``.grad``."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    def _tempered(self, particles: Particles) -> Tensor:
        if self.bound is not elbo:
            raise ValueError(f"beta={self.beta:g} tempers the elbo only, got {self!r}. Leave beta at 1.")
        rate = particles.log_weight - particles.log_likelihood  # log p(z) - log q(z | x)
        return (particles.log_likelihood + self.beta * rate).mean(0)

    def _get_trace(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("Objective reads its particles through pyro_vae.traces.")


def mean_bound(
    model: Program,
    guide: Program,
    data: Any,
    bound: Bound = elbo,
    *,
    num_samples: int = 1,
    batch_size: int = 500,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> float:
    """A bound averaged over data, at fixed noise, in nats per datum.

    Args:
        model: A Pyro program for p(x, z).
        guide: A Pyro program for q(z | x).
        data: As for `fit`.
        bound: The bound.
        num_samples: K.
        batch_size: Data scored at a time.
        device: Where the batches go; where the modules are when not given.
        seed: Seed of the noise, so that epochs are compared on the same draws.
    Returns:
        The mean over the data.
    """
    objective = Objective(bound, num_samples)
    batches = Batches(data, batch_size, device_of(model, guide) if device is None else device, shuffle=False)
    total, count = 0.0, 0
    with own_parameters(model, guide), seeded(seed), torch.no_grad():
        for batch in batches:
            total += bound(objective.particles(model, guide, *batch)).double().sum().item()
            count += len(batch[0])
    return total / count
