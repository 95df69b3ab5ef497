"""The best member of a family for each datum, by gradient steps on its own parameters.

The steps are Adam's, for all data at once and at a rate for each. What they find is a point from which the bound no
longer rises by more than can be seen, not the optimum, so `Optimum` also keeps the way there, from which `climbed`
estimates what remains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.inference.batches import seeded
from pyro_vae.inference.trees import at
from pyro_vae.judging.local import LocalForm, Unscaled
from pyro_vae.judging.sweeps import chunk_sizes
from pyro_vae.traces import Program, draw, plate_nesting


class Optimum(NamedTuple):
    """Where the steps ended, and the way there.

    Attributes:
        rows: The best parameters found, (B, P).
        path: Averages over the last three windows at the full rate, the latest first, (B, P) each.
        steps: Taken, per datum, (B,).
        stopped: Whether the bound had stopped rising before the steps were used up, (B,).
    """

    rows: Tensor
    path: tuple[Tensor, Tensor, Tensor]
    steps: Tensor
    stopped: Tensor


class Climb(NamedTuple):
    """How the steps of some data went, each (B,).

    Attributes:
        remaining: What the bound may still have risen, in nats.
        slope: How much it rose over the last window.
        steps: Steps taken.
        stopped: Whether the bound had stopped rising before the steps were used up.
    """

    remaining: Tensor
    slope: Tensor
    steps: Tensor
    stopped: Tensor

    @classmethod
    def joined(cls, parts: list[Climb]) -> Climb | None:
        """Over batches."""
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True))) if parts else None


def optimise(
    model: Program,
    form: LocalForm,
    args: tuple[Any, ...],
    *,
    num_samples: int = 8,
    learning_rate: float = 0.03,
    num_steps: int = 2000,
    window: int = 100,
    tolerance: float = 0.01,
    patience: int = 2,
    progress: Callable[[int], None] | None = None,
) -> Optimum:
    """Climb each datum's ELBO until it stops rising.

    The ELBO is averaged over windows of steps. A datum whose window has not beaten its best one
    by more than the tolerance, ``patience`` times in a row, goes back to the average of the
    parameters over the second half of its best window, takes one more window from there
    at a rate that falls from a third to a hundredth, and ends at the average over the
    second half of that. Data that have ended no longer cost anything.

    Args:
        model: A Pyro program for p(x, z).
        form: The family at this batch.
        args: The batch.
        num_samples: Samples per step and datum.
        learning_rate: Adam's.
        num_steps: Upper limit.
        window: Steps over which the ELBO is averaged; at most a quarter of num_steps.
        tolerance: Nats per window.
        patience: Windows.
        progress: Told the number of steps done in each window.
    """
    window = max(1, min(window, num_steps // 4))
    model = Unscaled()(model)
    nesting = plate_nesting(model, form.guide(form.start), *args)
    theta = form.start.clone()
    size = len(theta)
    first, second = torch.zeros_like(theta), torch.zeros_like(theta)
    rate = theta.new_full((size, 1), learning_rate)
    best, best_rows = theta.new_full((size,), -math.inf, dtype=torch.float64), theta.clone()
    path = (theta.clone(), theta.clone(), theta.clone())
    misses = theta.new_zeros(size, dtype=torch.long)
    settling = theta.new_zeros(size, dtype=torch.bool)
    stopped = settling.clone()
    rows = torch.arange(size, device=theta.device)
    ends = theta.clone(), theta.clone(), theta.clone()
    result = Optimum(theta.clone(), ends, theta.new_zeros(size), stopped.clone())
    fall = 0.03 ** (1 / window)
    step = 0
    while len(rows):
        total, average = torch.zeros_like(best), torch.zeros_like(theta)
        for inside in range(window):
            step += 1
            value, gradient = _slope(model, form, theta, args, num_samples, nesting)
            first.lerp_(gradient, 0.1)
            second.lerp_(gradient.square(), 0.001)
            unbiased = (second / (1 - 0.999**step)).sqrt() + 1e-8
            rate = torch.where(settling[:, None], rate * fall, rate)
            theta = theta + rate * form.pace * (first / (1 - 0.9**step)) / unbiased
            total += value.double()
            if inside >= window // 2:
                average += theta
        total, average = total / window, average / (window - window // 2)
        if progress is not None:
            progress(window)
        # What settles ends here, at the average; the best rows are kept where it came out no number.
        ended = settling
        finite = average.isfinite().all(1, keepdim=True)
        result.rows[rows[ended]] = torch.where(finite, average, best_rows)[ended]
        result.steps[rows[ended]] = float(step)
        result.stopped[rows[ended]] = stopped[ended]
        for kept, latest in zip(result.path, path, strict=True):
            kept[rows[ended]] = latest[ended]
        path = (torch.where(finite, average, best_rows), path[0], path[1])
        rises = total > best + tolerance
        better = total > best
        best_rows = torch.where(better[:, None], average, best_rows)
        best = torch.where(better, total, best)
        misses = torch.where(rises, 0, misses + 1)
        stopped = misses >= patience
        last = step + 2 * window > num_steps  # the next window is the last that fits
        settling = stopped | last
        theta = torch.where(settling[:, None], best_rows, theta)
        rate = torch.where(settling[:, None], learning_rate / 3, rate)
        keep = ~ended
        if not bool(keep.all()):
            theta, first, second, rate, best, best_rows, misses, settling, stopped, rows = (
                x[keep] for x in (theta, first, second, rate, best, best_rows, misses, settling, stopped, rows)
            )
            path = (path[0][keep], path[1][keep], path[2][keep])
            args = at(args, keep)
    return result


def climbed(model: Program, form: LocalForm, best: Optimum, args: tuple[Any, ...], num_samples: int) -> Climb:
    """What remains of each datum's climb, at one noise for all three places."""
    nesting = plate_nesting(model, form.guide(form.start), *args)
    sizes = chunk_sizes(args, max(2, min(num_samples, 200)))
    seed = int(torch.randint(2**31, ()).item())
    weights = []
    for rows in best.path:
        with seeded(seed):
            parts = [draw(model, form.guide(rows), args, {}, k, max_plate_nesting=nesting).log_weight for k in sizes]
        weights.append(torch.cat(parts).double().cpu())
    left, slope = remaining(*weights)
    return Climb(left, slope, best.steps.double().cpu(), best.stopped.cpu())


