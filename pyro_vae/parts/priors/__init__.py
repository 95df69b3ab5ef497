"""Priors p(z): modules that return a distribution over one latent, batch_shape ()."""

from pyro_vae.parts.priors.normal import StandardNormal

__all__ = ["StandardNormal"]
