"""Estimates of log p(x): what they hold, which K is enough, and how they print."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_vae.judging.quotes import Kind, Method, about_weights, kind_of, over_data
from pyro_vae.judging.results import Measured, Result, table
from pyro_vae.judging.weights import khat_limit, khat_ok


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
        bias: Jackknife estimate of the bias of the value (negative: it is too low); where the value is a lower
            bound, so is its size, and it is not quoted.
        ess: Effective number of samples per datum, (sum w)^2 / sum w^2, (N,).
        pareto_k: k-hat per datum, (N,).
        smoothed: log 1/K sum_k w_k per datum after Pareto smoothing of the largest weights, (N,): less noisy
            where k-hat is high, and no longer a lower bound in expectation.
        smoothed_stderr: Monte Carlo standard error of its mean, from the smoothed weights.
        curve: The plain estimate against K.
        method: "importance", or "quadrature": then num_samples are the points of a grid, mc_stderr is what a coarser
            grid would have changed, and there are no weights, hence no k-hat, bias or curve.
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


def _round_up(number: float) -> int:
    """To two digits, upwards."""
    unit = 10 ** max(len(str(math.ceil(number))) - 2, 0)
    return math.ceil(number / unit) * unit
