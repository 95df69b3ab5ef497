"""The kernels of an annealed chain: which temperatures, which step sizes, which scale.

A path of T distributions from f_0 (the prior, or the guide) to f_T (the posterior),

    log f_t = (1 - b_t) log f_0 + b_t log f_T,   0 = b_0 < b_1 < ... < b_T = 1,

needs T - 1 Hamiltonian moves, one for each distribution in between. What they use is
found in a pilot, by chains that are thrown away, and then *frozen*: a kernel that adapts
to the chain it moves leaves nothing invariant, and the weights would estimate something
else than p(x).

Reference: Grosse et al., Sandwiching the marginal likelihood using bidirectional Monte
    Carlo, 2015. arXiv:1511.02543
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_vae.judging.hamiltonian import Density, Moves, State

SCHEDULES = ("sigmoid", "linear", "adaptive")


class Kernels(NamedTuple):
    """All that the moves of annealed chains depend on; the same forward and backward.

    Attributes:
        beta: b_t, (T + 1, B).
        step_size: e_t of the moves t = 1, ..., T - 1, (T - 1, B).
        precision: 1 / s^2 at both ends of the path, (2, B, U); in between it is their
            mixture, as for Gaussians.
        num_leapfrog: Leapfrog steps a move.
    """

    beta: Tensor
    step_size: Tensor
    precision: Tensor
    num_leapfrog: int

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
        sigmoid:  b_t = (s_t - s_0) / (s_T - s_0),   s_t = sigmoid(4 (2 t / T - 1))

    Args:
        name: "linear" or "sigmoid".
        num_steps: T.
    Example:
        >>> schedule("linear", 4)
        tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """
    t = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    if name == "linear":
        return t
    s = torch.sigmoid(4 * (2 * t - 1))
    return (s - s[0]) / (s[-1] - s[0])


def pilot(
    density: Density,
    position: Tensor,
    precision: Tensor,
    *,
    name: str,
    num_steps: int,
    num_leapfrog: int,
    pilot_steps: int,
    target_acceptance: float,
    moved: Callable[[], None] = lambda: None,
    moves: Moves | None = None,
) -> Kernels:
    """Tune step sizes, and an adaptive schedule, on chains that are then thrown away.

    The pilot anneals along a path of fewer distributions. At each, the log step size of a
    datum moves in proportion to how far its acceptance, averaged over the chains, is from
    the target; smoothed over neighbours it is read off at the temperatures of the path.

    The adaptive schedule spends equal thermodynamic length on every step,

        b_{t+1} - b_t  proportional to  1 / sd_{f_t}[log f_T - log f_0],

    for each datum by itself.

    Args:
        density: u to the log densities of both ends.
        position: Draws from f_0, (P, B, U).
        precision: As in `Kernels`.
        name: "sigmoid", "linear" or "adaptive".
        num_steps: T.
        num_leapfrog: Leapfrog steps a move.
        pilot_steps: Distributions on the pilot's path.
        target_acceptance: Wanted probability of acceptance.
        moved: Called after each move.
        moves: The moves of this density by so many leapfrog steps, where they are captured.
    Returns:
        The kernels.
    """
    size = position.shape[1]
    coarse = schedule("linear" if name == "linear" else "sigmoid", max(2, min(pilot_steps, num_steps)))
    path, none = coarse.to(position.device)[:, None].expand(-1, size), precision.new_zeros(0, size)
    if num_steps == 1:
        return Kernels(path[[0, -1]], none, precision, num_leapfrog)
    first = Kernels(path, none, precision, num_leapfrog)
    move = Moves(density, num_leapfrog, compile=False) if moves is None else moves
    state = State.at(density, position)
    log_step = torch.full_like(precision[0, :, 0], 0.5 / position.shape[-1] ** 0.25).log()
    speeds, steps = [], []
    for t in range(1, len(coarse)):
        # The first distribution is the only one where the step size may start far off.
        for repeat in range(10 if t == 1 else 1):
            mixture, scale = first.mixture(t), first.scale(t)
            if repeat == 0:
                speeds.append((state.values[1] - state.values[0]).double().std(0))
            state, acceptance = move(state, mixture, log_step.exp(), scale)
            log_step = log_step + 0.5 * (acceptance.mean(0) - target_acceptance)
            moved()
        steps.append(log_step)
    log_steps = _smooth(torch.stack(steps).double().cpu())
    beta = torch.as_tensor(schedule("linear" if name == "linear" else "sigmoid", num_steps))[:, None].expand(-1, size)
    if name == "adaptive":
        beta = _equal_lengths(coarse, _smooth(torch.stack(speeds).cpu()), num_steps)
    grid = torch.linspace(0, 1, len(coarse), dtype=torch.float64)
    at_grid = torch.stack([_read(beta[:, b], coarse, grid) for b in range(size)], 1)
    found = torch.stack([_read(at_grid[1:-1, b], grid[1:], log_steps[:, b]) for b in range(size)], 1)
    return Kernels(beta.to(position.device), found.exp().to(precision), precision, num_leapfrog)


def _equal_lengths(coarse: Tensor, speed: Tensor, num_steps: int) -> Tensor:
    """Temperatures at equal steps of the integral of the speed (T', B) over the coarse path, (T + 1, B)."""
    # A share at constant speed keeps a path where the ends hardly differ, or the pilot misjudged a stretch.
    speed = speed.nan_to_num(0.0) + 0.1 * speed.nan_to_num(0.0).mean(0) + 1e-12
    length = torch.cat([torch.zeros_like(speed[:1]), (speed * coarse.diff()[:, None]).cumsum(0)])
    even = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    columns = [_read(even * length[-1, b], length[:, b], coarse) for b in range(speed.shape[1])]
    beta = torch.stack(columns, 1)
    beta[0], beta[-1] = 0.0, 1.0
    return beta


def _smooth(rows: Tensor, half: int = 3) -> Tensor:
    """Moving average over up to 2 half + 1 neighbours of the first dimension."""
    total = torch.cat([torch.zeros_like(rows[:1]), rows.cumsum(0)])
    index = torch.arange(len(rows))
    low, high = (index - half).clamp(min=0), (index + half + 1).clamp(max=len(rows))
    return (total[high] - total[low]) / (high - low)[:, None]


def _read(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Linear interpolation of y over increasing x."""
    return torch.from_numpy(np.interp(at.numpy(), x.numpy(), y.numpy()))
