"""How far draws are from others, in numbers that know their own noise: a guide's from a reference posterior's, and
samples from data.

Every distance comes with its null value: what two halves of the reference, of whole chains, give against each other,
which is what an exact guide would show; a reference that has not converged has a large one.

Reference: Gretton et al., A kernel two-sample test, 2012. Rabin et al., Wasserstein
barycenter and its application to texture mixing, 2011 (sliced Wasserstein).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.judging.densities import Pair
from pyro_vae.judging.references import Reference
from pyro_vae.judging.results import Result
from pyro_vae.judging.sweeps import sweep
from pyro_vae.options import checked, of_pair
from pyro_vae.traces import Program

_BOOTSTRAPS = 200


@dataclass(frozen=True)
class GuideDistances(Result):
    """Distances from guide to reference for N data with U unconstrained latent dimensions.

    Attributes:
        variance_ratio: Var_q / Var_ref, (N, U): below one the guide is too narrow.
        mean_error: (E_q - E_ref) in standard deviations of the reference, (N, U).
        sliced_wasserstein: W_2 averaged over directions, in standard deviations of the reference, (N,).
        mmd: Unbiased squared maximum mean discrepancy, (N,); can be slightly negative.
        null_variance_ratio, null_mean_error, null_sliced_wasserstein, null_mmd: The same
            between two halves of the reference.
    """

    variance_ratio: Tensor
    mean_error: Tensor
    sliced_wasserstein: Tensor
    mmd: Tensor
    null_variance_ratio: Tensor
    null_mean_error: Tensor
    null_sliced_wasserstein: Tensor
    null_mmd: Tensor

    def rows(self) -> list[dict[str, Any]]:
        parts: dict[str, tuple[Any, Tensor, Tensor]] = {
            "variance ratio": (lambda x: x.log().mean().exp(), self.variance_ratio, self.null_variance_ratio),
            "mean error (sd)": (lambda x: x.square().mean().sqrt(), self.mean_error, self.null_mean_error),
            "sliced Wasserstein (sd)": (Tensor.mean, self.sliced_wasserstein, self.null_sliced_wasserstein),
            "squared MMD": (Tensor.mean, self.mmd, self.null_mmd),
        }
        return [{"distance": n, "value": f(x).item(), "null": f(null).item()} for n, (f, x, null) in parts.items()]

    def __str__(self) -> str:
        shown = "{distance} {value:.3g} (null {null:.3g})"
        return "guide to reference: " + ", ".join(shown.format(**row) for row in self.rows())


@of_pair
def guide_distances(
    model: Program,
    guide: Program,
    data: Any,
    *,
    reference: Reference,
    num_directions: int = 100,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> GuideDistances:
    """Compare a guide with the draws of a reference posterior, datum by datum.

    As many guide draws are taken as half of the reference holds, so that values and nulls have the same noise.

    Args:
        guide, data: The data are those of the reference, in its order, and the guide any.
        reference: What `reference` returned, from an even number of chains.
        num_directions: Directions of the sliced Wasserstein distance.
        model, seed, device, progress: As for `log_likelihood`.
    Returns:
        The distances with their null values, in unconstrained coordinates.
    Raises:
        ValueError: The reference is of other data, or has one chain.
    """
    chains, samples, count, _ = reference.unconstrained.shape
    if chains < 2:
        raise ValueError(f"got a reference of {chains} chain, wanted at least 2, to compare halves.")
    halves = [half.flatten(0, 1).double() for half in reference.unconstrained[: chains // 2 * 2].chunk(2)]
    with sweep(model, guide, data=data, batch_size=20, validate=False, seed=seed, device=device, progress=progress,
               title="distances") as run:  # fmt: skip
        draws = torch.cat(run.each(lambda batch: Pair(model, guide, batch).from_guide(len(halves[0]))), 1).double()
        if draws.shape[1] != count:
            raise ValueError(f"got {draws.shape[1]} data and a reference of {count}, wanted the same data.")
        directions = torch.randn(num_directions, draws.shape[-1], dtype=torch.float64)
    directions /= directions.norm(dim=1, keepdim=True)
    # Each half is once the reference of the guide, so that value and null compare sets of one size.
    centre, scale = torch.cat(halves).mean(0), torch.cat(halves).std(0).clamp(min=1e-12)
    first, second, draws = ((h - centre) / scale for h in (*halves, draws))
    sliced = [sliced_wasserstein(draws, half, directions) for half in (first, second)]
    return GuideDistances(
        variance_ratio=draws.var(0) / torch.cat([first, second]).var(0),
        mean_error=draws.mean(0),
        sliced_wasserstein=(sliced[0] + sliced[1]) / 2,
        mmd=(squared_mmd(draws, first) + squared_mmd(draws, second)) / 2,
        null_variance_ratio=first.var(0) / second.var(0),
        null_mean_error=first.mean(0) - second.mean(0),
        null_sliced_wasserstein=sliced_wasserstein(first, second, directions),
        null_mmd=squared_mmd(first, second),
    )


def sliced_wasserstein(x: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    """sqrt of the mean over directions, (L, U), of the squared W_2 between projections of (K, B, U), per datum, (B,).

    Example:
        >>> x = torch.arange(6.0).reshape(3, 1, 2)
        >>> sliced_wasserstein(x, x + torch.tensor([3.0, 0.0]), torch.eye(2))    # sqrt((9 + 0) / 2)
        tensor([2.1213])
    """
    if x.shape != y.shape:
        raise ValueError(f"got sets of shapes {tuple(x.shape)} and {tuple(y.shape)}, wanted the same.")
    total = x.new_zeros(x.shape[1])
    for part in directions.split(max(1, 2**22 // max(1, x.shape[0] * x.shape[1]))):
        a, b = ((s @ part.T.to(s)).sort(0).values for s in (x, y))
        total = total + (a - b).square().mean(0).sum(-1)
    return (total / len(directions)).sqrt()


@checked
def squared_mmd(x: Tensor, y: Tensor, most: int = 500) -> Tensor:
    """Unbiased squared maximum mean discrepancy with the kernel exp(-|a - b|^2 / (2 U)), per datum.

        E k(X, X') + E k(Y, Y') - 2 E k(X, Y)

    Of x, (K, B, U), and y, (M, B, U), in units in which the reference has variance one, so many draws are used at most,
    evenly spaced: the cost is their square.
    """
    x, y = (s[:: math.ceil(len(s) / most)] for s in (x, y))
    dims = x.shape[-1]
    found = []
    for b in range(x.shape[1]):
        first, second = x[:, b], y[:, b]
        within = [_off_diagonal(torch.exp(-torch.cdist(s, s).square() / (2 * dims))) for s in (first, second)]
        found.append(within[0] + within[1] - 2 * torch.exp(-torch.cdist(first, second).square() / (2 * dims)).mean())
    return torch.stack(found)


def _off_diagonal(table: Tensor) -> Tensor:
    """Mean of what stands off the diagonal: of pairs of different draws."""
    count = len(table)
    return (table.sum() - table.diagonal().sum()) / (count * (count - 1))


class Distance(NamedTuple):
    """A distance between two sets, and the root mean square of that between random halves of the second: a value of
    the size of this null is nothing."""

    value: float
    null: float


@checked
def energy_distance(samples: Tensor, data: Tensor, *, halvings: int = 20, seed: int = 0) -> Distance:
    """Energy distance between two sets, in the units of the data.

        D^2 = 2 E|X - Y| - E|X - X'| - E|Y - Y'|

    Zero only for equal distributions. The estimate of D^2 is unbiased, so it can be slightly negative.

    Args:
        samples, data: (N, *shape) and (M, *shape).
        halvings, seed: Random halvings of the data for the null value.
    Returns:
        The distance, beside that of two halves of the data.
    Raises:
        ValueError: Fewer than two samples or four data, or different shapes.
    Example:
        >>> x = torch.arange(8.0).reshape(8, 1)
        >>> energy_distance(x + 100, x).value > 100
        True

    Reference: Szekely and Rizzo, Energy statistics, 2013. doi:10.1016/j.jspi.2013.03.018
    """
    if len(samples) < 2 or len(data) < 4 or samples.shape[1:] != data.shape[1:]:
        raise ValueError(
            f"got sets of shapes {tuple(samples.shape)} and {tuple(data.shape)}, wanted at least 2 and 4 of one shape. "
            "Draw more samples, or give more data."
        )
    x, y = (s.detach().cpu().flatten(1).double() for s in (samples, data))
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(y), generator=generator) for _ in range(halvings)]
    nulls = torch.tensor([_squared_energy(y[order[::2]], y[order[1::2]]) for order in orders])
    return Distance(_squared_energy(x, y), nulls.square().mean().sqrt().item())


def _squared_energy(x: Tensor, y: Tensor) -> float:
    between = torch.cdist(x, y).mean()
    within = [_off_diagonal(torch.cdist(s, s)) for s in (x, y)]
    return (2 * between - within[0] - within[1]).item()


def gradient_quality(table: Tensor, reference: Tensor) -> tuple[Any, ...]:
    """Gradients, (R, P), beside those of a reference, (R', P): bias^2 and its error, p-value, norm of the reference,
    variance and its error, SNR and its error, SNR per parameter (see `pyro_vae.judging.gradients`)."""
    from scipy.stats import chi2

    count, far = len(table), len(reference)
    mean, expected = table.mean(0), reference.mean(0)
    centred, away = table - mean, reference - expected
    trace = centred.square().sum() / (count - 1)
    trace_far = away.square().sum() / (far - 1)
    difference = mean - expected
    distance = difference.square().sum()
    noise = trace / count + trace_far / far
    # tr(A B) of two covariances from inner products of different draws.
    square = (
        _off_diagonal((centred @ centred.T).square()) / count**2
        + 2 * (centred @ away.T).square().mean() / (count * far)
        + _off_diagonal((away @ away.T).square()) / far**2
    )
    p_value = 1.0 if distance == 0 else 0.0
    if noise > 0 and square > 0:
        p_value = float(chi2.sf((distance * noise / square).item(), (noise.square() / square).item()))
    projected = (centred @ difference).var() / count + (away @ difference).var() / far
    signal = (expected.square().sum() - trace_far / far).clamp(min=0)
    spread, snr = _bootstrap(table)
    deviation = table.std(0)
    each = (mean.abs() / deviation)[deviation > 0].mean()  # nan of none
    ratio = ((mean.square().sum() - trace / count).clamp(min=0) / trace).sqrt()
    error, size = (2 * square + 4 * projected).clamp(min=0).sqrt().item(), table.shape[1]
    bias = (distance - noise).item(), error, p_value, signal.sqrt().item()
    return *bias, (trace / size).item(), spread / size, ratio.item(), snr, each.item()


def _bootstrap(table: Tensor) -> tuple[float, float]:
    """Standard errors of the trace of the covariance, and of the SNR."""
    count = len(table)
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(count, (_BOOTSTRAPS, count), generator=generator)
    share = torch.full(picks.shape, 1 / count, dtype=table.dtype)
    weight = torch.zeros_like(share).scatter_add_(1, picks, share)
    mean = weight @ table
    trace = (weight @ table.square().sum(1) - mean.square().sum(1)) * count / (count - 1)
    # The mean of a resample carries the noise of the draws twice.
    signal = (mean.square().sum(1) - 2 * trace / count).clamp(min=0)
    ratio = torch.where(trace > 0, signal / trace, 0.0).sqrt()
    return trace.std().item(), ratio.std().item()
