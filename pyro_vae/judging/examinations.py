"""How the stages of a judgement are done: in pieces of a fixed schedule (4, 8, 16, ... data; 50, 100, 200, ... steps),
the same whatever the time; where it ends, what was done so far is the result."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae.inference.batches import seeded
from pyro_vae.inference.trees import leaves
from pyro_vae.judging._calibration import sbc
from pyro_vae.judging._gaps import STEP_SAMPLES, FamilyGaps, Gaps, gaps
from pyro_vae.judging.annealing import bdmc
from pyro_vae.judging.budget import Examination, OutOfTime
from pyro_vae.judging.components import Components
from pyro_vae.judging.estimates import elbo_terms, log_likelihood
from pyro_vae.judging.evidence import Bracket, Curve, Estimate
from pyro_vae.judging.latents import active_units, kl_per_dimension
from pyro_vae.judging.results import RELEVANT, Mean, Nats, averaged
from pyro_vae.judging.stages import Bounds, Bracketed, Calibrated, Comparison, GapSplit, Latents, Stages
from pyro_vae.judging.weights import khat_ok

_NUM_SAMPLES = (5000, 2000, 1000, 500, 200, 100, 50, 25, 10, 5, 2)
_ELBO_SAMPLES = 100
_NUM_CHAINS = 8
_GAP_SAMPLES, _GAP_STEPS, _WINDOW = 1000, 1000, 50


def _weighted(parts: Sequence[Any], values: Sequence[Any], errors: bool = False) -> Any:
    """A mean over pieces by their numbers of data, or the error of one."""
    sizes = [len(part.pointwise) for part in parts]
    if errors:
        return sum((n * v) ** 2 for n, v in zip(sizes, values, strict=True)) ** 0.5 / sum(sizes)
    return sum(n * v for n, v in zip(sizes, values, strict=True)) / sum(sizes)


def _averaged(parts: Sequence[Any]) -> dict[str, Any]:
    """Value, errors and values per datum over pieces."""
    pointwise = torch.cat([part.pointwise for part in parts])
    error = _weighted(parts, [part.mc_stderr for part in parts], errors=True)
    return averaged(pointwise, torch.full_like(pointwise, math.nan)) | {"mc_stderr": error}


def _pooled(parts: Sequence[Estimate]) -> Estimate:
    """One estimate of the data of several pieces, of the same K."""
    curves = [part.curve for part in parts if part.curve is not None]
    return Estimate(
        **_averaged(parts),
        bias=_weighted(parts, [part.bias for part in parts]),
        ess=torch.cat([part.ess for part in parts]),
        pareto_k=torch.cat([part.pareto_k for part in parts]),
        num_samples=parts[0].num_samples,
        curve=Curve(
            curves[0].num_samples,
            _weighted(parts, [curve.value for curve in curves]),
            _weighted(parts, [curve.mc_stderr for curve in curves], errors=True),
        ),
    )


def examine_bounds(pair: Examination, stages: Stages) -> Bounds:
    """The ELBO, and log p(x) at the K that was asked for and at a larger one."""
    count, more = _affordable(pair)
    draws = _ELBO_SAMPLES + count + (more > count) * more
    per_draw = [pair.per_draw]

    def work(start: int, stop: int) -> tuple[Any, Estimate, Estimate]:
        began = pair.budget.clock()
        terms = elbo_terms(*pair.of(start, stop), num_samples=_ELBO_SAMPLES, **pair.seeded(start))
        options: dict[str, Any] = {"method": "importance"} | pair.seeded(start)
        judged = better = log_likelihood(*pair.of(start, stop), num_samples=count, **options)
        if more > count:  # of another seed: what one lacks is measured against the other
            options |= pair.seeded(start + 2**32)
            better = log_likelihood(*pair.of(start, stop), num_samples=more, **options)
        per_draw.append((pair.budget.clock() - began) / (draws * (stop - start)))
        return terms, judged, better

    found = pair.pieces(2, work, lambda took, size, coming: took * coming / size)
    terms, *estimates = (list(column) for column in zip(*found, strict=True))
    pair.judged, pair.better = judged, better = _pooled(estimates[0]), _pooled(estimates[1])
    pair.per_draw = min(pair.per_draw, per_draw[-1])
    total = len(judged.pointwise)
    assert better.curve is not None
    return Bounds(
        status="done",
        num_data=total,
        num_samples=count,
        num_samples_asked=pair.num_samples,
        elbo=Nats(*(_averaged(terms)[name] for name in ("value", "mc_stderr", "data_stderr"))),
        reconstruction=_weighted(terms, [t.reconstruction for t in terms]),
        kl=_weighted(terms, [t.kl for t in terms]),
        log_p=Nats.of(judged),
        bias=judged.bias,
        khat_ok=judged.khat_ok,
        better=Nats.of(better),
        better_samples=more,
        better_bias=better.bias,
        better_khat_ok=better.khat_ok,
        curve_samples=better.curve.num_samples,
        curve=tuple(better.curve.value.tolist()),
        curve_mc_stderr=tuple(better.curve.mc_stderr.tolist()),
        pareto_k=better.pareto_k,
        pointwise=better.pointwise,
        data=next((leaf for _, leaf in leaves(pair.part(0, total)) if isinstance(leaf, Tensor)), None),
    )


def _affordable(pair: Examination) -> tuple[int, int]:
    """The K that was asked for, or as many samples as fit; and as many more as fit, to compare with."""
    budget = pair.budget
    with budget.piece():
        for draws in (100, 2000):
            began = budget.clock()
            log_likelihood(*pair.of(0, 2), num_samples=draws, method="importance", **pair.options)
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
    assert judged is not None and better is not None and better.curve is not None
    compared: Comparison = "larger K"
    if best is not None and better.khat_ok < 0.9:
        size = min(len(best.pointwise), len(judged.pointwise))
        missing = _mean(best.pointwise[:size] - judged.pointwise[:size])
        noise = best.pointwise_stderr[:size].square().sum().sqrt().item() / size
        missing, compared = Nats(missing.value, math.hypot(missing.mc_stderr, noise)), "best q"
    elif better.num_samples == judged.num_samples:
        missing, compared = Nats(-judged.bias, judged.mc_stderr), "jackknife"
    else:
        # One draw of few samples is noisy: what they lack on average, the blocks of the larger K know.
        value, noise = better.curve.at(judged.num_samples)
        missing = Nats(better.curve.value[-1].item() - value + abs(better.bias), math.hypot(noise, better.mc_stderr))
    enough = better.enough(RELEVANT) if better.khat_ok >= 0.9 else None
    return dataclasses.replace(bounds, missing=missing, compared_with=compared, enough=enough)


def examine_latents(pair: Examination, stages: Stages) -> Latents:
    """Which latents move with the data, and what each carries."""
    count = max(stages.bounds.num_data, min(pair.num_data, 16))
    threshold = Latents().threshold
    with pair.budget.piece():
        with seeded(pair.options["seed"]):
            components = Components(pair.model, pair.part(0, 2))
        units = [
            active_units(pair.guide, pair.part(0, count), threshold=threshold, site=name, **pair.options)
            for name in components.sites
        ]
        kl = kl_per_dimension(*pair.of(0, count), **pair.options)
    variance = torch.cat([found.variance.double() for found in units]).tolist()
    return Latents(
        status="done",
        num_data=count,
        variance=dict(zip(components.names, variance, strict=True)),
        rate=kl.total,
        kl=dict(zip(kl.names, kl.value.tolist(), strict=True)),
        kl_data_stderr=tuple(kl.data_stderr.tolist()),
    )


def examine_gaps(pair: Examination, stages: Stages) -> GapSplit:
    """What the guide loses, of as many data as there is time for."""

    def cost(took: float, size: int, coming: int) -> float:
        draws = (coming - size) * (1000 * STEP_SAMPLES * 3 + 2 * _GAP_SAMPLES)
        # Many data at once cost less than one by one: at most in proportion, and at least what they compute.
        return min(took * coming / size, took + max(draws * pair.per_draw, 0.0))

    parts = pair.pieces(4, functools.partial(gaps_of, pair), cost)
    own = [part.families["guide"] for part in parts]
    level = _whole([part.log_likelihood for part in parts])
    assert level is not None
    share = khat_ok(torch.cat([part.pareto_k for part in parts]), _GAP_SAMPLES)
    if math.isnan(share) or share >= 0.9:
        pair.best = level
    return GapSplit(
        status="done",
        num_data=len(level.pointwise),
        num_samples=_GAP_SAMPLES,
        inference=Nats.of(_whole([row.inference for row in own])),
        approximation=Nats.of(_whole([row.approximation for row in own], own)),
        amortization=Nats.of(_whole([row.amortization for row in own], own)),
        unsplit=own[0].reason or "",
        log_p=Nats.of(level),
        source=parts[-1].source,
        bias=_weighted([part.log_likelihood for part in parts], [part.bias for part in parts]),
        khat_ok=share,
        remaining=_average(own, "remaining"),
        stopped=_average(own, "stopped"),
        num_steps=_average(own, "steps"),
    )


def gaps_of(pair: Examination, start: int, stop: int, families: Mapping[str, Any] | None = None) -> Gaps:
    return gaps(*pair.of(start, stop), families=families, num_samples=_GAP_SAMPLES, num_steps=_GAP_STEPS,
                window=_WINDOW, **pair.seeded(start))  # fmt: skip


def _whole(parts: Sequence[Mean | None], climbed: Sequence[FamilyGaps] = ()) -> Mean | None:
    """One part of the data of all pieces; what remained to climb does not average out over the data."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    variance = torch.cat([part.pointwise_stderr.square() for part in known])
    remaining = None
    if climbed:
        remaining = torch.cat([row.remaining for row in climbed if row.remaining is not None])
        variance = (variance - remaining.square()).clamp(min=0)
    bound = any(part.bound for part in known)
    return Mean.of(torch.cat([part.pointwise for part in known]), variance, _GAP_SAMPLES, remaining, bound)


