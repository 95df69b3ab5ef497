"""Hamiltonian Monte Carlo for many data at once, each with its own step size and acceptance.

For C chains of B data, a position u and a momentum v ~ N(0, I) move in coordinates that a
scale s (per datum and dimension) has made comparable, with the leapfrog steps

    v <- v + e/2 s g(u),   u <- u + e s v,   v <- v + e/2 s g(u),   g = gradient of log f

and the end is accepted with probability min(1, f(u') N(v') / f(u) N(v)), per chain and
datum. The move leaves f invariant whatever e and s are, as long as they do not depend on
the chain that moves; so they are tuned beforehand, on other draws.

The density may have several rows f_j, (J, C, B), of which a move targets the geometric
mixture sum_j a_j log f_j. Keeping the rows apart lets an annealed chain change a without
evaluating anything anew.

Reference: Neal, MCMC using Hamiltonian dynamics, 2011. arXiv:1206.1901
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.inference.replays import Replayed
from pyro_vae.traces import Program

Density = Callable[[Tensor], tuple[Tensor, Tensor]]

# A trajectory whose length is exactly a period of the target would never leave its start.
JITTER = 0.2


class State(NamedTuple):
    """C chains of B data at one moment.

    Attributes:
        position: u, (C, B, U).
        values: log f_j(u), (J, C, B).
        gradients: Their gradients, (J, C, B, U).
    """

    position: Tensor
    values: Tensor
    gradients: Tensor

    @classmethod
    def at(cls, density: Density, position: Tensor) -> State:
        """The state of chains at a position."""
        return cls(position, *density(position))


class Adaptation(NamedTuple):
    """Dual averaging of log step sizes, one per datum, (B,) each.

    Attributes:
        log_step: What to use next.
        averaged: What to freeze at the end.
        error: Running mean of target minus acceptance.
        centre: What log_step is shrunk towards.
        updates: So far.
    """

    log_step: Tensor
    averaged: Tensor
    error: Tensor
    centre: Tensor
    updates: int

    @classmethod
    def start(cls, step_size: Tensor) -> Adaptation:
        """Begin at a step size, (B,)."""
        log_step = step_size.log()
        return cls(log_step, log_step, torch.zeros_like(log_step), log_step + math.log(2.0), 0)

    def update(self, acceptance: Tensor, target: float) -> Adaptation:
        """Take in the acceptance of one move, averaged over chains, (B,).

        Reference: Hoffman and Gelman, The No-U-Turn Sampler, 2014, section 3.2. arXiv:1111.4246
        """
        count = self.updates + 1
        weight = 1 / (count + 10)
        error = (1 - weight) * self.error + weight * (target - acceptance)
        log_step = self.centre - math.sqrt(count) / 0.1 * error
        keep = count**-0.75
        averaged = keep * log_step + (1 - keep) * self.averaged
        return Adaptation(log_step, averaged, error, self.centre, count)


def transition(
    state: State, density: Density, mixture: Tensor, step_size: Tensor, scale: Tensor, num_leapfrog: int
) -> tuple[State, Tensor]:
    """One Metropolis-corrected move of every chain.

    The step size of each chain is jittered by up to 20 %, independently of where it is.

    Args:
        state: Where the chains are.
        density: u to log f_j and gradients.
        mixture: a, (J,), or (J, B) for each datum its own.
        step_size: e per datum, (B,).
        scale: s, (B, U).
        num_leapfrog: Leapfrog steps, each of which evaluates the density once.
    Returns:
        The new state, and the probability of acceptance, (C, B).
    Example:
        >>> def normal(u):
        ...     return -0.5 * u.square().sum(-1)[None], -u[None]
        >>> state = State.at(normal, torch.zeros(4, 3, 2))
        >>> state, acceptance = transition(state, normal, torch.ones(1), torch.ones(3), torch.ones(3, 2), 2)
        >>> state.position.shape, acceptance.shape
        (torch.Size([4, 3, 2]), torch.Size([4, 3]))
    """
    position = state.position
    momentum = torch.randn_like(position)
    jitter = 1 + JITTER * (2 * torch.rand_like(state.values[0]) - 1)
    # Everything below is in units of the scale: a step moves u by e s v and v by e s g.
    stride = (jitter * step_size).unsqueeze(-1) * scale
    before = _mixed(mixture, state.values) - 0.5 * momentum.square().sum(-1)
    momentum = momentum + 0.5 * stride * _mixed(mixture, state.gradients)
    for step in range(num_leapfrog):
        position = position + stride * momentum
        values, gradients = density(position)
        half = 0.5 if step + 1 == num_leapfrog else 1.0
        momentum = momentum + half * stride * _mixed(mixture, gradients)
    after = _mixed(mixture, values) - 0.5 * momentum.square().sum(-1)
    # A trajectory that left the numbers is one that is never accepted.
    acceptance = (after - before).nan_to_num(-math.inf, posinf=-math.inf).clamp(max=0).exp()
    accepted = torch.rand_like(acceptance) < acceptance
    return (
        State(
            torch.where(accepted.unsqueeze(-1), position, state.position),
            torch.where(accepted, values, state.values),
            torch.where(accepted.unsqueeze(-1), gradients, state.gradients),
        ),
        acceptance,
    )


class Moves:
    """Many moves of one density: `transition`, captured and replayed.

    Trajectory, gradients and acceptance are one function of tensors, so that nothing of Pyro is
    left in a move once it has been captured (see `pyro_vae.inference.replays`). Temperatures, step
    sizes and scales are its inputs; the noise is that of `transition`.

    Args:
        density: u to log f_j and gradients.
        num_leapfrog: Leapfrog steps a move.
        programs: The programs that the density runs.
        calls: How many moves are expected.
        compile: As for `Replayed`.
    Example:
        >>> def normal(u):
        ...     return -0.5 * u.square().sum(-1)[None], -u[None]
        >>> move = Moves(normal, 2)
        >>> state, acceptance = move(State.at(normal, torch.zeros(4, 3, 2)), torch.ones(1), torch.ones(3),
        ...                          torch.ones(3, 2))
        >>> state.position.shape, acceptance.shape
        (torch.Size([4, 3, 2]), torch.Size([4, 3]))
    """

    def __init__(
        self, density: Density, num_leapfrog: int, programs: Sequence[Program] = (), calls: int = 0,
        compile: bool | str = "auto",
    ) -> None:  # fmt: skip
        self.density, self.num_leapfrog = density, num_leapfrog
        self.replayed = Replayed(self._function, programs=programs, calls=calls, compile=compile)

    def __call__(self, state: State, mixture: Tensor, step_size: Tensor, scale: Tensor) -> tuple[State, Tensor]:
        """As `transition`."""
        *moved, acceptance = self.replayed(*state, mixture, step_size, scale)
        return State(*moved), acceptance

    def _function(
        self, position: Tensor, values: Tensor, gradients: Tensor, mixture: Tensor, step_size: Tensor, scale: Tensor
    ) -> tuple[Tensor, ...]:
        state = State(position, values, gradients)
        state, acceptance = transition(state, self.density, mixture, step_size, scale, self.num_leapfrog)
        return (*state, acceptance)


def _mixed(mixture: Tensor, rows: Tensor) -> Tensor:
    """sum_j a_j f_j of rows (J, C, B) or (J, C, B, U)."""
    a = mixture.reshape(len(mixture), 1, -1, *(1,) * (rows.dim() - 3))
    return (a * rows).sum(0)
