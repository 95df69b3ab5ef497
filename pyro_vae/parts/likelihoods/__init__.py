"""Likelihoods p(x | z): modules that turn latents into a distribution over one datum.

A likelihood owns a decoder. Latents (..., D) give a distribution with batch_shape (...) and the event shape of a datum:
all dimensions that the decoder adds are event dimensions.
"""

from pyro_vae.parts.likelihoods.discrete import (
    Categorical,
    DiscretizedLogistic,
    MixtureOfDiscretizedLogistics,
    NegativeBinomial,
    Poisson,
)
from pyro_vae.parts.likelihoods.likelihood import Bernoulli, ContinuousBernoulli, Likelihood, Normal

__all__ = [
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "Likelihood",
    "MixtureOfDiscretizedLogistics",
    "NegativeBinomial",
    "Normal",
    "Poisson",
]
