"""Hamiltonian Monte Carlo for many data at once, each with its own step size and acceptance.

For C chains of B data, a position u and a momentum v ~ N(0, I) move in coordinates that a scale s (per datum and
dimension) has made comparable, with the leapfrog steps

    v <- v + e/2 s g(u),   u <- u + e s v,   v <- v + e/2 s g(u),   g = gradient of log f

and the end is accepted with probability min(1, f(u') N(v') / f(u) N(v)), per chain and datum. The density may have
several rows f_j, (J, C, B), of which a move targets the geometric mixture sum_j a_j log f_j, as on the annealing path

    log f_t = (1 - b_t) log f_0 + b_t log f_T,   0 = b_0 < b_1 < ... < b_T = 1.

Its T - 1 moves use `Kernels` that a `pilot` finds on other chains, and that are then *frozen*: a kernel that adapts to
the chain it moves leaves nothing invariant, and the weights would estimate something else than p(x).

Reference: Neal, MCMC using Hamiltonian dynamics, 2011. arXiv:1206.1901
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_vae.inference.replays import Replayed
from pyro_vae.judging.densities import Density
from pyro_vae.traces import Program

SCHEDULES = ("sigmoid", "linear", "adaptive")
# A trajectory whose length is exactly a period of the target would never leave its start.
JITTER = 0.2


class State(NamedTuple):
    """C chains of B data at one moment."""

    position: Tensor  # u, (C, B, U)
    values: Tensor  # log f_j(u), (J, C, B)
    gradients: Tensor  # their gradients, (J, C, B, U)

    @classmethod
    def at(cls, density: Density, position: Tensor) -> State:
        """The state of chains at a position."""
        return cls(position, *density(position))


class Adaptation(NamedTuple):
    """Dual averaging of log step sizes, one per datum, (B,) each: what to use next, and what to freeze at the end.

    Reference: Hoffman and Gelman, The No-U-Turn Sampler, 2014, section 3.2. arXiv:1111.4246
    """

    log_step: Tensor
    averaged: Tensor
    error: Tensor  # running mean of target minus acceptance
    centre: Tensor  # what log_step is shrunk towards
    updates: int

    @classmethod
    def start(cls, step_size: Tensor) -> Adaptation:
        """Begin at a step size, (B,)."""
        log_step = step_size.log()
        return cls(log_step, log_step, torch.zeros_like(log_step), log_step + math.log(2.0), 0)

    def update(self, acceptance: Tensor, target: float) -> Adaptation:
        """Take in the acceptance of one move, averaged over chains, (B,)."""
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
    """One Metropolis-corrected move of every chain, whose step size is jittered by up to 20 %, wherever it is.

    By a, (J,) or (J, B), e, (B,), and s, (B, U); each leapfrog step evaluates the density once. Gives the new state and
    the probability of acceptance, (C, B).

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
    wide = accepted.unsqueeze(-1)
    ways = (wide, position), (accepted, values), (wide, gradients)
    return State(*(torch.where(*way, old) for way, old in zip(ways, state, strict=True))), acceptance


