"""Posteriors q(z | x): modules that turn data into a distribution over the latent.

A posterior owns an encoder (data to features) and a linear head from the features to
its parameters, so that families are swapped without touching the network.
"""

from pyro_vae.parts.posteriors.amortized import (
    Amortized,
    Delta,
    DiagonalNormal,
    FullNormal,
    LowRankNormal,
    NormalMixture,
    VonMisesFisher,
    mean,
)
from pyro_vae.parts.posteriors.flow import IAF, MAF, NSF, Coupling, Flow
from pyro_vae.parts.posteriors.planar import Planar, Sylvester

__all__ = [
    "IAF",
    "MAF",
    "NSF",
    "Amortized",
    "Coupling",
    "Delta",
    "DiagonalNormal",
    "Flow",
    "FullNormal",
    "LowRankNormal",
    "NormalMixture",
    "Planar",
    "Sylvester",
    "VonMisesFisher",
    "mean",
]
