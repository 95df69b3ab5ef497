"""Distributions that Pyro lacks, or computes slowly."""

from pyro_vae.parts.distributions.bernoulli import BernoulliLogits

__all__ = ["BernoulliLogits"]