class Moves:
    """Many moves of one density: `transition`, captured and replayed (see `pyro_vae.inference.replays`)."""

    def __init__(
        self, density: Density, num_leapfrog: int, programs: Sequence[Program], calls: int, compile: bool | str
    ) -> None:
        self.density, self.num_leapfrog = density, num_leapfrog
        self.replayed = Replayed(self._function, programs=programs, calls=calls, compile=compile, fixed=0)

    def start(self, position: Tensor) -> State:
        """Where chains begin: the programs run, and whoever called may have run them."""
        self.replayed.renew()
        return State.at(self.density, position)

    def __call__(self, state: State, mixture: Tensor, step_size: Tensor, scale: Tensor) -> tuple[State, Tensor]:
        """As `transition`."""
        *moved, acceptance = self.replayed(*state, mixture, step_size, scale)
        return State(*moved), acceptance

    def _function(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        mixture, step_size, scale = tensors[3:]
        moved, acceptance = transition(State(*tensors[:3]), self.density, mixture, step_size, scale, self.num_leapfrog)
        return (*moved, acceptance)


def _mixed(mixture: Tensor, rows: Tensor) -> Tensor:
    """sum_j a_j f_j of rows (J, C, B) or (J, C, B, U)."""
    a = mixture.reshape(len(mixture), 1, -1, *(1,) * (rows.dim() - 3))
    return (a * rows).sum(0)


class Kernels(NamedTuple):
    """All that the moves of annealed chains depend on; the same forward and backward."""

    beta: Tensor  # b_t, (T + 1, B)
    step_size: Tensor  # e_t of the moves t = 1, ..., T - 1, (T - 1, B)
    precision: Tensor  # 1 / s^2 at both ends of the path, (2, B, U); in between it is their mixture, as for Gaussians
    num_leapfrog: int  # leapfrog steps a move

    def mixture(self, t: int) -> Tensor:
        """(1 - b_t, b_t), (2, B)."""
        beta = self.beta[t].to(self.precision.dtype)
        return torch.stack([1 - beta, beta])

    def scale(self, t: int) -> Tensor:
        """s at temperature t, (B, U)."""
        return (self.mixture(t).unsqueeze(-1) * self.precision).sum(0).rsqrt()


def schedule(name: str, num_steps: int) -> Tensor:
    """b_0, ..., b_T in float64, (T + 1,).

    linear:   b_t = t / T
    others:   b_t = (s_t - s_0) / (s_T - s_0),   s_t = sigmoid(4 (2 t / T - 1))
    """
    t = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    if name == "linear":
        return t
    s = torch.sigmoid(4 * (2 * t - 1))
    return (s - s[0]) / (s[-1] - s[0])


def pilot(
    moves: Moves,
    position: Tensor,
    precision: Tensor,
    *,
    name: str,
    num_steps: int,
    pilot_steps: int,
    target_acceptance: float,
    tick: Callable[[], None],
) -> Kernels:
    """Tune step sizes, and an adaptive schedule, on chains that are then thrown away.

    From draws of f_0, (P, B, U), it anneals over `pilot_steps` distributions. At each, the log step size of a datum
    moves in proportion to how far its acceptance is from the target, and is smoothed over neighbours. The adaptive
    schedule spends equal thermodynamic length on every step, for each datum by itself:

        b_{t+1} - b_t  proportional to  1 / sd_{f_t}[log f_T - log f_0]
    """
    size = position.shape[1]
    coarse = schedule(name, pilot_steps)
    path, none = coarse.to(position.device)[:, None].expand(-1, size), precision.new_zeros(0, size)
    if num_steps == 1:
        return Kernels(path[[0, -1]], none, precision, moves.num_leapfrog)
    first = Kernels(path, none, precision, moves.num_leapfrog)
    state = moves.start(position)
    log_step = torch.full_like(precision[0, :, 0], 0.5 / position.shape[-1] ** 0.25).log()
    speeds, steps = [], []
    for t in range(1, len(coarse)):
        mixture, scale = first.mixture(t), first.scale(t)
        speeds.append((state.values[1] - state.values[0]).double().std(0))
        # The first distribution is the only one where the step size may start far off.
        for _ in range(10 if t == 1 else 1):
            state, acceptance = moves(state, mixture, log_step.exp(), scale)
            log_step = log_step + 0.5 * (acceptance.mean(0) - target_acceptance)
            tick()
        steps.append(log_step)
    log_steps = _smooth(torch.stack(steps).double().cpu())
    beta = schedule(name, num_steps)[:, None].expand(-1, size)
    if name == "adaptive":
        beta = _equal_lengths(coarse, _smooth(torch.stack(speeds).cpu()), num_steps)
    grid = torch.linspace(0, 1, len(coarse), dtype=torch.float64)
    at_grid = torch.stack([_read(beta[:, b], coarse, grid) for b in range(size)], 1)
    found = torch.stack([_read(at_grid[1:-1, b], grid[1:], log_steps[:, b]) for b in range(size)], 1)
    return Kernels(beta.to(position.device), found.exp().to(precision), precision, moves.num_leapfrog)


def anneal(
    moves: Moves, position: Tensor, kernels: Kernels, *, backward: bool = False, tick: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """log w, (C, B) in float64, of chains along the path of the kernels, and their mean acceptance, (B,).

    They start at draws from f_0, (C, B, U), or go backward from exact draws of the posterior.
    """
    state = moves.start(position)
    total = torch.zeros_like(state.values[0], dtype=torch.float64)
    accepted = torch.zeros_like(state.values[0, 0])
    gaps = kernels.beta.diff(dim=0)
    order = range(len(gaps))[:: -1 if backward else 1]
    for t in order:
        total = total + gaps[t] * (state.values[1] - state.values[0]).double()
        if t != order[-1]:
            move = t if backward else t + 1  # between the weights of t and of the next
            step_size, scale = kernels.step_size[move - 1], kernels.scale(move)
            state, acceptance = moves(state, kernels.mixture(move), step_size, scale)
            accepted = accepted + acceptance.mean(0)
            tick()
    return total, accepted / (len(gaps) - 1) if len(gaps) > 1 else torch.full_like(accepted, math.nan)


def _equal_lengths(coarse: Tensor, speed: Tensor, num_steps: int) -> Tensor:
    """Temperatures at equal steps of the integral of the speed (T', B) over the coarse path, (T + 1, B)."""
    # A share at constant speed keeps a path where the ends hardly differ, or the pilot misjudged a stretch.
    speed = speed.nan_to_num(0.0) + 0.1 * speed.nan_to_num(0.0).mean(0) + 1e-12
    length = torch.cat([torch.zeros_like(speed[:1]), (speed * coarse.diff()[:, None]).cumsum(0)])
    even = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    beta = torch.stack([_read(even * length[-1, b], length[:, b], coarse) for b in range(speed.shape[1])], 1)
    beta[0], beta[-1] = 0.0, 1.0
    return beta


def _smooth(rows: Tensor) -> Tensor:
    """Moving average over up to seven neighbours of the first dimension."""
    total, index = torch.cat([torch.zeros_like(rows[:1]), rows.cumsum(0)]), torch.arange(len(rows))
    low, high = (index - 3).clamp(min=0), (index + 4).clamp(max=len(rows))
    return (total[high] - total[low]) / (high - low)[:, None]


def _read(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Linear interpolation of y over increasing x."""
    return torch.from_numpy(np.interp(at.numpy(), x.numpy(), y.numpy()))
