"""Estimates of log p(x) and of the ELBO, which never travel without their errors.

With w_k = p(x, z_k) / q(z_k | x), the mean weight is an unbiased estimate of p(x); its
logarithm is biased downwards by about Var(w) / (2 K p(x)^2), which the jackknife
measures. Two errors are told apart: that of the Monte Carlo sum for these data, and
that of these data for the population they come from.

How the estimate grows with K needs no further samples: K weights are K / K' disjoint blocks of
K' weights, each of which would have given the estimate at K'.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from tqdm import tqdm

from pyro_vae.evaluation import evaluating
from pyro_vae.inference.batches import Batches
from pyro_vae.inference.capture import capturing, fast_matmul
from pyro_vae.inference.memory import reused_memory
from pyro_vae.inference.per_datum import lengths
from pyro_vae.inference.replays import Replayed
from pyro_vae.inference.trees import leaves, rows, values
from pyro_vae.judging.psis import khat_limit, pareto_smoothed
from pyro_vae.options import checked
from pyro_vae.parameters import device_of
from pyro_vae.traces import Layout, Particles, Program, draw, layout, plate_nesting

# Floats per tensor of decoder output: large enough to hide Python, small enough for the caches (6 MB).
_CHUNK = 3 * 2**19
# Log weights that are held at once.
_HELD = 2**22


@dataclass(frozen=True)
class Curve:
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

    def __str__(self) -> str:
        rows = zip(self.num_samples, self.value.tolist(), self.mc_stderr.tolist(), strict=True)
        return "\n".join(f"K = {k:<6d} {value:.3f} ± {error:.3f} nats" for k, value, error in rows)


@dataclass(frozen=True)
class Estimate:
    """An estimate of log p(x), averaged over data, in nats.

    Attributes:
        value: Mean over the data of log 1/K sum_k w_k.
        mc_stderr: Monte Carlo standard error of the value, given these data.
        data_stderr: Standard error of the value for the population of the data.
        bias: Jackknife estimate of the bias of the value (negative: it is too low).
        pointwise: log 1/K sum_k w_k per datum, (N,); where the guide has one density for all data
            (``AutoDiagonalNormal``), one number for all of them, over N.
        ess: Effective number of samples per datum, (sum w)^2 / sum w^2, (N,).
        pareto_k: k-hat per datum, (N,).
        num_samples: K.
        smoothed: log 1/K sum_k w_k per datum after Pareto smoothing of the largest weights, (N,): less noisy
            where k-hat is high, and no longer a lower bound in expectation.
        smoothed_stderr: Monte Carlo standard error of its mean, from the smoothed weights.
        curve: The plain estimate against K.
    """

    value: float
    mc_stderr: float
    data_stderr: float
    bias: float
    pointwise: Tensor
    ess: Tensor
    pareto_k: Tensor
    num_samples: int
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
        """Which K is enough, in words: whether k-hat allows an answer, and what the bias makes of it.

        Args:
            tolerance: As for `enough`.
        """
        count, limit = self.num_samples, self._tolerance(tolerance)
        if math.isnan(self.khat_ok) or math.isnan(self.bias):
            return f"K = {count} is too small to judge: take num_samples >= 25 for a bias and a k̂."
        if self.khat_ok < 0.9:
            return (
                f"k̂ is above {khat_limit(count):.2f} for {100 * (1 - self.khat_ok):.1f} % of the data: the guide "
                "misses mass of the posterior there, so that neither error nor bias can be trusted. A larger K helps "
                "slowly: enrich the guide, or anneal (ais)."
            )
        against = f"{limit:.2g} nats" + (", a tenth of the error of the data" if tolerance is None else "")
        if math.isnan(self.data_stderr) and tolerance is None:
            against = f"{limit:.2g} nats"
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
        if self.pareto_k.isnan().all():
            return math.nan
        return (self.pareto_k < khat_limit(self.num_samples)).double().mean().item()

    def __str__(self) -> str:
        text = f"log p(x) = {self.value:.2f} ± {self.mc_stderr:.2f} (Monte Carlo; {over_data(self.data_stderr)}) nats"
        if math.isnan(self.khat_ok):
            return f"{text}, k̂ unknown at K = {self.num_samples}"
        text += f", k̂ ok for {100 * self.khat_ok:.1f} %"
        if self.khat_ok < 0.9:
            text += " (unreliable: read it as a lower bound, and raise num_samples or enrich the guide)"
        return text


@dataclass(frozen=True)
class ElboTerms:
    """The ELBO and its two terms, averaged over data, in nats: value = reconstruction - kl.

    Attributes:
        value: E_q[log p(x, z) - log q(z | x)].
        reconstruction: E_q[log p(x | z)].
        kl: KL(q(z | x) || p(z)), as E_q[log q(z | x) - log p(z)].
        mc_stderr: Monte Carlo standard error of the value, given these data.
        data_stderr: Standard error of the value for the population of the data.
        pointwise: The ELBO per datum, (N,); where the guide has one density for all data, (1,).
        num_samples: K.
    """

    value: float
    reconstruction: float
    kl: float
    mc_stderr: float
    data_stderr: float
    pointwise: Tensor
    num_samples: int

    def __str__(self) -> str:
        return (
            f"ELBO = {self.value:.2f} ± {self.mc_stderr:.2f} (Monte Carlo; {over_data(self.data_stderr)}) nats "
            f"= reconstruction {self.reconstruction:.2f} - KL {self.kl:.2f}"
        )


def over_data(data_stderr: float) -> str:
    """The error for the population in words; a single datum says nothing of others.

    Example:
        >>> over_data(0.24), over_data(float("nan"))
        ('data ± 0.24', 'one datum')
    """
    return "one datum" if math.isnan(data_stderr) else f"data ± {data_stderr:.2f}"


@checked
def log_likelihood(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_samples: int = 5000,
    device: str | torch.device | None = None,
    seed: int | None = 0,
    progress: bool | None = None,
    compile: bool | str = "auto",
) -> Estimate:
    """Estimate log p(x) by importance sampling from the guide.

        log p(x) ~ log 1/K sum_k p(x, z_k) / q(z_k | x),   z_k ~ q(z | x)

    Data and samples go through in chunks, so that memory is bounded whatever their
    numbers: some tens of megabytes beside the data.

    Args:
        model: A Pyro program for p(x, z).
        guide: A Pyro program for q(z | x).
        data: As for `fit`: a tensor, a tuple of tensors, a `Split`, batches.
        num_samples: K.
        device: Where the batches go; where the modules are when not given.
        seed: Seed of the samples (and of a binarisation drawn on the way); None goes
            on with torch's random state.
        progress: Show a bar; None shows it on a terminal only.
        compile: "auto" captures the computation of a chunk (see `pyro_vae.inference.replays`) where there are
            600 or more of them, and hands it to Inductor where that pays; True does so at once, False runs the
            programs for every chunk. The samples are the same, and the numbers to rounding.
    Returns:
        The estimate with its errors and diagnostics; `advice` says which K is enough.
    Raises:
        ValueError: K < 1, a guide without density, and all that `particles` refuses.
    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> print(log_likelihood(model, guide, torch.zeros(3), num_samples=100))
        log p(x) = -1.27 ± 0.00 (Monte Carlo; data ± 0.00) nats, k̂ ok for 100.0 %

    References: Burda et al., Importance Weighted Autoencoders, 2016. arXiv:1509.00519; Vehtari et
        al., Pareto Smoothed Importance Sampling, 2024. arXiv:1507.02646
    """
    parts, steps = [], _steps(num_samples)
    totals = torch.zeros(2, len(steps), dtype=torch.float64)
    with evaluating(model, guide, seed=seed), reused_memory():
        for log_weight, _, joint in _tables(model, guide, data, num_samples, device, progress, "log p(x)", compile):
            parts.append(_per_datum(_summary(log_weight), joint))
            totals += _at_steps(log_weight.double().cpu(), steps) / torch.tensor([[joint], [joint**2]])
    pointwise, variance, bias, ess, k, smoothed, spread = (torch.cat(column) for column in zip(*parts, strict=True))
    _say_not_finite(pointwise, "log p(x)")
    count = len(pointwise)
    return Estimate(
        value=pointwise.mean().item(),
        mc_stderr=variance.sum().sqrt().item() / count,
        data_stderr=pointwise.std().item() / math.sqrt(count) if count > 1 else math.nan,
        bias=bias.mean().item(),
        pointwise=pointwise,
        ess=ess,
        pareto_k=k,
        num_samples=num_samples,
        smoothed=smoothed,
        smoothed_stderr=spread.sum().sqrt().item() / count,
        curve=Curve(tuple(steps), totals[0] / count, totals[1].sqrt() / count),
    )


@checked
def elbo_terms(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_samples: int = 100,
    device: str | torch.device | None = None,
    seed: int | None = 0,
    progress: bool | None = None,
    compile: bool | str = "auto",
) -> ElboTerms:
    """Estimate the ELBO and split it into reconstruction and KL.

        ELBO(x) = E_q[log p(x | z)] - KL(q(z | x) || p(z))

    Args:
        model: A Pyro program for p(x, z).
        guide: A Pyro program for q(z | x).
        data: As for `fit`.
        num_samples: K, samples averaged per datum.
        device: Where the batches go; where the modules are when not given.
        seed: Seed of the samples; None goes on with torch's random state.
        progress: Show a bar; None shows it on a terminal only.
        compile: As for `log_likelihood`.
    Returns:
        The terms with their errors.
    Raises:
        ValueError: K < 1, a guide without density, and all that `particles` refuses.
    """
    parts = []
    with evaluating(model, guide, seed=seed), reused_memory():
        for *tables, joint in _tables(model, guide, data, num_samples, device, progress, "ELBO", compile):
            weight, likelihood = (table.double().cpu() / joint for table in tables)
            variance = weight.var(0) / num_samples if num_samples > 1 else torch.full_like(weight[0], math.nan)
            parts.append((weight.mean(0), likelihood.mean(0), variance))
    pointwise, likelihood, variance = (torch.cat(column) for column in zip(*parts, strict=True))
    _say_not_finite(pointwise, "the ELBO")
    count = len(pointwise)
    return ElboTerms(
        value=pointwise.mean().item(),
        reconstruction=likelihood.mean().item(),
        kl=(likelihood - pointwise).mean().item(),
        mc_stderr=variance.sum().sqrt().item() / count,
        data_stderr=pointwise.std().item() / math.sqrt(count) if count > 1 else math.nan,
        pointwise=pointwise,
        num_samples=num_samples,
    )


def _say_not_finite(pointwise: Tensor, what: str) -> None:
    """One line where an estimate is no number: which rows, and what to look at."""
    bad = (~torch.isfinite(pointwise)).nonzero().flatten()
    if len(bad):
        rows = ", ".join(str(int(row)) for row in bad[:3]) + (", ..." if len(bad) > 3 else "")
        warnings.warn(
            f"{what} is not finite for {len(bad)} of {len(pointwise)} data (row {rows}): a density there has left the "
            "range of its floats, or a scale has become 0. Look at these rows, scale the data, or take float64.",
            stacklevel=4,
        )


def _summary(log_weight: Tensor) -> tuple[Tensor, ...]:
    """Per datum, from (K, B): estimate, its variance and bias, effective sample size, k-hat; the smoothed
    estimate and its variance."""
    smoothed, k = pareto_smoothed(log_weight)
    log_weight = log_weight.double().cpu()
    count = len(log_weight)
    total = torch.logsumexp(log_weight, 0)
    share = (log_weight - total).exp()  # w_k / sum w
    variance = _variance(log_weight)
    bias = torch.full_like(total, math.nan)
    if count > 1:
        # Leaving out one weight of K changes the log of their mean by this much.
        change = torch.log1p(-share.clamp(max=1 - 1e-12)) + math.log(count / (count - 1))
        bias = (count - 1) * change.mean(0)
    ess = 1 / share.square().sum(0)
    smooth = torch.logsumexp(smoothed, 0) - math.log(count)
    return total - math.log(count), variance, bias, ess, k, smooth, _variance(smoothed)


def _per_datum(summary: tuple[Tensor, ...], joint: int) -> tuple[Tensor, ...]:
    """A summary of one column that stands for several data, spread over them."""
    value, variance, bias, ess, k, smooth, spread = summary
    return value / joint, variance / joint**2, bias / joint, ess, k, smooth / joint, spread / joint**2


def _variance(log_weight: Tensor) -> Tensor:
    """Variance of log 1/K sum w to first order, per column of (K, ...); nan for K = 1."""
    count = len(log_weight)
    if count == 1:
        return torch.full_like(log_weight[0], math.nan)
    share = torch.softmax(log_weight, 0)
    return (count * share.square().sum(0) - 1).clamp(min=0) / (count - 1)


def _steps(num_samples: int) -> list[int]:
    """1, 2, 5, 10, ... below K, and K."""
    decades = [m * 10**e for e in range(len(str(num_samples))) for m in (1, 2, 5)]
    return [k for k in decades if k < num_samples] + [num_samples]


def _at_steps(log_weight: Tensor, steps: list[int]) -> Tensor:
    """Sums over the data of the estimate at each K', and of its variance, (2, steps)."""
    found = []
    for size in steps:
        blocks = len(log_weight) // size
        grouped = log_weight[: blocks * size].reshape(blocks, size, -1).transpose(0, 1)
        values = torch.logsumexp(grouped, 0) - math.log(size)
        # Few blocks know their own variance badly; each of many weights knows it by itself.
        variance = values.var(0) if blocks >= 10 or (size == 1 and blocks > 1) else _variance(grouped).mean(0)
        found.append(torch.stack([values.mean(0).sum(), (variance / blocks).sum()]))
    return torch.stack(found, 1)


