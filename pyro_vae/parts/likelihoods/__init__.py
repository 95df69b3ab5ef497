"""Likelihoods p(x | z): a decoder, and the distribution of one datum whose parameters it gives."""

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
