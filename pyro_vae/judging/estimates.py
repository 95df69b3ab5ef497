"""Estimates of log p(x) and of the ELBO, which never travel without their errors; and which data are strange.

With w_k = p(x, z_k) / q(z_k | x), the mean weight is an unbiased estimate of p(x); its logarithm is biased downwards
by about Var(w) / (2 K p(x)^2), which the jackknife measures. Two errors are told apart: that of the Monte Carlo sum for
these data, and that of these data for the population they come from.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_vae.judging.results import Mean, Measured, Result, averaged, table
from pyro_vae.judging.sweeps import Sweep, sweep
from pyro_vae.judging.weights import Scored, at_fewer, fewer, khat_limit, khat_ok
from pyro_vae.options import checked
from pyro_vae.traces import Program


@dataclass(frozen=True)
class Curve(Result):
    """The estimate of log p(x) at smaller numbers of samples, from the same weights, in nats.

    Attributes:
        num_samples: K' = 1, 2, 5, 10, ..., K.
        value: Mean over the data of log 1/K' sum w, averaged over the disjoint blocks of K' weights, one for each
            K'. At K' = 1 it is the ELBO.
        mc_stderr: Its Monte Carlo standard error, given these data. The values share their weights: the
            error of a difference is smaller than these suggest.
    """

    num_samples: tuple[int, ...]
    value: Tensor
    mc_stderr: Tensor

    def rows(self) -> list[dict[str, Any]]:
        return table(num_samples=self.num_samples, value=self.value, mc_stderr=self.mc_stderr)

    def at(self, num_samples: int) -> tuple[float, float]:
        """The curve at any K, linear in log K, and its error: a quarter of the step between two points is added."""
        after = next(i for i, k in enumerate(self.num_samples) if k >= num_samples)
        if self.num_samples[after] == num_samples:
            return self.value[after].item(), self.mc_stderr[after].item()
        a, b = self.num_samples[after - 1 : after + 1]
        share = math.log(num_samples / a) / math.log(b / a)
        low, high = self.value[after - 1 : after + 1].tolist()
        noise = self.mc_stderr[after - 1 : after + 1].max().item()
        return low + share * (high - low), math.hypot(noise, (high - low) / 4)

    def __str__(self) -> str:
        form = "K = {num_samples:<6d} {value:.3f} ± {mc_stderr:.3f} nats"
        return "\n".join(form.format(**row) for row in self.rows())

    def plot(self, ax: Any = None) -> Any:
        """The estimate against K, as a figure."""
        from pyro_vae.plots import bounds_by_samples

        name = "importance-weighted bound"
        return bounds_by_samples(self.num_samples, {name: self.value}, {name: self.mc_stderr}, ax=ax)


@dataclass(frozen=True)
class Estimate(Measured):
    """An estimate of log p(x), averaged over data, in nats.

    Attributes:
        value, mc_stderr, data_stderr, num_samples: Of the mean over the data of log 1/K sum_k w_k, as in `Measured`.
        pointwise: log 1/K sum_k w_k per datum, (N,); where the guide has one density for all data
            (``AutoDiagonalNormal``), one number for all of them, over N.
        bias: Jackknife estimate of the bias of the value (negative: it is too low).
        ess: Effective number of samples per datum, (sum w)^2 / sum w^2, (N,).
        pareto_k: k-hat per datum, (N,).
        smoothed: log 1/K sum_k w_k per datum after Pareto smoothing of the largest weights, (N,): less noisy
            where k-hat is high, and no longer a lower bound in expectation.
        smoothed_stderr: Monte Carlo standard error of its mean, from the smoothed weights.
        curve: The plain estimate against K.
    """

    bias: float
    ess: Tensor
    pareto_k: Tensor
    smoothed: Tensor | None = None
    smoothed_stderr: float = math.nan
    curve: Curve | None = None

    @property
    def smoothed_value(self) -> float:
        """Mean over the data of the Pareto-smoothed estimate."""
        return math.nan if self.smoothed is None else self.smoothed.mean().item()

    def enough(self, tolerance: float | None = None) -> int | None:
        """The smallest K on the curve whose bias is within the tolerance; None where this K is too small.

        The bias at K' is that of the whole, by the jackknife, and what the curve lacks at K'.

        Args:
            tolerance: In nats; None for a tenth of `data_stderr`, below which a bias does not matter beside the
                error of the data (0.1 nats for a single datum).
        """
        if self.curve is None or math.isnan(self.bias):
            return None
        limit = self._tolerance(tolerance)
        missing = abs(self.bias) + (self.curve.value[-1] - self.curve.value)
        # The last point from which on all are within the limit, since single points are noisy.
        inside = (missing <= limit).flip(0).long().cumprod(0).flip(0)
        return self.curve.num_samples[len(inside) - int(inside.sum())] if bool(inside[-1]) else None

    def advice(self, tolerance: float | None = None) -> str:
        """Which K is enough, in words: whether k-hat allows an answer, and what the bias makes of it; as `enough`."""
        count, limit = self.num_samples, self._tolerance(tolerance)
        if math.isnan(self.khat_ok) or math.isnan(self.bias):
            return f"K = {count} is too small to judge: take num_samples >= 25 for a bias and a k̂."
        if self.khat_ok < 0.9:
            return (
                f"k̂ is above {khat_limit(count):.2f} for {100 * (1 - self.khat_ok):.1f} % of the data: the guide "
                "misses mass of the posterior there, so that neither error nor bias can be trusted. A larger K helps "
                "slowly: enrich the guide, or anneal (ais)."
            )
        tenth = tolerance is None and not math.isnan(self.data_stderr)
        against = f"{limit:.2g} nats" + ", a tenth of the error of the data" * tenth
        enough = self.enough(tolerance)
        if enough is not None:
            smaller = "" if enough == count else f"; K = {enough} would do"
            return f"K = {count} is enough: the bias of {self.bias:.2g} is within {against}{smaller}."
        # A bias of c / K, where the variance of the weights is finite; slower where it is not.
        wanted = _round_up(count * abs(self.bias) / limit) if limit > 0 else 0
        if not wanted:
            return f"K = {count} leaves a bias of {self.bias:.2g} nats, and the data have no error to compare it with."
        finite = bool((self.pareto_k < 0.5).double().mean() >= 0.9)
        return (
            f"K = {count} leaves a bias of {self.bias:.2g}, more than {against}. As it falls like 1/K, K = {wanted} "
            + ("would do." if finite else "may do; k̂ >= 0.5 for some data makes it fall more slowly.")
        )

    def _tolerance(self, tolerance: float | None) -> float:
        if tolerance is not None:
            if not tolerance > 0:
                raise ValueError(f"got tolerance={tolerance}, wanted a positive number of nats.")
            return tolerance
        return 0.1 if math.isnan(self.data_stderr) else self.data_stderr / 10

    @property
    def khat_ok(self) -> float:
        """Share of the data whose k-hat is below `khat_limit`; nan where K is too small to say."""
        return khat_ok(self.pareto_k, self.num_samples)

    def __str__(self) -> str:
        text = f"log p(x) = {self.with_errors}"
        if math.isnan(self.khat_ok):
            return f"{text}, k̂ unknown at K = {self.num_samples}"
        text += f", k̂ ok for {100 * self.khat_ok:.1f} %"
        if self.khat_ok < 0.9:
            text += " (unreliable: read it as a lower bound, and raise num_samples or enrich the guide)"
        return text


@dataclass(frozen=True)
class ElboTerms(Measured):
    """The ELBO and its two terms, averaged over data, in nats: value = reconstruction - kl.

    Attributes:
        value, mc_stderr, data_stderr, num_samples: Of E_q[log p(x, z) - log q(z | x)], as in `Measured`.
        pointwise: The ELBO per datum, (N,); where the guide has one density for all data, (1,).
        reconstruction: E_q[log p(x | z)].
        kl: KL(q(z | x) || p(z)), as E_q[log q(z | x) - log p(z)].
    """

    reconstruction: float
    kl: float

    def __str__(self) -> str:
        return f"ELBO = {self.with_errors} = reconstruction {self.reconstruction:.2f} - KL {self.kl:.2f}"


@dataclass(frozen=True)
class RateDistortion(Measured):
    """The ELBO and its two parts with their errors, averaged over data, in nats: value = -(rate + distortion).

    Attributes:
        value, mc_stderr, data_stderr, pointwise, num_samples: Of the ELBO, as in `Measured`.
        rate: R = E KL(q(z | x) || p(z)).
        distortion: D = -E log p(x | z).
    """

    rate: Mean
    distortion: Mean

    def __str__(self) -> str:
        over = f"{len(self.pointwise)} data, {self.num_samples} samples each"
        return f"rate {self.rate.with_errors}, distortion {self.distortion.with_errors}, {over}"


@checked
def log_likelihood(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_samples: int = 5000,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    compile: bool | str = "auto",
) -> Estimate:
    """Estimate log p(x) by importance sampling from the guide.

        log p(x) ~ log 1/K sum_k p(x, z_k) / q(z_k | x),   z_k ~ q(z | x)

    Data and samples go through in chunks, so that memory is bounded: some tens of megabytes beside the data.

    Args:
        model: A Pyro program for p(x, z).
        guide: A Pyro program for q(z | x).
        data: As for `fit`: a tensor, a tuple of tensors, a `Split`, batches.
        num_samples: K.
        seed: Seed of the samples (and of a binarisation drawn on the way); None goes on with torch's random state.
        device: Where the batches go; where the modules are when not given.
        progress: Show a bar; None shows it on a terminal only.
        compile: "auto" captures the computation of a chunk (see `pyro_vae.inference.replays`) where there are
            600 or more of them, and hands it to Inductor where that pays; True does so at once, False runs the
            programs for every chunk. The samples are the same, and the numbers to rounding.
    Returns:
        The estimate with its errors and diagnostics; `advice` says which K is enough.
    Raises:
        ValueError: K < 1, a guide without density, and all that `particles` refuses.
    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_vae import Guide, Model
        >>> model = Model(lambda: dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0))
        >>> guide = Guide(lambda x: dist.Normal(x / 2, 0.5**0.5))
        >>> print(log_likelihood(model, guide, torch.zeros(3), num_samples=100))
        log p(x) = -1.27 ± 0.00 (Monte Carlo; data ± 0.00) nats, k̂ ok for 100.0 %

    References: Burda et al., Importance Weighted Autoencoders, 2016. arXiv:1509.00519; Vehtari et
        al., Pareto Smoothed Importance Sampling, 2024. arXiv:1507.02646
    """
    parts, steps = [], fewer(num_samples)
    totals = torch.zeros(2, len(steps), dtype=torch.float64)
    with sweep(model, guide, data=data, seed=seed, device=device, progress=progress, title="log p(x)") as run:
        for log_weight, _, joint in run.tables(num_samples, compile):
            parts.append(Scored.of(log_weight, joint))
            totals += at_fewer(log_weight.double().cpu(), steps) / torch.tensor([[joint], [joint**2]])
    scored = Scored.joined(parts)
    _warn_not_finite(scored.log_p, "log p(x)")
    count = len(scored.log_p)
    return Estimate(
        **averaged(scored.log_p, scored.log_p_variance),
        bias=scored.bias.mean().item(),
        ess=scored.ess,
        pareto_k=scored.pareto_k,
        num_samples=num_samples,
        smoothed=scored.smoothed,
        smoothed_stderr=scored.smoothed_variance.sum().sqrt().item() / count,
        curve=Curve(tuple(steps), totals[0] / count, totals[1].sqrt() / count),
    )


@checked
def elbo_terms(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_samples: int = 100,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    compile: bool | str = "auto",
) -> ElboTerms:
    """Estimate the ELBO and split it into reconstruction and KL.

        ELBO(x) = E_q[log p(x | z)] - KL(q(z | x) || p(z))

    Args:
        num_samples: K, samples averaged per datum.
        model, guide, data, seed, device, progress, compile: As for `log_likelihood`.
    Returns:
        The terms with their errors.
    Raises:
        ValueError: A guide without density, and all that `particles` refuses.
    """
    with sweep(model, guide, data=data, seed=seed, device=device, progress=progress, title="ELBO") as run:
        bound, likelihood, _ = moments(run, num_samples, compile)
    _warn_not_finite(bound.pointwise, "the ELBO")
    kl = (likelihood.pointwise - bound.pointwise).mean().item()
    return ElboTerms(**bound.measured(), reconstruction=likelihood.value, kl=kl)


@checked
def rate_distortion(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_samples: int = 100,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    compile: bool | str = "auto",
) -> RateDistortion:
    """Rate and distortion of a pair.

    Args:
        num_samples: K, samples averaged per datum.
        model, guide, data, seed, device, progress, compile: As for `log_likelihood`.
    Returns:
        Both with their errors.

    Reference: Alemi et al., Fixing a broken ELBO, 2018. arXiv:1711.00464
    """
    with sweep(model, guide, data=data, seed=seed, device=device, progress=progress, title="rate") as run:
        bound, likelihood, rate = moments(run, num_samples, compile)
    distortion = replace(likelihood, value=-likelihood.value, pointwise=-likelihood.pointwise)
    return RateDistortion(**bound.measured(), rate=rate, distortion=distortion)


def moments(run: Sweep, num_samples: int, compile: bool | str = "auto") -> tuple[Mean, Mean, Mean]:
    """The ELBO, its reconstruction and its KL over the data of a sweep."""
    means, variances = [], []
    for *tables, joint in run.tables(num_samples, compile):
        weight, likelihood = (table.double().cpu() / joint for table in tables)
        both = torch.stack([weight, likelihood, likelihood - weight])  # (3, K, B)
        means.append(both.mean(1))
        variances.append(both.var(1) / num_samples if num_samples > 1 else torch.full_like(both[:, 0], math.nan))
    columns = zip(torch.cat(means, 1), torch.cat(variances, 1), strict=True)
    bound, reconstruction, kl = (Mean.of(mean, variance, num_samples) for mean, variance in columns)
    return bound, reconstruction, kl


def _warn_not_finite(pointwise: Tensor, what: str) -> None:
    """Which rows of an estimate are no number, and what to look at."""
    bad = (~torch.isfinite(pointwise)).nonzero().flatten()
    if len(bad):
        rows = ", ".join(str(int(row)) for row in bad[:3]) + (", ..." if len(bad) > 3 else "")
        warnings.warn(
            f"{what} is not finite for {len(bad)} of {len(pointwise)} data (row {rows}): a density there has left the "
            "range of its floats, or a scale has become 0. Look at these rows, scale the data, or take float64.",
            stacklevel=4,
        )


def _round_up(number: float) -> int:
    """To two digits, upwards."""
    unit = 10 ** max(len(str(math.ceil(number))) - 2, 0)
    return math.ceil(number / unit) * unit
