"""Priors p(z): modules that return a distribution over one latent, batch_shape ()."""

from pyro_vae.parts.priors.mixture import NormalMixture, VampPrior
from pyro_vae.parts.priors.standard import Flow, HypersphericalUniform, StandardNormal

__all__ = ["Flow", "HypersphericalUniform", "NormalMixture", "StandardNormal", "VampPrior"]
