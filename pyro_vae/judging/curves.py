"""What a fit says of itself: whether its curve still rose at the end, or had fallen, and what unseen data lack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pyro_vae.inference.records import History
from pyro_vae.inference.trees import at
from pyro_vae.judging.budget import Examination
from pyro_vae.judging.estimates import elbo_terms
from pyro_vae.judging.results import Nats
from pyro_vae.judging.stages import Stages
from pyro_vae.judging.trials import Training

_SAMPLES = 100


def records_of(history: History | Sequence[Mapping[str, Any]] | None) -> tuple[list[Mapping[str, Any]], bool] | None:
    """The records of a fit, and whether patience ended it; a ValueError of anything else."""
    if history is None:
        return None
    records: list[Any] = list(history.records if isinstance(history, History) else history)
    if not all(isinstance(record, Mapping) for record in records):
        raise ValueError(
            f"got history of type {type(history).__name__}, wanted what fit returned, or a run's metrics: one mapping "
            "for each epoch."
        )
    return records, bool(getattr(history, "stopped_early", False))


def examine_training(pair: Examination, stages: Stages) -> Training:
    """The trend of the curves, and the ELBO of training data beside that of the data that are judged."""
    if pair.history is None and pair.training is None:
        return Training(reason="neither the history of the fit nor training data were given")
    found: dict[str, Any] = {} if pair.history is None else trend(*pair.history)
    count = 0
    if pair.training is not None:
        with pair.budget.piece():
            both = at(pair.training, slice(pair.num_data)), pair.data
            seen, unseen = (elbo_terms(pair.model, pair.guide, data, num_samples=_SAMPLES, **pair.options)
                            for data in both)  # fmt: skip
        count = len(unseen.pointwise)
        train, held = Nats.of(seen), Nats.of(unseen)
        error = math.hypot(*(x for n in (train, held) for x in (n.mc_stderr, n.data_stderr)))
        found |= {"train": train, "held": held, "shortfall": Nats(train.value - held.value, error)}
    return Training(status="done", num_data=count, **found)


def trend(records: Sequence[Mapping[str, Any]], stopped_early: bool = False) -> dict[str, Any]:
    """The fields of `Training` that the curves say.

    The end rose by the slope of a line through the last fifth of the epochs (five at least). It had fallen by what the
    average over a window of the last epochs lies below the same average where that was highest.

    Example:
        >>> ups = [{"validation": -10.0 - 5.0 / epoch} for epoch in range(1, 41)]
        >>> found = trend(ups)
        >>> found["rising"].value > 0, found["fallen"].value
        (True, 0.0)
    """
    fields: dict[str, Any] = {"epochs": len(records), "stopped_early": stopped_early}
    name = next((n for n in ("validation", "bound") if any(_number(r.get(n)) for r in records)), None)
    if name is None:
        return fields
    curve = torch.tensor([float(r[name]) if _number(r.get(name)) else math.nan for r in records], dtype=torch.float64)
    known, fields["curve"] = curve.isfinite(), name
    curve = curve[known]
    tail = max(5, len(curve) // 5)
    if len(curve) >= tail + 1 and not stopped_early:
        slope, error, _ = _line(curve[-tail:])
        fields["rising"] = Nats(slope * (tail - 1), error * (tail - 1))
    if name != "validation":
        return fields
    best, longest = 0, 0
    for index in range(1, len(curve)):
        if curve[index] > curve[best]:
            best, longest = index, max(longest, index - best)
    fields |= {"best_epoch": int(known.nonzero()[best]) + 1, "longest_wait": longest}
    window = max(3, len(curve) // 20)
    if len(curve) >= 2 * window and not stopped_early:  # patience went back to the best
        means = curve.unfold(0, window, 1).mean(1)
        noise = _line(curve[-tail:])[2] if len(curve) >= tail else math.nan
        top = int(means.argmax())
        fallen = (means[top] - means[-1]).item() if top <= len(means) - 1 - window else 0.0
        fields["fallen"] = Nats(fallen, noise * math.sqrt(2 / window))
    return fields


def _line(values: torch.Tensor) -> tuple[float, float, float]:
    """What a line through some epochs rises by from one to the next, its error, and the standard deviation about it."""
    time = torch.arange(len(values), dtype=values.dtype)
    time = time - time.mean()
    slope = (time @ values) / (time @ time)
    rest = values - values.mean() - time * slope
    scatter = (rest.square().sum() / max(len(values) - 2, 1)).sqrt().item()
    return slope.item(), scatter / (time @ time).sqrt().item(), scatter


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
