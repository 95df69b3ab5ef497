"""Exact answers for two latents: a grid.

With one or two latent dimensions per datum, log p(x) and the moments of the posterior are
integrals that a grid does to many digits. The trapezoidal rule on a smooth density that
vanishes at the ends converges faster than any power of the spacing, so two hundred points
a side are plenty *if the grid covers the mass*: it is centred at the guide's draws, moved
and stretched to the posterior's own moments until nothing changes, and the mass on its rim
is reported.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.judging.densities import Pair
from pyro_vae.judging.sweeps import chunk_sizes, sweep
from pyro_vae.options import checked
from pyro_vae.traces import Program


class Quadrature(NamedTuple):
    """The posterior of N data with U <= 2 unconstrained latent dimensions.

    Attributes:
        log_evidence: log p(x) in nats, (N,), float64.
        mean: E[u | x], (N, U).
        covariance: Cov[u | x], (N, U, U).
        rim: Share of the mass on the grid's outermost points, (N,): what the grid may have
            missed. Above 1e-6 distrust the rest.
    """

    log_evidence: Tensor
    mean: Tensor
    covariance: Tensor
    rim: Tensor


@checked
def quadrature(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_points: int = 121,
    width: float = 8.0,
    refinements: int = 3,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Quadrature:
    """log p(x) and posterior moments on a grid, for models of one or two latent dimensions.

    Args:
        guide: A Pyro program for q(z | x), which says where to look first.
        num_points: Grid points a side.
        width: Half the side of the grid, in standard deviations.
        refinements: How often the grid is fitted anew to the moments it found, starting from
            the guide's with twice the width.
        model, data, seed, device, progress: As for `log_likelihood`.
    Returns:
        The integrals per datum; moments are in unconstrained coordinates.
    Raises:
        ValueError: More than two latent dimensions, and what `ais` refuses.
    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x, 1.0).to_event(1))
        >>> found = quadrature(model, guide, torch.tensor([[2.0]]))
        >>> found.log_evidence                 # log N(2; 0, 2)
        tensor([-2.2655], dtype=torch.float64)
        >>> round(found.mean.item(), 4), round(found.covariance.item(), 4)
        (1.0, 0.5)
    """
    if num_points < 3 or refinements < 0 or not width > 0:
        raise ValueError(
            f"got num_points={num_points}, width={width}, refinements={refinements}; wanted at least 3 points a side, "
            "a positive width and no negative number of refinements."
        )
    parts = []
    with sweep(model, guide, data=data, batch_size=50, validate=False, seed=seed, device=device, progress=progress,
               title="quadrature") as run:  # fmt: skip
        for batch in run:
            pair = Pair(model, guide, batch)
            if pair.latents.size > 2:
                raise ValueError(
                    f"the latents have {pair.latents.size} unconstrained dimensions per datum, and a grid serves one "
                    "or two. Use reference(model, guide, data), Hamiltonian chains."
                )
            draws = pair.from_guide(256).double()
            mean, covariance = draws.mean(0), _covariance(draws)
            chunk = chunk_sizes(batch, num_points ** draws.shape[-1])[0]
            for step in range(refinements + 1):
                reach = width * (2 if step == 0 else 1)
                evidence, mean, covariance, rim = _integrate(pair, mean, covariance, reach, num_points, chunk)
            parts.append((evidence, mean, covariance, rim))
    return Quadrature(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def _integrate(
    pair: Pair, mean: Tensor, covariance: Tensor, reach: float, num_points: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log evidence, moments and rim mass, on a grid in the axes of the given covariance."""
    dims = mean.shape[-1]
    tiny = 1e-12 * torch.eye(dims).to(covariance)
    tril = torch.linalg.cholesky(covariance + tiny)
    line = torch.linspace(-reach, reach, num_points, dtype=torch.float64, device=mean.device)
    axes = torch.meshgrid(*[line] * dims, indexing="ij")
    grid = torch.stack([axis.flatten() for axis in axes], -1)  # (G, U)
    points = mean + torch.einsum("bij,gj->gbi", tril, grid)
    dtype = pair.from_guide(1).dtype
    log_f = torch.cat([pair.log_posterior(part.to(dtype)).double() for part in points.split(chunk)])
    log_f = log_f.nan_to_num(-torch.inf, posinf=-torch.inf)
    total = log_f.logsumexp(0)
    cell = dims * (line[1] - line[0]).log() + tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    weight = (log_f - total).exp()
    at_rim = (grid.abs().amax(-1) > reach * (1 - 1e-9))[:, None]
    mean = (weight[..., None] * points).sum(0)
    centred = points - mean
    covariance = torch.einsum("gb,gbi,gbj->bij", weight, centred, centred)
    return total + cell, mean, covariance, (weight * at_rim).sum(0)


def _covariance(draws: Tensor) -> Tensor:
    centred = draws - draws.mean(0)
    return torch.einsum("kbi,kbj->bij", centred, centred) / (len(draws) - 1)