def remaining(latest: Tensor, before: Tensor, earlier: Tensor) -> tuple[Tensor, Tensor]:
    """How much a bound may still rise, judged by how it rose last.

    With d the rise over the last window and r its ratio to the rise over the one before,
    later windows add d (r + r^2 + ...) = d r / (1 - r) where the rises shrink geometrically. A
    rise that cannot be told from noise is taken as large as its noise.

    Args:
        latest: log weights at the last window's parameters, (K, B).
        before: At the one before, at the same noise, (K, B).
        earlier: At the one before that, (K, B).
    Returns:
        What remains and the rise d, (B,) each, in nats per datum.
    """
    count = len(latest)
    rise, rise_before = latest - before, before - earlier
    d, d_before = rise.mean(0), rise_before.mean(0)
    noise, noise_before = (x.std(0) / math.sqrt(count) for x in (rise, rise_before))
    seen = d.clamp(min=0) + noise
    known = (d > 2 * noise) & (d_before > 2 * noise_before)
    ratio = torch.where(known, (d / d_before.clamp(min=1e-30)).clamp(0.1, 0.97), 0.5)
    return seen * ratio / (1 - ratio), d


def _slope(
    model: Program, form: LocalForm, theta: Tensor, args: tuple[Any, ...], num_samples: int, nesting: int
) -> tuple[Tensor, Tensor]:
    """The ELBO per datum at some samples, and its gradient."""
    with torch.enable_grad():
        live = theta.detach().requires_grad_()
        guide = form.guide(live, theta.detach())
        value = draw(model, guide, args, {}, num_samples, max_plate_nesting=nesting).log_weight.mean(0)
        (gradient,) = torch.autograd.grad(value.sum(), live)
    return value.detach(), torch.nan_to_num(gradient, posinf=0.0, neginf=0.0)
