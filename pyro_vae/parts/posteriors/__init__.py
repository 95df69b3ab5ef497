"""Posteriors q(z | x): an encoder, and a linear head from its features to the parameters of a distribution."""

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
