"""What fitted pairs score on common data; differences of fits over crossed data and seeds, with errors and p-values.

A number y of arm a, fitted with seed s, at datum i is

    y[a, s, i] = mean[a] + seed effect[a, s] + datum effect[a, i] + rest[a, s, i]

Of two arms only d[s, i] = y[a, s, i] - y[b, s, i] is looked at, so that what all arms share is gone. With the mean
squares of its table of S seeds and N data,

    seeds  MS_S = N var_s(mean_i d),   data  MS_D = S var_i(mean_s d),   rest  MS_E

its mean has the variance ([MS_S - MS_E]+ + [MS_D - MS_E]+ + MS_E) / (S N). MS_S, of few seeds, is taken with its own
uncertainty, nu MS_S / chi2(nu), over which the tail of the t distribution of N - 1 degrees is averaged: where seeds are
all that varies, that is Student's t of nu degrees. Pairs of arms lend each other strength: nu and MS_S are those after
squeezing variances towards their common value (Smyth, 2004), as far as they agree, up to (arms - 1) (S - 1) degrees.

References: Smyth, Linear models and empirical Bayes methods, 2004; Tsui and Weerahandi, Generalized p-values, 1989;
Holm, A simple sequentially rejective multiple test procedure, 1979.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import optimize, special, stats
from torch import Tensor

from pyro_vae.judging.estimates import ElboTerms, elbo_terms, log_likelihood
from pyro_vae.judging.evidence import Estimate
from pyro_vae.options import of_pair
from pyro_vae.traces import Program

LEVEL = 0.95
_POINTS = (np.arange(200) + 0.5) / 200  # quantiles of the uncertain variance


@dataclass(frozen=True)
class Scores:
    """One fitted pair on the data that all are compared on, in nats."""

    log_p: Tensor  # estimates of log p(x) per datum, (N,)
    mc_stderr: float  # the Monte Carlo standard error of their mean
    elbo: Tensor  # the ELBO per datum, (N,)
    pareto_k: Tensor  # k-hat of the weights per datum, (N,); nan by quadrature
    num_samples: int  # K, as it was asked for; a grid, where `log_likelihood` takes one, has its own number of points
    bound: bool = False  # whether log_p is no more than a lower bound
    seed: int = 0  # of the fit; fits of two arms with one seed are paired
    seconds: float = math.nan  # that the fit took
    parameters: int = 0  # that were trained


@of_pair  # type: ignore[arg-type]  # mypy joins no names with **about
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

    The arguments are those of `log_likelihood`; `about` are other fields of `Scores`: seed_of_fit, seconds, parameters.
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

    Fits of one seed are paired; a seed that not all arms have is left out. Arms without a common one are independent.
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


def holm(p: np.ndarray) -> np.ndarray:
    """P-values after Holm's correction: valid for any dependence among them.

    Example:
        >>> holm(np.array([0.01, 0.04, 0.03])).round(3).tolist()
        [0.03, 0.06, 0.06]
    """
    order, out = np.argsort(p), np.empty(len(p))
    out[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1.0)
    return out


def compared(tables: Sequence[np.ndarray], most: int) -> dict[str, np.ndarray]:
    """Means, errors, p-values and half widths of intervals of tables of differences (see the module)."""
    squares = np.array([_mean_squares(table) for table in tables]).reshape(-1, 5)
    mean, seeds, data, rest, freedom = squares.T
    counts = np.array([table.shape for table in tables], dtype=float).reshape(-1, 2)
    total = counts.prod(1)
    seeds, freedom = _squeezed(seeds, freedom, most)
    data_part = np.maximum(data - rest, 0)
    stderr = np.sqrt((np.maximum(seeds, rest) + data_part) / total)
    known = freedom > 0
    quantiles = stats.chi2.ppf(_POINTS[None], np.where(known, np.minimum(freedom, 1e9), 1.0)[:, None])
    spread = np.where(known[:, None], np.minimum(freedom, 1e9)[:, None] * seeds[:, None] / quantiles, 0.0)
    variance = (np.maximum(spread, rest[:, None]) + data_part[:, None]) / total[:, None]
    stderrs = np.sqrt(variance)

    def p_of(value: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.abs(value)[:, None] / stderrs
        ratio = np.where(stderrs > 0, ratio, np.where(np.abs(value)[:, None] > 0, np.inf, 0.0))
        return (2 * special.stdtr((counts[:, 1] - 1)[:, None], -ratio)).mean(1)

    low, high = np.zeros(len(mean)), 1e4 * np.maximum(stderrs.max(1, initial=0.0), 1e-300)
    for _ in range(48):
        middle = (low + high) / 2
        outside = p_of(middle) < 1 - LEVEL
        low, high = np.where(outside, low, middle), np.where(outside, middle, high)
    return {"mean": mean, "stderr": stderr, "p": p_of(mean), "half": high}


def _mean_squares(table: np.ndarray) -> tuple[float, float, float, float, float]:
    """The mean of a table of differences, its mean squares of seeds, data and rest, and the seeds' freedom."""
    num_seeds, num_data = table.shape
    mean, rows, columns = table.mean(), table.mean(1), table.mean(0)
    data = num_seeds * columns.var(ddof=1) if num_data > 1 else math.nan
    if num_seeds == 1:
        return mean, 0.0, data, 0.0, 0.0
    rest = table - rows[:, None] - columns[None] + mean
    left = float((rest**2).sum() / ((num_seeds - 1) * max(num_data - 1, 1)))
    return mean, num_data * rows.var(ddof=1), data, left, num_seeds - 1.0


def _squeezed(variances: np.ndarray, freedom: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Variances drawn towards their common value, as far as they agree, and their degrees of freedom then."""
    use = (freedom > 0) & (variances > 0)
    if use.sum() < 2 or most < 1:
        return variances, freedom
    own, degrees = variances[use], freedom[use]
    logs = np.log(own) - special.digamma(degrees / 2) + np.log(degrees / 2)
    excess = logs.var(ddof=1) - special.polygamma(1, degrees / 2).mean()
    if excess > 0:
        inverse = optimize.newton(  # of the trigamma function
            lambda y: 1 / special.polygamma(1, y) - 1 / excess, 0.5 + 1 / excess, tol=1e-10, rtol=1e-10, disp=False
        )
        prior = 2 * float(inverse)
        center = math.exp(logs.mean() + special.digamma(prior / 2) - math.log(prior / 2))
        new, total = (prior * center + degrees * own) / (prior + degrees), prior + degrees
    else:
        new, total = np.full(len(own), (degrees * own).sum() / degrees.sum()), np.full(len(own), np.inf)
    variances, freedom = variances.copy(), freedom.copy()
    variances[use], freedom[use] = new, np.minimum(total, max(float(most), degrees.max()))
    return variances, freedom
