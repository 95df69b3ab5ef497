"""log p(x) and posterior moments on a grid, for up to three latent dimensions, and whether the grid saw all there is.

The trapezoidal rule on a smooth density that vanishes at the ends converges faster than any power of the spacing, *if
the grid covers the mass*. It is centred at the guide's draws, moved and stretched to the posterior's own moments, and
made finer until that changes nothing. Where a coarse grid over the prior finds mass outside of it, it is fitted anew to
that. What is narrower than the coarse grid's spacing, a tenth to a third of the prior's standard deviation, and where
the guide never draws, is not seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.inference.trees import at, joined
from pyro_vae.judging.densities import Pair
from pyro_vae.judging.sweeps import chunk_sizes, sweep
from pyro_vae.options import of_pair
from pyro_vae.randomness import forked
from pyro_vae.traces import Program

MOST_DIMENSIONS = 3
# By dimensions: points a side while the grid looks for its place, then finer and finer; of the grid over the prior; and
# half the side, in standard deviations. 6 leave out 2e-9 a dimension, and 8 nothing.
_SEARCH = {1: 129, 2: 41, 3: 21}
_FINER = {1: (129, 513, 2049), 2: (41, 81, 161, 321), 3: (25, 49, 97)}
_COARSE = {1: 513, 2: 65, 3: 19}
_WIDTH = {1: 8.0, 2: 8.0, 3: 6.0}
_PRIOR_WIDTH = 6.0


class Quadrature(NamedTuple):
    """The posterior of N data with U <= 3 unconstrained latent dimensions.

    Attributes:
        log_evidence: log p(x) in nats, (N,), float64.
        mean, covariance: E[u | x], (N, U), and Cov[u | x], (N, U, U).
        rim: Share of the mass on the grid's outermost points, (N,), which it may have missed. Above 1e-6 distrust all.
        error: How far log p(x) by every other point of each axis is away, in nats, (N,).
        outside: Share of the mass outside of the grid, by a coarse one over the prior, (N,).
    """

    log_evidence: Tensor
    mean: Tensor
    covariance: Tensor
    rim: Tensor
    error: Tensor
    outside: Tensor

    @property
    def pointwise(self) -> Tensor:
        """log p(x), (N,): under this name `compare_guides` takes it as its ``log_likelihood``."""
        return self.log_evidence

    @property
    def pointwise_stderr(self) -> Tensor:
        """What stands for its standard error, (N,): the grid's error, and infinite where it has not converged."""
        return self.error.masked_fill(~self.converged, torch.inf)

    @property
    def converged(self) -> Tensor:
        """Whether a finer or larger grid would change log p(x) by less than 1e-4 nats (1e-7 of it, where rounding is
        more than that), (N,)."""
        tolerance = (1e-7 * self.log_evidence.abs()).clamp(min=1e-4)
        return self.log_evidence.isfinite() & (self.rim <= 1e-6) & (self.outside <= 1e-6) & (self.error <= tolerance)