def _round_up(number: float) -> int:
    """To two digits, upwards."""
    unit = 10 ** max(len(str(math.ceil(number))) - 2, 0)
    return math.ceil(number / unit) * unit


def particle_batches(
    model: Program,
    guide: Program,
    data: Any,
    num_samples: int,
    device: str | torch.device | None,
    progress: bool | None,
    title: str,
) -> Iterator[Iterator[Particles]]:
    """For each batch of data, its K particles in chunks, of programs as they are: to be run while `evaluating`."""
    for batch, sizes, found, _ in _batches(model, guide, data, num_samples, device, progress, title):
        nesting = plate_nesting(model, guide, *batch) if found.joint else found.nesting  # refuses it
        yield (_drawn(model, guide, batch, size, nesting) for size in sizes)


def _drawn(model: Program, guide: Program, batch: tuple[Any, ...], size: int, nesting: int) -> Particles:
    with fast_matmul(all(x.device.type == "cpu" for _, x in leaves(batch) if isinstance(x, Tensor))):
        return draw(model, guide, batch, {}, size, max_plate_nesting=nesting)


def _tables(
    model: Program,
    guide: Program,
    data: Any,
    num_samples: int,
    device: str | torch.device | None,
    progress: bool | None,
    title: str,
    compile: bool | str,
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """For each batch of data, its log weights and log likelihoods, (K, B) each, and the data of each column."""
    chunks: dict[int, Replayed] = {}
    told = _batches(model, guide, data, num_samples, device, progress, title)
    for batch, sizes, (nesting, joint, _), count in told:
        tensors = all(isinstance(x, Tensor) for x in batch)
        parts: list[tuple[Tensor, ...]] = []
        for size in sizes:
            function = functools.partial(_chunk, model, guide, size, nesting)
            if not tensors:
                parts.append(function(*batch))
                continue
            if size not in chunks:
                calls = count * sizes.count(size)
                chunks[size] = Replayed(function, programs=(model, guide), calls=calls, compile=compile)
            parts.append(chunks[size](*batch))
        weight, likelihood = (torch.cat(column) for column in zip(*parts, strict=True))
        yield weight, likelihood, joint or 1


def _chunk(model: Program, guide: Program, size: int, nesting: int, *batch: Any) -> tuple[Tensor, Tensor]:
    # Samples drawn one by one would make a graph as long as the chunk: there the programs run on as they are.
    particles = draw(model, guide, batch, {}, size, True if capturing() else None, nesting)
    return particles.log_weight, particles.log_likelihood


def _batches(
    model: Program,
    guide: Program,
    data: Any,
    num_samples: int,
    device: str | torch.device | None,
    progress: bool | None,
    title: str,
) -> Iterator[tuple[tuple[Any, ...], list[int], Layout, int]]:
    """Batches of data, the sizes of their chunks of samples, the pair's layout, and the number of batches."""
    place = device_of(model, guide) if device is None else device
    batches = Batches(data, 100, place, shuffle=False, programs=(model, guide))
    at_once = max(1, _CHUNK // values(batches.first()))
    # A batch is encoded anew in every chunk: eighty samples for each datum make that cheap.
    batches = batches.of(max(1, min(100, at_once // min(num_samples, 80), _HELD // num_samples)))
    batches, found = _laid_out(model, guide, data, batches)
    count = len(batches)
    for batch in tqdm(batches, desc=title, disable=None if progress is None else not progress, leave=False):
        yield batch, chunk_sizes(batch, num_samples), found, count


def _laid_out(model: Program, guide: Program, data: Any, batches: Batches) -> tuple[Batches, Layout]:
    """The pair's layout; and all data in one batch, where the pair is of just these data."""
    whole = batches
    if batches.num_data is not None and batches.num_data > batches.batch_size:
        whole = Batches(data, batches.num_data, batches.device, shuffle=False)
    if isinstance(guide, AutoGuide) and guide.prototype_trace is None:  # it is made for the data that it sees first
        with torch.random.fork_rng():
            guide(*whole.first())
    batch = batches.first()
    try:
        found = layout(model, guide, *batch)
    except (RuntimeError, ValueError, IndexError) as error:
        try:
            found, batch, batches = layout(model, guide, *whole.first()), whole.first(), whole
        except (RuntimeError, ValueError, IndexError):
            raise error from None
    if found.subsampled and found.subsampled not in lengths(batch):
        raise ValueError(
            f"the data plate picks {found.subsampled} rows at random in each run, so that two runs are of different "
            "data and samples cannot be put together. Give the batches as arguments: "
            'pyro.plate("data", N, subsample=x).'
        )
    return batches, found


def chunk_sizes(batch: tuple[Any, ...], num_samples: int) -> list[int]:
    """The sizes of the chunks in which K samples of one batch are drawn: who takes the same gets the same draws."""
    return _sizes(num_samples, max(1, _CHUNK // values(batch) // max(rows(batch), 1)))


def _sizes(num_samples: int, most: int) -> list[int]:
    """Chunks of about the same size, as every size is captured by itself: all the same where that is near."""
    for size in range(min(most, num_samples), most // 2, -1):
        if num_samples % size == 0:
            return [size] * (num_samples // size)
    count = -(-num_samples // most)
    size = -(-num_samples // count)
    return [size] * (num_samples // size) + ([num_samples % size] if num_samples % size else [])
