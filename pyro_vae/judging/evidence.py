"""Estimates of log p(x), and bounds by annealing: what they hold, how many samples or steps are enough, how they print.

A bracket is one in expectation, whatever the chains did. Where they have not converged, it is said that there is none,
and why, and how many steps it would take: the width falls as a power of T, which is taken on to one nat.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae import plots
from pyro_vae.judging.hamiltonian import Kernels
from pyro_vae.judging.quotes import Kind, Method, about_weights, kind_of, lower_bound, over_data
from pyro_vae.judging.results import Mean, Measured, Result, row, table
from pyro_vae.judging.weights import khat_limit, khat_ok

# Nats that a bracket may be uncertain by, and that log weights may differ by; the share of moves to be accepted.
_CLOSE = 1.0
_APART = 5.0
_MOVING = 0.1


@dataclass(frozen=True)
class Curve(Result):
    """The estimate of log p(x) at smaller numbers of samples, from the same weights, in nats.

    Attributes:
        num_samples: K' = 1, 2, 5, 10, ..., K.
        value: Mean over the data of log 1/K' sum w, averaged over disjoint blocks of K' weights; the ELBO at K' = 1.
        mc_stderr: Its Monte Carlo standard error; the values share their weights, so differences know more.
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
        name = "importance-weighted bound"
        return plots.bounds_by_samples(self.num_samples, {name: self.value}, {name: self.mc_stderr}, ax=ax)


@dataclass(frozen=True)
class Estimate(Measured):
    """An estimate of log p(x), averaged over data, in nats.

    Attributes:
        value, mc_stderr, data_stderr, num_samples: Of the mean over the data of log 1/K sum_k w_k, as in `Measured`.
        pointwise: log 1/K sum_k w_k per datum, (N,); where the guide has one density for all data, one number over N.
        bias: Jackknife estimate of the bias of the value (negative: it is too low); not quoted of a lower bound.
        ess: Effective number of samples per datum, (sum w)^2 / sum w^2, (N,).
        pareto_k: k-hat per datum, (N,).
        smoothed: The same after Pareto smoothing, (N,): less noisy, and no longer a lower bound in expectation.
        smoothed_stderr: Monte Carlo standard error of its mean, from the smoothed weights.
        curve: The plain estimate against K.
        method: "importance", or "quadrature": then num_samples are the points of a grid, mc_stderr is what a coarser
            one would have changed, and there is no k-hat, bias or curve.
    """

    bias: float
    ess: Tensor
    pareto_k: Tensor
    smoothed: Tensor | None = None
    smoothed_stderr: float = math.nan
    curve: Curve | None = None
    method: Method = "importance"

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
        if self.method == "quadrature":
            return f"By quadrature K plays no part, and a coarser grid gives the same within {self.mc_stderr:.1g} nats."
        if math.isnan(self.khat_ok) or math.isnan(self.bias):
            return f"K = {count} is too small to judge: take num_samples >= 25 for a bias and a k̂."
        if self.kind == "lower bound":
            return (
                f"k̂ is above {khat_limit(count):.2f} for {100 * (1 - self.khat_ok):.1f} % of the data: the guide "
                "misses mass of the posterior there, so that neither error nor bias can be trusted. A larger K helps "
                "slowly: enrich the guide, or anneal (ais)."
            )
        tenth = tolerance is None and not math.isnan(self.data_stderr)
        against = f"{limit:.2g} nats" + ", a tenth of the error of the data" * tenth
        if (enough := self.enough(tolerance)) is not None:
            smaller = "" if enough == count else f"; K = {enough} would do"
            return f"K = {count} is enough: the bias of {self.bias:.2g} is within {against}{smaller}."
        # A bias of c / K, where the variance of the weights is finite; slower where it is not.
        if not limit > 0:
            return f"K = {count} leaves a bias of {self.bias:.2g} nats, and the data have no error to compare it with."
        needed = math.ceil(count * abs(self.bias) / limit)
        unit = 10 ** max(len(str(needed)) - 2, 0)  # to two digits, upwards
        wanted = math.ceil(count * abs(self.bias) / limit / unit) * unit
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

    @property
    def trusted(self) -> Tensor:
        """Of which data the value stands by itself, and is no lower bound, (N,): k-hat is good, or not known."""
        return ~(self.pareto_k >= khat_limit(self.num_samples))

    @property
    def kind(self) -> Kind:
        """By `kind_of`: "estimate", "lower bound", or "unchecked" for fewer than 25 samples."""
        return kind_of(self.khat_ok, self.method)

    def __str__(self) -> str:
        if self.method == "quadrature":
            return f"log p(x) = {self.value:.2f} nats ({over_data(self.data_stderr)}), by quadrature"
        return f"log p(x) {self.equation}{about_weights(self.khat_ok, self.num_samples)}"


