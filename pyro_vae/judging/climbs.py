"""The best member of a family for each datum, by Adam's steps on its own parameters, at a rate for each datum.

What they find is a point from which the bound no longer rises by more than can be seen, not the optimum; from the way
there `climbed` estimates what remains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae._trust import SCALARS
from pyro_vae.inference.batches import seeded
from pyro_vae.inference.capture import capturing
from pyro_vae.inference.replays import Replayed
from pyro_vae.inference.trees import at, leaves, mapped, values
from pyro_vae.judging.local import LocalForm, Unscaled
from pyro_vae.judging.sweeps import in_chunks
from pyro_vae.traces import Program, draw, plate_nesting

_PATIENCE = 2  # windows
# Numbers that the samples of a step make of its data: below so many fewer data would be no faster, and so many fewer in
# each of a hundred steps pay for another capture.
_FEW = 2**17
# Of the steps that are left most data take no more than a third. A capture costs what the programs' Python costs in
# about a hundred steps (600, where it is the first in a process).
_SHARE, _ENOUGH = 3, 150


class Optimum(NamedTuple):
    """Where the steps ended, and the way there."""

    rows: Tensor  # the best parameters found, (B, P)
    path: Tensor  # averages over the last three windows at the full rate, the latest first, (B, 3, P)
    steps: Tensor  # taken, per datum, (B,)
    stopped: Tensor  # whether the bound had stopped rising before the steps were used up, (B,)


class Climb(NamedTuple):
    """How the steps of some data went, each (B,)."""

    remaining: Tensor  # what the bound may still have risen, in nats
    slope: Tensor  # how much it rose over the last window
    steps: Tensor  # as in `Optimum`
    stopped: Tensor


class _Climbers(NamedTuple):
    """The data that are held, a row each: parameters, Adam's moments and rate, the best window and the last ones."""

    datum: Tensor
    theta: Tensor
    first: Tensor
    second: Tensor
    rate: Tensor
    best: Tensor
    best_rows: Tensor
    misses: Tensor
    settling: Tensor
    ended: Tensor
    stopped: Tensor
    path: Tensor  # (B, 3, P)

    @classmethod
    def at(cls, start: Tensor, learning_rate: float) -> _Climbers:
        size, zeros = len(start), torch.zeros_like(start)
        no = torch.zeros(size, dtype=torch.bool, device=start.device)
        best = start.new_full((size,), -math.inf, dtype=torch.float64)
        return cls(
            torch.arange(size, device=start.device), start.clone(), zeros, zeros.clone(),
            start.new_full((size, 1), learning_rate), best, start.clone(), no.long(), no, no, no,
            start.unsqueeze(1).repeat(1, 3, 1),
        )  # fmt: skip

    def after(self, total: Tensor, average_or_best: Tensor, average: Tensor, tolerance: float, last: bool) -> _Climbers:
        """Who has ended, who stops and settles, and who goes on, after a window."""
        better = total > self.best
        best_rows = torch.where(better[:, None], average, self.best_rows)
        misses = torch.where(total > self.best + tolerance, 0, self.misses + 1)
        stopped = misses >= _PATIENCE
        return self._replace(
            path=torch.cat([average_or_best.unsqueeze(1), self.path[:, :2]], 1),
            best_rows=best_rows,
            best=torch.where(better, total, self.best),
            misses=misses,
            stopped=stopped,
            settling=stopped | last,
            ended=self.ended | self.settling,
        )


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
    compile: bool | str = "auto",
    progress: Callable[[int], None] | None = None,
) -> Optimum:
    """Climb each datum's ELBO until it stops rising.

    A datum whose window of steps (at most a quarter of all) has not beaten its best one by more than the tolerance, in
    nats, twice in a row, goes back to the average of the parameters over the second half of its best window, takes one
    more from there at a rate that falls from a third to a hundredth, and ends at the average over its second half.
    """
    window = max(1, min(window, num_steps // 4))
    steps = _Steps(model, form, args, num_samples, window, num_steps, compile)
    now = _Climbers.at(form.start, learning_rate)
    result = Optimum(now.theta.clone(), now.path.clone(), torch.zeros_like(now.theta[:, 0]), now.stopped.clone())
    step = 0
    while True:
        now, total, average = steps(now, args, step)
        step += window
        if progress is not None:
            progress(window)
        # What settles ends here, at the average; the best rows are kept where it came out no number.
        average_or_best = torch.where(average.isfinite().all(1, keepdim=True), average, now.best_rows)
        ending, taken = now.settling & ~now.ended, torch.full_like(now.theta[:, 0], step)
        for kept, value in zip(result, (average_or_best, now.path, taken, now.stopped), strict=True):
            kept[now.datum[ending]] = value[ending]
        # The next window may be the last that fits.
        now = now.after(total, average_or_best, average, tolerance, step + 2 * window > num_steps)
        turned, rate = now.settling[:, None], torch.where(now.settling[:, None], learning_rate / 3, now.rate)
        now = now._replace(
            theta=torch.where(turned, now.best_rows, now.theta),
            rate=torch.where(now.ended[:, None], 0.0, rate),
        )
        left = ~now.ended
        going = int(left.sum())
        if going == 0:
            return result
        if _worth_dropping(len(left) - going, len(left), num_samples * values(args), window):
            now, args = _Climbers(*(x[left] for x in now)), at(args, left)


def _worth_dropping(ended: int, held: int, numbers: int, window: int) -> bool:
    """Whether a step goes on without the data that have ended, of so many that are held and numbers of each.

    Example:
        >>> _worth_dropping(80, 250, 8 * 784, 100), _worth_dropping(5, 10, 8 * 784, 100)  # 10 are few
        (True, False)
        >>> _worth_dropping(10, 100, 8 * 784, 100), _worth_dropping(50, 100, 8 * 784, 10)  # half are worth it always
        (False, True)
    """
    return ended * numbers * window > 100 * _FEW or (2 * ended >= held and held * numbers > _FEW)


class _Steps:
    """Adam's steps of the climbs of a batch: one function of tensors, captured and replayed (`Replayed`).

    It is of one batch: whatever else a local form was made of stays what it is.
    """

    def __init__(
        self, model: Program, form: LocalForm, args: tuple[Any, ...], num_samples: int, window: int, num_steps: int,
        compile: bool | str,
    ) -> None:  # fmt: skip
        self.model, self.form, self.num_samples = Unscaled()(model), form, num_samples
        self.window, self.num_steps = window, num_steps
        self.nesting = plate_nesting(self.model, form.guide(form.start), *args)
        self.fall = 0.03 ** (1 / window)
        # In float64: the corrections of Adam's moments come of differences from 1.
        self.taken = form.start.new_zeros((), dtype=torch.float64)
        if not all(isinstance(x, (Tensor, *SCALARS)) for _, x in leaves(args)):  # what a program might change
            compile = False
        self.replayed = Replayed(self._function, programs=(model, form.origin), compile=compile, enough=_ENOUGH)

    def __call__(self, now: _Climbers, args: tuple[Any, ...], step: int) -> tuple[_Climbers, Tensor, Tensor]:
        """The steps of one window, the ELBO averaged over it, and the parameters over its second half."""
        self.replayed.calls = step + (self.num_steps - step) // _SHARE
        self._args, window, half = args, self.window, self.window // 2
        given = [x for _, x in leaves(args) if isinstance(x, Tensor)]
        pace = torch.where(now.settling[:, None], self.fall, 1.0).to(now.theta)
        early, late = now.theta.new_zeros(()), now.theta.new_ones(())
        moved: tuple[Tensor, ...] = (
            now.theta, now.first, now.second, now.rate, self.taken, torch.zeros_like(now.best),
            torch.zeros_like(now.theta),
        )  # fmt: skip
        for inside in range(window):
            moved = self.replayed(*moved, pace, late if inside >= half else early, *given)
        theta, first, second, rate, self.taken, total, average = moved
        now = now._replace(theta=theta, first=first, second=second, rate=rate)
        return now, total / window, average / (window - half)

    def _function(
        self, theta: Tensor, first: Tensor, second: Tensor, rate: Tensor, taken: Tensor, total: Tensor,
        average: Tensor, pace: Tensor, late: Tensor, *given: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        rest = iter(given)
        args = mapped(lambda _, x: next(rest) if isinstance(x, Tensor) else x, self._args)
        value, gradient = self._slope(args, theta)
        taken, rate = taken + 1, rate * pace
        first = first.lerp(gradient, 0.1)
        second = second.lerp(gradient.square(), 0.001)
        unbiased = (second / (1 - 0.999**taken)).sqrt() + 1e-8
        theta = theta + rate * self.form.relative_rates * (first / (1 - 0.9**taken)) / unbiased
        return theta, first, second, rate, taken, total + value.double(), average + late * theta

    def _slope(self, args: tuple[Any, ...], theta: Tensor) -> tuple[Tensor, Tensor]:
        """The ELBO per datum at some samples, and its gradient."""
        with torch.enable_grad():
            live = theta.detach().requires_grad_()
            guide = self.form.guide(live, theta.detach())
            # Samples drawn one by one would make a long graph: there the programs run on as they are.
            vectorize = True if capturing() else None
            value = draw(self.model, guide, args, {}, self.num_samples, vectorize, self.nesting).log_weight.mean(0)
            (gradient,) = torch.autograd.grad(value.sum(), live)
        return value.detach(), torch.nan_to_num(gradient, posinf=0.0, neginf=0.0)


def climbed(model: Program, form: LocalForm, best: Optimum, args: tuple[Any, ...], num_samples: int) -> Climb:
    """What remains of each datum's climb."""
    weights = weights_at(form, model, best.path.unbind(1), args, max(2, min(num_samples, 200)))
    return Climb(*remaining(*weights), best.steps.double().cpu(), best.stopped.cpu())


def weights_at(
    form: LocalForm, model: Program, places: Sequence[Tensor], args: tuple[Any, ...], num_samples: int
) -> list[Tensor]:
    """Log weights, (K, B), at rows of parameters, (B, P) each, at one noise for all, so that it cancels."""
    nesting = plate_nesting(model, form.guide(form.start), *args)
    seed, weights = int(torch.randint(2**31, ()).item()), []
    for rows in places:
        with seeded(seed):
            chunks = in_chunks(model, form.guide(rows), args, num_samples, nesting)
            weights.append(torch.cat([chunk.log_weight for chunk in chunks]).double().cpu())
    return weights


def remaining(latest: Tensor, before: Tensor, earlier: Tensor) -> tuple[Tensor, Tensor]:
    """How much a bound may still rise, and how much it rose last, d, (B,) each, in nats.

    Of log weights at the last three windows' parameters, at one noise, (K, B) each. Later windows add d r / (1 - r)
    where the rises shrink geometrically by r. A rise that cannot be told from noise is taken as large as its noise.
    """
    count = len(latest)
    rise, rise_before = latest - before, before - earlier
    d, d_before = rise.mean(0), rise_before.mean(0)
    noise, noise_before = (x.std(0) / math.sqrt(count) for x in (rise, rise_before))
    seen = d.clamp(min=0) + noise
    known = (d > 2 * noise) & (d_before > 2 * noise_before)
    ratio = torch.where(known, (d / d_before.clamp(min=1e-30)).clamp(0.1, 0.97), 0.5)
    return seen * ratio / (1 - ratio), d
