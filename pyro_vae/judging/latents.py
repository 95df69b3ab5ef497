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

    Exact where the site's distribution knows its mean, and from samples where not.

    Args:
        guide: A Pyro program for q(z | x).
        data: As for `fit`.
        site: Name of the latent site.
        num_samples: Samples per datum where the mean is not known.
        seed: Seed of those samples, and of a binarisation drawn on the way.
    Raises:
        ValueError: The guide has no such site.
    """
    means = []
    with seeded(seed), torch.no_grad():
        for batch in Batches(data, 500, device_of(guide), shuffle=False):
            found = sites(guide, *batch)
            if site not in found:
                raise ValueError(f"the guide has no site {site!r}, wanted one of {', '.join(map(repr, found))}.")
            fn = found[site]["fn"]
            try:
                means.append(fn.mean.cpu())
            except NotImplementedError:
                means.append(torch.stack([fn.sample() for _ in range(num_samples)]).mean(0).cpu())
    return torch.cat(means)


def active_units(guide: Program, data: Any, threshold: float = 0.01, *, site: str = "z") -> ActiveUnits:
    """Count the latent dimensions that the guide uses.

        A_d = Var_x(E_q[z_d | x]) > threshold

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
    variance = posterior_means(guide, data, site=site).flatten(1).var(0)
    return ActiveUnits(int((variance > threshold).sum()), len(variance), variance, threshold)
