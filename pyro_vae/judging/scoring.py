"""What a fitted pair scores on data that several are compared on, datum by datum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.judging.estimates import ElboTerms, Estimate, elbo_terms, log_likelihood
from pyro_vae.options import checked
from pyro_vae.traces import Program


@dataclass(frozen=True)
class Scores:
    """One fitted pair on the data that all are compared on, in nats.

    Attributes:
        log_p: Estimates of log p(x) per datum, (N,).
        mc_stderr: The Monte Carlo standard error of their mean.
        elbo: The ELBO per datum, (N,).
        pareto_k: k-hat of the weights per datum, (N,); nan by quadrature.
        num_samples: K, as it was asked for; a grid, where `log_likelihood` takes one, has its own number of points.
        bound: Whether log_p is no more than a lower bound.
        seed: Of the fit; fits of two arms with one seed are paired.
        seconds: That the fit took.
        parameters: That were trained.
    """

    log_p: Tensor
    mc_stderr: float
    elbo: Tensor
    pareto_k: Tensor
    num_samples: int
    bound: bool = False
    seed: int = 0
    seconds: float = math.nan
    parameters: int = 0


@checked
def scores(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_samples: int = 1000,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    **about: Any,
) -> Scores:
    """Score a pair for `rank`: log p(x) and ELBO per datum, with noise that is the same for all of one seed.

    Args:
        num_samples: K.
        about: Other fields of `Scores`: seed_of_fit, seconds, parameters.
        model, guide, data, seed, device, progress: As for `log_likelihood`.
    Returns:
        The scores.
    Raises:
        ValueError: All that `log_likelihood` refuses.
    """
    options: dict[str, Any] = {"seed": seed, "device": device, "progress": progress}
    found = log_likelihood(model, guide, data, num_samples=num_samples, **options)
    terms = elbo_terms(model, guide, data, num_samples=min(100, num_samples), **options)
    about = {"seed" if name == "seed_of_fit" else name: value for name, value in about.items()}
    return scores_of(found, terms, num_samples, **about)


def scores_of(found: Estimate, terms: ElboTerms, num_samples: int, **about: Any) -> Scores:
    """The scores that an estimate of log p(x), for which K samples were asked, and an ELBO are, with other fields."""
    return Scores(found.pointwise, found.mc_stderr, terms.pointwise, found.pareto_k, num_samples,
                  found.kind == "lower bound", **about)  # fmt: skip


def balanced(groups: Mapping[str, tuple[Scores, ...]]) -> tuple[dict[str, tuple[Scores, ...]], list[str]]:
    """As many fits of each arm, in an order in which they are paired, and what is left out for it.

    Fits of one seed are paired. A seed that not all arms have says nothing of their order: means over other seeds would
    contradict the paired differences. Arms without a seed in common are independent, and paired as they come.
    """
    seeds = {name: [each.seed for each in own] for name, own in groups.items()}
    common = sorted(set.intersection(*map(set, seeds.values())))
    if not common or any(len(set(own)) < len(own) for own in seeds.values()):
        least = min(map(len, groups.values()))
        kept = {name: own[:least] for name, own in groups.items()}
        more = [f"{name} has {len(own)}" for name, own in groups.items() if len(own) > least]
        said = f"{least} fits of each arm are compared, as many as all have: {', '.join(more)}"
    else:
        by_seed = {name: {each.seed: each for each in own} for name, own in groups.items()}
        kept = {name: tuple(own[seed] for seed in common) for name, own in by_seed.items()}
        every = sorted({seed for own in seeds.values() for seed in own})
        lacks = {name: [seed for seed in every if seed not in own] for name, own in seeds.items()}
        more = [f"{name} lacks {', '.join(map(str, own))}" for name, own in lacks.items() if own]
        said = f"of the seeds only {', '.join(map(str, common))} is compared, which all arms have: {'; '.join(more)}"
    return kept, [said] if more else []
