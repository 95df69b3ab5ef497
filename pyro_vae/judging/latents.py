"""What a guide uses its latent space for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.inference.batches import Batches, seeded
from pyro_vae.parameters import device_of
from pyro_vae.traces import Program, sites


@dataclass(frozen=True)
class ActiveUnits:
    """Latent dimensions whose posterior mean moves with the data.

    Attributes:
        count: How many have Var_x(E_q[z_d | x]) above the threshold.
        latent_dim: D.
        variance: That variance per dimension, (D,).
        threshold: The threshold.
    """

    count: int
    latent_dim: int
    variance: Tensor
    threshold: float

    def __str__(self) -> str:
        return f"{self.count} of {self.latent_dim} units active (variance of the posterior mean > {self.threshold:g})"


def posterior_means(guide: Program, data: Any, *, site: str = "z", num_samples: int = 64, seed: int = 0) -> Tensor:
    """E_q[z | x] per datum, (N, *event).

    Exact where the site's distribution knows its mean and depends on x alone; from
    samples where not, as for a flow, or a layer above another.

    Args:
        guide: A Pyro program for q(z | x).
        data: As for `fit`.
        site: Name of the latent site.
        num_samples: Samples per datum where the mean is not known.
        seed: Seed of those samples, and of a binarisation drawn on the way.
    Raises:
        ValueError: The guide has no such site.
    """
    return _moments(guide, data, site, num_samples, seed)[0]


def _moments(guide: Program, data: Any, site: str, num_samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """E_q[z | x], and the Monte Carlo variance of that estimate, (N, *event) each."""
    means, variances = [], []
    with seeded(seed), torch.no_grad():
        for batch in Batches(data, 500, device_of(guide), shuffle=False):
            mean, variance = _run(guide, batch, site), torch.zeros(())
            # The mean of a layer above another changes with the draw of that other, from run to run.
            if not torch.equal(mean, _run(guide, batch, site)):
                values = torch.stack([_run(guide, batch, site) for _ in range(num_samples)])
                mean, variance = values.mean(0), values.var(0) / num_samples
            means.append(mean.cpu())
            variances.append(variance.expand_as(mean).cpu())
    return torch.cat(means), torch.cat(variances)


def _run(guide: Program, batch: tuple[Any, ...], site: str) -> Tensor:
    """The site's mean in one run of the guide, or its sample where it knows none."""
    with seeded(int(torch.randint(2**31, ()))):  # reading the sites leaves the random state as it was
        found = sites(guide, *batch)
    if site not in found:
        raise ValueError(f"the guide has no site {site!r}, wanted one of {', '.join(map(repr, found))}.")
    try:
        return found[site]["fn"].mean
    except NotImplementedError:
        return found[site]["value"]


def active_units(guide: Program, data: Any, threshold: float = 0.01, *, site: str = "z") -> ActiveUnits:
    """Count the latent dimensions that the guide uses.

        A_d = Var_x(E_q[z_d | x]) > threshold

    Where the mean is from samples, their variance is taken off: without that, each
    unused dimension would show 1/64 of its prior variance, and count.

    Args:
        guide: A Pyro program for q(z | x).
        data: As for `fit`.
        threshold: 0.01 in the reference.
        site: Name of the latent site.
    Returns:
        The count and the variances.
    Raises:
        ValueError: The guide has no such site.

    Reference: Burda et al., Importance Weighted Autoencoders, 2016, section 5. arXiv:1509.00519
    """
    means, noise = _moments(guide, data, site, num_samples=64, seed=0)
    variance = means.flatten(1).var(0) - noise.flatten(1).mean(0)
    return ActiveUnits(int((variance > threshold).sum()), len(variance), variance, threshold)
