"""Likelihoods p(x | z): modules that turn latents into a distribution over one datum.

A likelihood owns a decoder. Latents (..., D) give a distribution with batch_shape
(...) and the event shape of a datum: all dimensions that the decoder adds are event
dimensions.
"""

from pyro_vae.parts.likelihoods.bernoulli import Bernoulli
from pyro_vae.parts.likelihoods.categorical import Categorical
from pyro_vae.parts.likelihoods.continuous_bernoulli import ContinuousBernoulli
from pyro_vae.parts.likelihoods.counts import NegativeBinomial, Poisson
from pyro_vae.parts.likelihoods.discretized_logistic import DiscretizedLogistic, MixtureOfDiscretizedLogistics
from pyro_vae.parts.likelihoods.likelihood import Likelihood
from pyro_vae.parts.likelihoods.normal import Normal

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
