"""Priors p(z): modules that return a distribution over one latent, batch_shape ()."""

from pyro_vae.parts.priors.flow import Flow
from pyro_vae.parts.priors.hyperspherical import HypersphericalUniform
from pyro_vae.parts.priors.mixture import NormalMixture
from pyro_vae.parts.priors.normal import StandardNormal
from pyro_vae.parts.priors.vamp import VampPrior

__all__ = ["Flow", "HypersphericalUniform", "NormalMixture", "StandardNormal", "VampPrior"]
