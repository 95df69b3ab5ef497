"""How the stages of a judgement are done: in pieces of a fixed schedule, so that a seed gives the same numbers.

The pieces (4, 8, 16, ... data; 50, 100, 200, ... steps) are the same whatever the time; where it ends, what was done
so far is the result. Gaps and the remedy are in `pyro_vae.judging.gap_examinations`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_vae.inference.batches import seeded
from pyro_vae.inference.trees import at, leaves, rows
from pyro_vae.judging._calibration import sbc
from pyro_vae.judging.annealing import Bracket, bdmc
from pyro_vae.judging.budget import Budget, OutOfTime
from pyro_vae.judging.components import Components
from pyro_vae.judging.estimates import Estimate, elbo_terms, log_likelihood
from pyro_vae.judging.latents import active_units, kl_per_dimension
from pyro_vae.judging.nats import RELEVANT, Nats
from pyro_vae.judging.results import Mean
from pyro_vae.judging.stages import Bounds, Bracketed, Calibrated, Comparison, Latents, Stages
from pyro_vae.judging.weights import khat_ok
from pyro_vae.traces import Program

_NUM_SAMPLES = (5000, 2000, 1000, 500, 200, 100, 50, 25, 10, 5, 2)
_ELBO_SAMPLES = 100
_NUM_CHAINS = 8
R = TypeVar("R")


@dataclass
class Examination:
    """A pair under examination, what may be spent on it, and what later stages take from earlier ones.

    Attributes:
        model: A Pyro program.
        guide: A Pyro program.
        data: One batch, the arguments of both.
        num_samples: K that was asked for.
        observed: Which argument each observed site is.
        options: Device, seed and progress of each estimate.
        budget: Of time.
        per_draw: Seconds for one sample of one datum, in bulk.
        judged: The estimate of log p(x) at K.
        better: One at more samples.
        best: One that uses the best q of each datum too, where it can be relied upon.
    """

    model: Program
    guide: Program
    data: tuple[Any, ...]
    num_samples: int
    observed: Mapping[str, int] | None
    options: dict[str, Any]
    budget: Budget
    per_draw: float = 0.0
    judged: Pooled | None = None
    better: Pooled | None = None
    best: Mean | None = None

    @property
    def num_data(self) -> int:
        """How many data there are."""
        return rows(self.data)

    def part(self, start: int, stop: int) -> tuple[Any, ...]:
        """Some of the data."""
        return at(self.data, slice(start, stop))

    def pieces(self, factor: int, work: Callable[[int, int], R], cost: Callable[[float, int, int], float]) -> list[R]:
        """What came of 4 data, then of factor times as many, and so on, as long as there is time.

        Args:
            factor: By which the pieces grow.
            work: Does the data from one index to another.
            cost: Seconds for a piece, from those of the one before, its size and that of the piece.
        Raises:
            OutOfTime: Not even the first one could be done.
        """
        stops = [min(4, self.num_data)]
        while stops[-1] < self.num_data:
            stops.append(min(self.num_data, stops[-1] * factor))
        if len(stops) > 2 and stops[-1] - stops[-2] < 4:
            stops.pop(-2)
        found: list[R] = []
        took, size = 0.0, 0
        for start, stop in zip([0, *stops], stops, strict=False):
            if found and not self.budget.fits(cost(took, size, stop - start)):
                break
            began = self.budget.clock()
            try:
                with self.budget.piece():
                    found.append(work(start, stop))
            except OutOfTime:
                if not found:
                    raise
                break
            took, size = self.budget.clock() - began, stop - start
        return found


@dataclass(frozen=True)
class Pooled:
    """One estimate of the data of several pieces, of the same K."""

    log_p: Nats
    bias: float
    pointwise: Tensor
    pareto_k: Tensor
    num_samples: int
    curve_samples: tuple[int, ...]
    curve: Tensor
    curve_mc_stderr: Tensor

    @classmethod
    def of(cls, parts: Sequence[Estimate]) -> Pooled:
        """From the estimates of the pieces."""
        curves = [part.curve for part in parts if part.curve is not None]
        assert len(curves) == len(parts)
        return cls(
            log_p=pooled(parts),
            bias=weighted(parts, [part.bias for part in parts]),
            pointwise=torch.cat([part.pointwise for part in parts]),
            pareto_k=torch.cat([part.pareto_k for part in parts]),
            num_samples=parts[0].num_samples,
            curve_samples=curves[0].num_samples,
            curve=weighted(parts, [curve.value for curve in curves]),
            curve_mc_stderr=weighted(parts, [curve.mc_stderr for curve in curves], errors=True),
        )

    @property
    def khat_ok(self) -> float:
        """Share of the data whose k-hat is small enough; nan where K is too small to say."""
        return khat_ok(self.pareto_k, self.num_samples)

    def at(self, num_samples: int) -> tuple[float, float]:
        """The curve at any K, linear in log K, and its error: a quarter of the step between two points is added."""
        after = next(i for i, k in enumerate(self.curve_samples) if k >= num_samples)
        if self.curve_samples[after] == num_samples:
            return self.curve[after].item(), self.curve_mc_stderr[after].item()
        a, b = self.curve_samples[after - 1 : after + 1]
        share = math.log(num_samples / a) / math.log(b / a)
        low, high = self.curve[after - 1 : after + 1].tolist()
        noise = self.curve_mc_stderr[after - 1 : after + 1].max().item()
        return low + share * (high - low), math.hypot(noise, (high - low) / 4)


def weighted(parts: Sequence[Any], values: Sequence[Any], errors: bool = False) -> Any:
    """A mean over pieces by their numbers of data, or the error of one."""
    sizes = [len(part.pointwise) for part in parts]
    if errors:
        return sum((n * v) ** 2 for n, v in zip(sizes, values, strict=True)) ** 0.5 / sum(sizes)
    return sum(n * v for n, v in zip(sizes, values, strict=True)) / sum(sizes)


def pooled(parts: Sequence[Any]) -> Nats:
    """The value of all pieces, with its errors."""
    pointwise = torch.cat([part.pointwise for part in parts])
    count = len(pointwise)
    spread = pointwise.std().item() / math.sqrt(count) if count > 1 else math.nan
    return Nats(pointwise.mean().item(), weighted(parts, [p.mc_stderr for p in parts], errors=True), spread)


def examine_bounds(pair: Examination, stages: Stages) -> Bounds:
    """The ELBO, and log p(x) at the K that was asked for and at a larger one."""
    model, guide = pair.model, pair.guide
    seed = pair.options["seed"]
    count, more = _affordable(pair)

    draws = _ELBO_SAMPLES + count + (more > count) * more
    per_draw = [pair.per_draw]

    def work(start: int, stop: int) -> tuple[Any, Estimate, Estimate]:
        began, part = pair.budget.clock(), pair.part(start, stop)
        options = pair.options | {"seed": seed + start}
        terms = elbo_terms(model, guide, part, num_samples=_ELBO_SAMPLES, **options)
        judged = better = log_likelihood(model, guide, part, num_samples=count, **options)
        if more > count:  # of another seed: what one lacks is measured against the other
            options["seed"] = seed + start + 2**32
            better = log_likelihood(model, guide, part, num_samples=more, **options)
        per_draw.append((pair.budget.clock() - began) / (draws * (stop - start)))
        return terms, judged, better

    found = pair.pieces(2, work, lambda took, size, coming: took * coming / size)
    terms, judged, better = (list(column) for column in zip(*found, strict=True))
    pair.judged, pair.better = Pooled.of(judged), Pooled.of(better)
    total = len(pair.judged.pointwise)
    pair.per_draw = min(pair.per_draw, per_draw[-1])
    return Bounds(
        status="done",
        num_data=total,
        num_samples=count,
        num_samples_asked=pair.num_samples,
        elbo=pooled(terms),
        reconstruction=weighted(terms, [t.reconstruction for t in terms]),
        kl=weighted(terms, [t.kl for t in terms]),
        log_p=pair.judged.log_p,
        bias=pair.judged.bias,
        khat_ok=pair.judged.khat_ok,
        better=pair.better.log_p,
        better_samples=more,
        better_bias=pair.better.bias,
        better_khat_ok=pair.better.khat_ok,
        curve_samples=pair.better.curve_samples,
        curve=tuple(pair.better.curve.tolist()),
        curve_mc_stderr=tuple(pair.better.curve_mc_stderr.tolist()),
        pareto_k=pair.better.pareto_k,
        pointwise=pair.better.pointwise,
        data=next((leaf for _, leaf in leaves(pair.part(0, total)) if isinstance(leaf, Tensor)), None),
    )


def _affordable(pair: Examination) -> tuple[int, int]:
    """The K that was asked for, or as many samples as fit; and as many more as fit, to compare with."""
    budget = pair.budget
    with budget.piece():
        for draws in (100, 2000):
            began = budget.clock()
            log_likelihood(pair.model, pair.guide, pair.part(0, 2), num_samples=draws, **pair.options)
            took = budget.clock() - began
            pair.per_draw = took / (2 * draws)
            # A hundred draws of a small model cost what Python costs, and say little of thousands.
            if 2000 / 100 * took > 0.1 * budget.left:
                break
    allowed = max(2, int(0.2 * budget.left / max(4 * pair.per_draw, 1e-12)))
    most = next((k for k in _NUM_SAMPLES if k <= allowed), 2)
    count = pair.num_samples if pair.num_samples <= allowed else most
    wanted = max(count, min(5000, max(1000, 10 * count)))
    return count, wanted if wanted <= allowed else max(count, most)


def with_missing(pair: Examination, bounds: Bounds) -> Bounds:
    """The bounds, with what the estimate at K lacks by the best that is known."""
    judged, better, best = pair.judged, pair.better, pair.best
    if judged is None or better is None:
        return bounds
    compared: Comparison = "larger K"
    if best is not None and better.khat_ok < 0.9:
        size = min(len(best.pointwise), len(judged.pointwise))
        difference = best.pointwise[:size] - judged.pointwise[:size]
        spread = difference.std().item() / math.sqrt(size) if size > 1 else math.nan
        noise = best.pointwise_stderr[:size].square().sum().sqrt().item() / size
        missing, compared = Nats(difference.mean().item(), math.hypot(spread, noise)), "best q"
    elif better.num_samples == judged.num_samples:
        missing, compared = Nats(-judged.bias, judged.log_p.mc_stderr), "jackknife"
    else:
        # One draw of few samples is noisy: what they lack on average, the blocks of the larger K know.
        value, noise = better.at(judged.num_samples)
        short = better.curve[-1].item() - value + abs(better.bias)
        missing = Nats(short, math.hypot(noise, better.log_p.mc_stderr))
    enough = None
    if better.khat_ok >= 0.9:
        # What the curve lacks at K', from its own end, whose bias the jackknife tells.
        lacks = (better.curve[-1] - better.curve + abs(better.bias)).tolist()
        good = [k for k, v in zip(better.curve_samples, lacks, strict=True) if v <= RELEVANT]
        enough = good[0] if good else None
    return dataclasses.replace(bounds, missing=missing, compared_with=compared, enough=enough)


def examine_latents(pair: Examination, stages: Stages) -> Latents:
    """Which latents move with the data, and what each carries."""
    count = max(stages.bounds.num_data, min(pair.num_data, 16))
    part = pair.part(0, count)
    seed = pair.options["seed"]
    with pair.budget.piece():
        with seeded(seed):
            components = Components(pair.model, pair.part(0, 2))
        threshold = Latents().threshold
        units = [
            active_units(pair.guide, part, threshold=threshold, site=name, **pair.options)
            for name in components.sites
        ]
        kl = kl_per_dimension(pair.model, pair.guide, part, **pair.options)
    variance = torch.cat([found.variance.double() for found in units]).tolist()
    return Latents(
        status="done",
        num_data=count,
        variance=dict(zip(components.names, variance, strict=True)),
        rate=kl.total,
        kl=dict(zip(kl.names, kl.value.tolist(), strict=True)),
        kl_data_stderr=tuple(kl.data_stderr.tolist()),
    )


def examine_bracket(pair: Examination, stages: Stages) -> Bracketed:
    """log p(x) of simulated data from both sides, and what importance sampling lacks there."""
    budget = pair.budget
    found, start = _bracket(pair)
    lower, count = found.lower, len(found.upper.pointwise)
    importance, low, high = math.nan, Nats(), Nats()
    if pair.judged is not None:
        with contextlib.suppress(OutOfTime), budget.piece():
            num_samples = pair.judged.num_samples
            there = log_likelihood(pair.model, pair.guide, found.data, num_samples=num_samples, **pair.options)
            importance = there.value
            low, high = (_mean(bound - there.pointwise) for bound in (lower.pointwise, found.upper.pointwise))
    return Bracketed(
        status="done", num_data=count, num_steps=lower.num_steps, num_chains=lower.num_samples, start=start,
        lower=Nats(lower.value, lower.mc_stderr), upper=Nats(found.upper.value, found.upper.mc_stderr),
        width=Nats(found.width.value, found.width.data_stderr), importance=importance, below_lower=low,
        below_upper=high, found=found,
    )  # fmt: skip


def _bracket(pair: Examination) -> tuple[Bracket, str]:
    """A short bracket of few data, and then the longest that fits."""
    budget, size, wanted = pair.budget, min(8, pair.num_data), min(32, pair.num_data)

    def anneal(num_data: int, num_steps: int, start: str) -> Bracket:
        with budget.piece():
            return bdmc(
                pair.model, pair.guide, pair.part(0, num_data), num_data=num_data, num_steps=num_steps, start=start,
                num_samples=_NUM_CHAINS, observed=pair.observed, **pair.options,
            )  # fmt: skip

    began, start = budget.clock(), "guide"
    try:
        found = anneal(size, 20, start)
    except ValueError:
        began, start = budget.clock(), "prior"
        found = anneal(size, 20, start)
    took = budget.clock() - began
    for num_steps in (500, 200, 100, 50):
        pilot = max(50, num_steps // 4)
        # In the worst case the time grows with the data as well as with the moves.
        if budget.fits(took * (pilot + 9 + 2 * num_steps) / 69 * (wanted / size) ** 0.5):
            with contextlib.suppress(OutOfTime):
                found = anneal(wanted, num_steps, start)
            break
    return found, start


def _mean(pointwise: Tensor) -> Nats:
    count = len(pointwise)
    error = pointwise.std().item() / math.sqrt(count) if count > 1 else math.nan
    return Nats(pointwise.mean().item(), error)


def examine_calibration(pair: Examination, stages: Stages) -> Calibrated:
    """Ranks of true latents among draws of the guide."""
    budget = pair.budget
    settings: dict[str, Any] = {"num_samples": 99, "observed": pair.observed, **pair.options}
    began = budget.clock()
    with budget.piece():
        found = sbc(pair.model, pair.guide, pair.data, num_data=100, **settings)
    took = budget.clock() - began
    for count in (1000, 500, 200):
        if budget.fits(took * count / 100):
            with contextlib.suppress(OutOfTime), budget.piece():
                found = sbc(pair.model, pair.guide, pair.data, num_data=count, **settings)
            break
    coverage, _ = found.covered(0.9)
    return Calibrated(
        status="done", num_data=len(found.ranks), num_draws=found.num_samples, level=found.level,
        calibrated=found.calibrated, names=found.names, verdicts=found.verdicts,
        p_value=tuple(found.adjusted.tolist()), coverage_90=tuple(coverage.tolist()), found=found,
    )  # fmt: skip