@dataclass(frozen=True)
class Annealed(Measured):
    """A lower bound on log p(x) by annealed importance sampling, averaged over data, in nats.

    Attributes:
        value, mc_stderr, data_stderr: Of the mean over the data of log 1/C sum_c w_c, as in `Measured`.
        pointwise: log 1/C sum_c w_c per datum, (N,).
        num_samples: C.
        bias: Jackknife estimate of the bias of the value (negative: it is too low).
        pointwise_stderr: Its Monte Carlo standard error, (N,).
        log_weight: log w_c, (C, N).
        ess: Effective number of chains per datum, (sum w)^2 / sum w^2, (N,).
        acceptance: Mean probability of acceptance per datum, (N,); nan for T = 1.
        kernels: What the chains used, frozen before they ran, one for each batch.
        start: "guide" or "prior".
        num_steps: T.
    """

    bias: float
    pointwise_stderr: Tensor
    log_weight: Tensor
    ess: Tensor
    acceptance: Tensor
    kernels: tuple[Kernels, ...]
    start: str
    num_steps: int

    @property
    def reason(self) -> str | None:
        """Why the chains have not converged; None where nothing says so."""
        return unconverged(self.log_weight, self.acceptance)

    def __str__(self) -> str:
        if self.reason is not None:
            return f"log p(x) {lower_bound(self.value)} nats, and no better: {self.reason}, at {self.num_steps} steps"
        return (
            f"log p(x) >= {self.with_errors}, annealed from the {self.start} over {self.num_steps} steps, acceptance "
            f"{self.acceptance.mean():.2f}, chain ESS {self.ess.mean():.1f} of {self.num_samples}"
        )


@dataclass(frozen=True)
class Bracket(Result):
    """Bounds on log p(x) of simulated data from both sides, in nats.

    Monte Carlo errors are given the simulated data; the `data_stderr` of the width covers everything.

    Attributes:
        lower: The forward chains' bound, with all that belongs to it.
        upper: The upper bound.
        width: Upper minus lower bound.
        backward_log_weight: log w_r of the chains from the exact draw, (C, N).
        backward_acceptance: (N,).
        data: The simulated arguments of the programs.
        wanted_steps: Where there is no bracket, about how many steps it would take; None where that is not known.
    """

    lower: Annealed
    upper: Mean
    width: Mean
    backward_log_weight: Tensor
    backward_acceptance: Tensor
    data: tuple[Any, ...]
    wanted_steps: int | None = None

    @property
    def reason(self) -> str | None:
        """Why there is no bracket; None where there is one."""
        found = self.lower.reason or unconverged(self.backward_log_weight, self.backward_acceptance)
        if found is not None:
            return found
        width = self.width
        error = max(e for e in (width.mc_stderr, width.data_stderr, 0.0) if not math.isnan(e))
        if error > max(_CLOSE, abs(width.value) / 3):
            return f"its width, {width.value:.3g} nats, is known to {error:.3g} only: single chains decide"
        return None

    @property
    def missing(self) -> str:
        """That there is no bracket, why, and what it would take."""
        steps = self.lower.num_steps
        take = "how many it would take is not known" if self.wanted_steps is None else f"about {self.wanted_steps:,}"
        return f"no bracket: {self.reason}, at {steps:,} steps ({take})"

    def rows(self) -> list[dict[str, Any]]:
        parts = {"lower": self.lower, "upper": self.upper, "width": self.width}
        words = {} if self.reason is None else {"is": self.missing}
        numbers = ("value", "mc_stderr", "data_stderr", "num_samples")
        return [{"bound": name} | {k: row(part)[k] for k in numbers} | words for name, part in parts.items()]

    def __str__(self) -> str:
        if self.reason is not None:
            return self.missing
        error = "(one datum)" if math.isnan(self.width.data_stderr) else f"± {self.width.data_stderr:.2f}"
        return f"[{self.lower.value:.2f}, {self.upper.value:.2f}] nats (width {self.width.value:.2f} {error})"

    def plot(self, ax: Any = None) -> Any:
        """The interval of each datum, as a figure."""
        return plots.bracket(self.lower.pointwise, self.upper.pointwise, lower_stderr=self.lower.pointwise_stderr,
                       upper_stderr=self.upper.pointwise_stderr, ax=ax)  # fmt: skip


def unconverged(log_weight: Tensor, acceptance: Tensor) -> str | None:
    """Why chains of log w_c, (C, N), and acceptance, (N,), have not converged; None where nothing says so."""
    lost = int((~torch.isfinite(log_weight)).sum())
    if lost:
        return f"{lost} of {log_weight.numel()} chains have left the numbers"
    moved = acceptance.mean().item()
    if moved < _MOVING:
        return f"only {100 * moved:.0f} % of the moves were accepted"
    apart = 0.0 if len(log_weight) < 2 else log_weight.double().var(0).mean().sqrt().item()
    if apart > _APART:
        return f"the chains of a datum end {apart:.3g} nats apart (standard deviation of their log weights)"
    return None


def steps_wanted(short: Bracket, long: Bracket) -> int | None:
    """T at which the width would be a nat, by the power of T by which it fell between two lengths of chains.

    None where it did not fall, or more slowly than T^(-1/4): then two lengths say nothing of a third.
    """
    narrow, wide = abs(long.width.value), abs(short.width.value)
    first, second = short.lower.num_steps, long.lower.num_steps
    if not (math.isfinite(narrow) and math.isfinite(wide) and second > first and narrow > 0 and wide > 0):
        return None
    power = math.log(wide / narrow) / math.log(second / first)
    wanted = second * max(2.0, narrow / _CLOSE) ** (1 / power) if power >= 0.25 else math.inf
    if wanted > 10**7:
        return None
    unit = 10 ** (len(str(int(wanted))) - 1)
    return math.ceil(wanted / unit) * unit
