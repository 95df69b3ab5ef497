"""How far a guide's draws are from a reference posterior, in numbers that know their own noise.

Every distance comes with its null value: what two halves of the reference give against each
other, which is what an exact guide would show. The halves are made of whole chains, so
that a reference that has not converged has a large null, and hides nothing.

Reference: Gretton et al., A kernel two-sample test, 2012. Rabin et al., Wasserstein
barycenter and its application to texture mixing, 2011 (sliced Wasserstein).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro import validation_enabled
from torch import Tensor

from pyro_vae.evaluation import evaluating
from pyro_vae.inference.batches import Batches
from pyro_vae.judging.densities import Pair
from pyro_vae.judging.references import Reference
from pyro_vae.options import checked
from pyro_vae.parameters import device_of
from pyro_vae.traces import Program


@dataclass(frozen=True)
class GuideDistances:
    """Distances from guide to reference for N data with U unconstrained latent dimensions.

    Attributes:
        variance_ratio: Var_q / Var_ref, (N, U): below one the guide is too narrow.
        mean_error: (E_q - E_ref) in standard deviations of the reference, (N, U).
        sliced_wasserstein: W_2 averaged over directions, in standard deviations of the
            reference, (N,).
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

    def __str__(self) -> str:
        def rms(x: Tensor) -> float:
            return x.square().mean().sqrt().item()

        rows = [
            ("variance ratio", self.variance_ratio.log().mean().exp().item(),
             self.null_variance_ratio.log().mean().exp().item()),
            ("mean error (sd)", rms(self.mean_error), rms(self.null_mean_error)),
            ("sliced Wasserstein (sd)", self.sliced_wasserstein.mean().item(),
             self.null_sliced_wasserstein.mean().item()),
            ("squared MMD", self.mmd.mean().item(), self.null_mmd.mean().item()),
        ]  # fmt: skip
        return "guide to reference: " + ", ".join(f"{name} {value:.3g} (null {null:.3g})" for name, value, null in rows)


@checked
def guide_distances(
    model: Program,
    guide: Program,
    data: Any,
    reference: Reference,
    *,
    num_directions: int = 100,
    device: str | torch.device | None = None,
    seed: int | None = 0,
) -> GuideDistances:
    """Compare a guide with the draws of a reference posterior, datum by datum.

    As many guide draws are taken as half of the reference holds, so that values and nulls
    have the same noise.

    Args:
        model: A Pyro program for p(x, z).
        guide: The guide to judge; not necessarily the one that the reference started from.
        data: The data of the reference, in its order.
        reference: What `reference` returned, from an even number of chains.
        num_directions: Directions of the sliced Wasserstein distance.
        device: Where the batches go; where the modules are when not given.
        seed: Seed of the draws and directions.
    Returns:
        The distances with their null values, in unconstrained coordinates.
    Raises:
        ValueError: The reference is of other data, or has one chain.
    """
    chains, samples, count, _ = reference.unconstrained.shape
    if chains < 2:
        raise ValueError(f"got a reference of {chains} chain, wanted at least 2, to compare halves.")
    halves = [half.flatten(0, 1).double() for half in reference.unconstrained[: chains // 2 * 2].chunk(2)]
    place = device_of(model, guide) if device is None else device
    with evaluating(model, guide, seed=seed), validation_enabled(False):
        batches = Batches(data, 20, place, shuffle=False, programs=(model, guide))
        draws = torch.cat([Pair(model, guide, b).from_guide(len(halves[0])).cpu() for b in batches], 1).double()
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
    """sqrt of the mean over directions of the squared W_2 between projections, per datum.

    Args:
        x: (K, B, U).
        y: (K, B, U).
        directions: Unit vectors, (L, U).
    Returns:
        (B,).
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

    Args:
        x: (K, B, U), in units in which the reference has variance one.
        y: (M, B, U).
        most: Draws of each that are used, evenly spaced: the cost is their square.
    Returns:
        (B,).
    """
    x, y = (s[:: math.ceil(len(s) / most)] for s in (x, y))
    dims = x.shape[-1]
    found = []
    for b in range(x.shape[1]):
        first, second = x[:, b], y[:, b]
        within = [_off_diagonal(torch.exp(-torch.cdist(s, s).square() / (2 * dims))) for s in (first, second)]
        found.append(within[0] + within[1] - 2 * torch.exp(-torch.cdist(first, second).square() / (2 * dims)).mean())
    return torch.stack(found)


def _off_diagonal(kernel: Tensor) -> Tensor:
    count = len(kernel)
    return (kernel.sum() - kernel.diagonal().sum()) / (count * (count - 1))
