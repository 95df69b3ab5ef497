"""The identity that variational inference stands on, checked with three numbers that know nothing of each other.

    log p(x) = ELBO + KL(q(z | x) || p(z | x))

log p(x) by `quadrature`, the ELBO by samples of the guide, the divergence on a grid that normalises p(z | x) itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.judging.components import refuse_points
from pyro_vae.judging.estimates import elbo_terms
from pyro_vae.judging.grids import mesh, quadrature
from pyro_vae.judging.quotes import over_data
from pyro_vae.judging.results import Result, averaged
from pyro_vae.judging.sweeps import sweep
from pyro_vae.options import of_pair
from pyro_vae.traces import Program, log_joint, log_q

_SIDE, _REACH, _DRAWS = 161, 7.0, 512  # points a side, standard deviations, draws that say where the guide is


@dataclass(frozen=True)
class Identity(Result):
    """The three numbers, averaged over data, in nats.

    Attributes:
        log_likelihood: log p(x).
        elbo: Sampled, and so the only one with a Monte Carlo error.
        kl: KL(q(z | x) || p(z | x)).
        rest: log p(x) - ELBO - KL: zero, within the error.
        rest_mc_stderr: That of the ELBO.
        data_stderr: Of the KL, for the population of the data.
        pointwise: KL per datum, (N,).
    """

    log_likelihood: float
    elbo: float
    kl: float
    rest: float
    rest_mc_stderr: float
    data_stderr: float
    pointwise: Tensor

    def __str__(self) -> str:
        over = f"{len(self.pointwise)} data, {over_data(self.data_stderr)} of the KL"
        total = f"{self.elbo:.3f} + {self.kl:.3f} = {self.elbo + self.kl:.3f}"
        apart = f"apart by {self.rest:.3f} ± {self.rest_mc_stderr:.3f} nats"
        return f"log p(x) = {self.log_likelihood:.3f}, ELBO + KL = {total}: {apart} ({over})"


@of_pair
def identity(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_samples: int = 1000,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Identity:
    """Check that log p(x) is the ELBO and the divergence between guide and posterior, for one or two real latents.

    Args:
        num_samples: K, samples behind the ELBO.
        model, guide, data, seed, device, progress: As for `log_likelihood`.
    Returns:
        The three numbers, and what is left between them.
    Raises:
        ValueError: More than two latent dimensions or more than one latent site, a guide that cannot score what it did
            not draw, and what `quadrature` refuses.
    Example:
        >>> import math, pyro.distributions as dist
        >>> from pyro_vae import Guide, Model
        >>> prior = dist.Normal(torch.zeros(1), 1.0).to_event(1)
        >>> model = Model(lambda: prior, lambda z: dist.Normal(z, 1.0).to_event(1))
        >>> guide = Guide(lambda x: dist.Normal(x / 2, 1.0).to_event(1))
        >>> found = identity(model, guide, torch.tensor([[0.0], [2.0]]))
        >>> abs(found.kl - (1 - math.log(2)) / 2) < 1e-5, abs(found.rest) < 4 * found.rest_mc_stderr
        (True, True)
    """
    options: dict[str, Any] = {"seed": seed, "device": device, "progress": progress}
    with sweep(model, guide, data=data, batch_size=2, seed=seed, device=device, progress=False) as run:
        sizes = {name: z[0, 0].numel() for name, z in run.draw(run.first, 2).latents.items()}
    if len(sizes) != 1 or max(sizes.values()) > 2:
        found = ", ".join(f"{name} of {size} dimensions" for name, size in sizes.items())
        raise ValueError(
            f"the guide has the latents {found}, wanted one of one or two. Its gaps are what pv.gaps measures."
        )
    exact = quadrature(model, guide, data, **options)
    terms = elbo_terms(model, guide, data, num_samples=num_samples, **options)
    with sweep(model, guide, data=data, batch_size=20, validate=False, title="identity", **options) as run:

        def divergence(batch: tuple[Any, ...]) -> Tensor:
            drawn = run.draw(batch, _DRAWS)
            refuse_points(drawn, ", so that it has no divergence")
            ((name, z),) = drawn.latents.items()
            rows = slice(run.start, run.start + z.shape[1])
            moments = (exact.mean[rows].to(z.device), exact.covariance[rows].to(z.device))
            points, cell = _grid(z.flatten(2).double(), *moments)
            values = {name: points.to(z.dtype).reshape(-1, *z.shape[1:])}
            log_f = log_joint(model, values, *batch).double()
            log_own = log_q(guide, values, *batch).double()
            log_posterior = log_f - log_f.logsumexp(0) - cell
            return ((log_own + cell).exp() * (log_own - log_posterior)).nan_to_num(0.0).sum(0)

        parts = run.each(divergence)
    kl, log_p = averaged(torch.cat(parts), torch.zeros(())), float(exact.log_evidence.mean())
    rest = log_p - terms.value - kl["value"]
    return Identity(log_p, terms.value, kl["value"], rest, terms.mc_stderr, kl["data_stderr"], kl["pointwise"])


def _grid(z: Tensor, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Points (G, B, D) that cover the guide's draws (K, B, D) and the posterior, and the log volume of a cell, (B,)."""
    own, centred = z.mean(0), z - z.mean(0)
    spread = torch.maximum(centred.square().mean(0), covariance.diagonal(dim1=-2, dim2=-1)).sqrt()
    low, high = torch.minimum(own, mean) - _REACH * spread, torch.maximum(own, mean) + _REACH * spread
    line = torch.linspace(0, 1, _SIDE, dtype=z.dtype, device=z.device)
    unit = mesh(line, z.shape[-1])[:, None]
    return low + unit * (high - low), ((high - low) / (_SIDE - 1)).log().sum(-1)
