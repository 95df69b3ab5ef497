"""What a fitted pair scores on data that several are compared on, datum by datum."""

from __future__ import annotations

import math
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
        num_samples: K.
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
    return scores_of(found, terms, **about)


def scores_of(found: Estimate, terms: ElboTerms, **about: Any) -> Scores:
    """The scores that an estimate of log p(x) and an ELBO are, with other fields of `Scores`."""
    return Scores(found.pointwise, found.mc_stderr, terms.pointwise, found.pareto_k, found.num_samples,
                  found.kind == "lower bound", **about)  # fmt: skip