@of_pair
def quadrature(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_points: int | None = None,
    width: float | None = None,
    refinements: int = 3,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Quadrature:
    """log p(x) and posterior moments on a grid, for models of up to three latent dimensions.

    Args:
        guide: A Pyro program for q(z | x), which says where to look first.
        num_points: Grid points a side; None makes the grid of a datum finer until that changes nothing.
        width: Half the side of the grid, in standard deviations; None for 8, and 6 in three dimensions.
        refinements: How often the grid is fitted anew to the moments it found, from the guide's with twice the width.
        model, data, seed, device, progress: As for `log_likelihood`.
    Returns:
        The integrals per datum, and whether they have converged; moments are in unconstrained coordinates.
    Raises:
        ValueError: More than three latent dimensions, and what `ais` refuses.
    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_vae import Guide, Model
        >>> prior = dist.Normal(torch.zeros(1), 1.0).to_event(1)
        >>> model = Model(lambda: prior, lambda z: dist.Normal(z, 1.0).to_event(1))
        >>> guide = Guide(lambda x: dist.Normal(x, 1.0).to_event(1))
        >>> found = quadrature(model, guide, torch.tensor([[2.0]]))
        >>> found.log_evidence                 # log N(2; 0, 2)
        tensor([-2.2655], dtype=torch.float64)
        >>> round(found.mean.item(), 4), round(found.covariance.item(), 4), bool(found.converged)
        (1.0, 0.5, True)
    """
    if (num_points or 3) < 3 or refinements < 0 or not (width or 1.0) > 0:
        raise ValueError(
            f"got num_points={num_points}, width={width}, refinements={refinements}; wanted at least 3 points a side, "
            "a positive width and no negative number of refinements."
        )
    with sweep(model, guide, data=data, batch_size=50, validate=False, seed=seed, device=device, progress=progress,
               title="quadrature") as run:  # fmt: skip
        parts = run.each(lambda batch: on_grids(Pair(model, guide, batch), num_points, width, refinements))
    found: Quadrature = joined(parts)
    return found


def served(programs: Sequence[Program], args: tuple[Any, ...]) -> int | None:
    """Unconstrained latent dimensions per datum of a model and its guide at a batch; None where a grid does not serve:
    too many, or no such coordinates."""
    try:
        with forked():
            size = Pair(programs[0], programs[1], args).latents.size
    except (ValueError, NotImplementedError):
        return None
    return size if size <= MOST_DIMENSIONS else None


def cost(dims: int) -> int:
    """Points that a datum takes where the first grid that is fine enough for a normal is fine enough."""
    return 3 * _SEARCH[dims] ** dims + least_points(dims) + _COARSE[dims] ** dims


def least_points(dims: int) -> int:
    """Points of the first grid that is fine enough for a normal."""
    return _FINER[dims][0] ** dims


def on_grids(pair: Pair, num_points: int | None = None, width: float | None = None, refinements: int = 3) -> Quadrature:
    """The integrals of one batch."""
    dims = pair.latents.size
    if dims > MOST_DIMENSIONS:
        raise ValueError(
            f"the latents have {dims} unconstrained dimensions per datum, and a grid serves one to three. "
            "Use reference(model, guide, data), Hamiltonian chains."
        )
    reach = _WIDTH[dims] if width is None else width
    search = num_points or _SEARCH[dims]
    levels = (num_points,) if num_points else _FINER[dims]
    draws = pair.from_guide(256).double()
    mean, centred = draws.mean(0), draws - draws.mean(0)
    covariance = torch.einsum("kbi,kbj->bij", centred, centred) / (len(draws) - 1)
    coarse = _over_the_prior(pair)
    found = _fitted(pair, mean, covariance, coarse, search, levels, reach, refinements)
    missed = ~(found.outside <= 1e-6)
    if bool(missed.any()):
        far = coarse._replace(points=coarse.points[:, missed], log_f=coarse.log_f[:, missed])
        again = _fitted(_at(pair, missed), *far.moments(), far, search, levels, reach, refinements)
        for old, new in zip(found, again, strict=True):
            old[missed] = new
    for level in levels[1:]:
        rough = ~(found.error <= _tolerance(pair, found.log_evidence))
        if not bool(rough.any()):
            break
        step = _integrate(_at(pair, rough), found.mean[rough], found.covariance[rough], reach, level)
        for name, new in step._asdict().items():
            if name != "outside":
                getattr(found, name)[rough] = new
    return found


def _at(pair: Pair, rows: Tensor) -> Pair:
    return Pair(pair.model, pair.guide, at(pair.args, rows))


def _dtype(pair: Pair) -> torch.dtype:
    return pair.joint.sites[pair.names[0]]["value"].dtype


def _tolerance(pair: Pair, log_evidence: Tensor) -> Tensor:
    """What a finer grid is still to change: rounding of the density is no reason for one."""
    return (50 * torch.finfo(_dtype(pair)).eps * log_evidence.abs().clamp(min=1)).clamp(min=1e-8)


class _Coarse(NamedTuple):
    """A grid over the prior, the same points for all data."""

    points: Tensor  # (G, B, U)
    log_f: Tensor  # (G, B)
    cell: Tensor  # log of a cell's volume and its sides, (1 + U,)

    def outside(self, mean: Tensor, tril: Tensor, reach: float, log_evidence: Tensor) -> Tensor:
        """Share of the mass outside of a fitted grid."""
        away = torch.linalg.solve_triangular(tril, (self.points - mean).unsqueeze(-1), upper=False).squeeze(-1)
        beyond = self.log_f.masked_fill(away.abs().amax(-1) <= reach, -torch.inf)
        return (beyond.logsumexp(0) + self.cell[0] - log_evidence).exp()

    def moments(self) -> tuple[Tensor, Tensor]:
        """Of the posterior on these points, with the width of a cell."""
        weight = torch.softmax(self.log_f, 0)[..., None]
        mean = (weight * self.points).sum(0)
        centred = self.points - mean
        return mean, torch.einsum("gbi,gbj->bij", weight * centred, centred) + torch.diag(self.cell[1:].square() / 4)


def _over_the_prior(pair: Pair) -> _Coarse:
    draws = pair.from_prior(256).double()
    loc, scale = draws.mean((0, 1)), draws.flatten(0, 1).std(0).clamp(min=1e-12)
    dims = len(loc)
    line = torch.linspace(-_PRIOR_WIDTH, _PRIOR_WIDTH, _COARSE[dims], dtype=torch.float64, device=loc.device)
    points = (loc + scale * mesh(line, dims)).unsqueeze(1).expand(-1, draws.shape[1], -1)
    sides = (line[1] - line[0]) * scale
    return _Coarse(points, _log_f(pair, points), torch.cat([sides.log().sum()[None], sides]))


def mesh(line: Tensor, dims: int) -> Tensor:
    """All points of a grid with the same line on each axis, (G, dims)."""
    return torch.stack([axis.flatten() for axis in torch.meshgrid(*[line] * dims, indexing="ij")], -1)


def _log_f(pair: Pair, points: Tensor) -> Tensor:
    """log p(x, T(u)) + log |dT/du| at points (G, B, U), (G, B)."""
    chunk = chunk_sizes(pair.args, len(points))[0]
    found = torch.cat([pair.log_posterior(part.to(_dtype(pair))).double() for part in points.split(chunk)])
    return found.nan_to_num(-torch.inf, posinf=-torch.inf)


def _fitted(
    pair: Pair, mean: Tensor, covariance: Tensor, coarse: _Coarse, search: int,
    levels: tuple[int, ...], reach: float, refinements: int,
) -> Quadrature:  # fmt: skip
    """A grid that was moved and stretched to the moments that it found."""
    for step in range(refinements):
        wide = reach * (2 if step == 0 else 1)
        found = _integrate(pair, mean, covariance, wide, search)
        # What lies between two points has a width that the points do not know.
        between = covariance * (wide / (search - 1)) ** 2
        seen = found.log_evidence.isfinite()  # else the grid has nothing to say of where to go
        mean = torch.where(seen[:, None], found.mean, mean)
        covariance = torch.where(seen[:, None, None], found.covariance + between, covariance)
    wide = reach * (2 if refinements == 0 else 1)
    found = _integrate(pair, mean, covariance, wide, levels[0])
    outside = coarse.outside(mean, _cholesky(covariance), wide, found.log_evidence)
    return found._replace(outside=outside)


def _cholesky(covariance: Tensor) -> Tensor:
    return torch.linalg.cholesky(covariance + 1e-12 * torch.eye(covariance.shape[-1]).to(covariance))


def _integrate(pair: Pair, mean: Tensor, covariance: Tensor, reach: float, side: int) -> Quadrature:
    """All that a grid in the axes of the given covariance knows."""
    dims = mean.shape[-1]
    tril = _cholesky(covariance)
    line = torch.linspace(-reach, reach, side, dtype=torch.float64, device=mean.device)
    grid = mesh(line, dims)
    points = mean + torch.einsum("bij,gj->gbi", tril, grid)
    log_f = _log_f(pair, points)
    total = log_f.logsumexp(0)
    cell = dims * (line[1] - line[0]).log() + tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    half = log_f.reshape(*[side] * dims, -1)[(slice(None, None, 2),) * dims].flatten(0, dims - 1)
    error = (half.logsumexp(0) + dims * math.log(2) - total).abs()
    weight = (log_f - total).exp()
    at_rim = (grid.abs().amax(-1) > reach * (1 - 1e-9))[:, None]
    mean = (weight[..., None] * points).sum(0)
    centred = points - mean
    covariance = torch.einsum("gb,gbi,gbj->bij", weight, centred, centred)
    return Quadrature(total + cell, mean, covariance, (weight * at_rim).sum(0), error, torch.zeros_like(total))