def _average(rows: Sequence[FamilyGaps], name: str) -> float:
    known = [value for row in rows if (value := getattr(row, name)) is not None]
    return torch.cat(known).double().mean().item() if len(known) == len(rows) else math.nan


def examine_bracket(pair: Examination, stages: Stages) -> Bracketed:
    """log p(x) of simulated data from both sides, and what importance sampling lacks there."""
    found, start = _bracket(pair)
    lower, count = found.lower, len(found.upper.pointwise)
    if found.reason is not None:
        return Bracketed(status="not possible", num_data=count, reason=found.missing)
    importance, low, high = math.nan, Nats(), Nats()
    if pair.judged is not None:
        with contextlib.suppress(OutOfTime), pair.budget.piece():
            options: dict[str, Any] = {"num_samples": pair.judged.num_samples, "method": "importance"} | pair.options
            there = log_likelihood(pair.model, pair.guide, found.data, **options)
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
            return bdmc(*pair.of(0, num_data), num_data=num_data, num_steps=num_steps, start=start,
                        num_samples=_NUM_CHAINS, observed=pair.observed, **pair.options)  # fmt: skip

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
    found = averaged(pointwise, torch.zeros(()))
    return Nats(found["value"], found["data_stderr"])


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
    return Calibrated(
        status="done", num_data=len(found.ranks), num_draws=found.num_samples, level=found.level,
        calibrated=found.calibrated, names=found.names, verdicts=found.verdicts,
        p_value=tuple(found.adjusted.tolist()), coverage_90=tuple(found.covered(0.9)[0].tolist()), found=found,
    )  # fmt: skip
