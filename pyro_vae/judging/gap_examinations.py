"""How the gaps of a judgement are found: the split of the guide's own family, and what another family would gain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae.judging._gaps import STEP_SAMPLES, FamilyGaps, Gaps, gaps
from pyro_vae.judging.budget import OutOfTime
from pyro_vae.judging.examinations import Examination, weighted
from pyro_vae.judging.nats import Nats
from pyro_vae.judging.results import Mean
from pyro_vae.judging.stages import GapSplit, Remedy, Stages
from pyro_vae.judging.weights import khat_ok
from pyro_vae.parts.posteriors.amortized import FullNormal

_NUM_SAMPLES, _NUM_STEPS, _WINDOW = 1000, 1000, 50


def examine_gaps(pair: Examination, stages: Stages) -> GapSplit:
    """What the guide loses, of as many data as there is time for."""

    def work(start: int, stop: int) -> Gaps:
        return _gaps(pair, (start, stop), {}, pair.options["seed"] + start)

    def cost(took: float, size: int, coming: int) -> float:
        draws = (coming - size) * (1000 * STEP_SAMPLES * 3 + 2 * _NUM_SAMPLES)
        # Many data at once cost less than one by one: at most in proportion, and at least what they compute.
        return min(took * coming / size, took + max(draws * pair.per_draw, 0.0))

    parts = pair.pieces(4, work, cost)
    own = [part.families["guide"] for part in parts]
    level = _whole([part.log_likelihood for part in parts])
    assert level is not None
    khat = torch.cat([part.pareto_k for part in parts])
    share = khat_ok(khat, _NUM_SAMPLES)
    if math.isnan(share) or share >= 0.9:
        pair.best = level
    return GapSplit(
        status="done",
        num_data=len(level.pointwise),
        num_samples=_NUM_SAMPLES,
        inference=_measured(_whole([row.inference for row in own])),
        approximation=_measured(_whole([row.approximation for row in own], own)),
        amortization=_measured(_whole([row.amortization for row in own], own)),
        unsplit=own[0].reason or "",
        log_p=_measured(level),
        source=parts[-1].source,
        bias=weighted([part.log_likelihood for part in parts], [part.bias for part in parts]),
        khat_ok=share,
        remaining=_average([row.remaining for row in own]),
        stopped=_average([row.stopped for row in own]),
        num_steps=_average([row.steps for row in own]),
    )


def examine_remedy(pair: Examination, stages: Stages) -> Remedy:
    """What a normal of full covariance would gain, where the family is at fault."""
    if not stages.gaps.split:
        return Remedy(reason="the family's part of the gap is not known")
    if not stages.gaps.approximation.material():
        return Remedy(reason="not needed, since the family costs nothing that matters")
    size, least = min(16, stages.gaps.num_data), min(4, stages.gaps.num_data)
    both, took = None, 0.0
    for stop in dict.fromkeys((least, size)):
        if both is not None and not pair.budget.fits(took * stop / least):
            break
        began = pair.budget.clock()
        try:
            with pair.budget.piece():
                both = _gaps(pair, (0, stop), {"FullNormal": FullNormal}, pair.options["seed"])
        except OutOfTime:
            if both is None:
                raise
        took = pair.budget.clock() - began
    assert both is not None
    own, full = both.families["guide"], both.families["FullNormal"]
    if own.optimum is None or full.optimum is None or own.approximation is None or full.approximation is None:
        return Remedy(status="not possible", reason=own.reason or full.reason or "one of them has no local form")
    return Remedy(
        status="done",
        num_data=len(full.optimum.pointwise),
        gain=_measured(full.optimum).minus(_measured(own.optimum)),
        approximation_before=own.approximation.value,
        approximation=full.approximation.value,
    )


def _gaps(pair: Examination, of: tuple[int, int], families: Mapping[str, Any], seed: int) -> Gaps:
    options = pair.options | {"seed": seed}
    return gaps(
        pair.model, pair.guide, pair.part(*of), families=families, num_samples=_NUM_SAMPLES,
        num_steps=_NUM_STEPS, window=_WINDOW, **options,
    )  # fmt: skip


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
    return Mean.of(torch.cat([part.pointwise for part in known]), variance, _NUM_SAMPLES, remaining)


def _measured(part: Mean | None) -> Nats:
    return Nats() if part is None else Nats(part.value, part.mc_stderr, part.data_stderr)


def _average(values: Sequence[Tensor | None]) -> float:
    known = [value for value in values if value is not None]
    return torch.cat(known).double().mean().item() if len(known) == len(values) else math.nan
