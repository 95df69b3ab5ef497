"""Posteriors q(z | x): modules that turn data into a distribution over the latent.

A posterior owns an encoder (data to features) and a linear head from the features to
its parameters, so that families are swapped without touching the network.
"""

from pyro_vae.parts.posteriors.amortized import Amortized
from pyro_vae.parts.posteriors.delta import Delta, mean
from pyro_vae.parts.posteriors.normal import DiagonalNormal

__all__ = ["Amortized", "Delta", "DiagonalNormal", "mean"]
