"""Figures: numbers and tensors in, matplotlib figures out; no display is needed and nothing global is touched.

    of a fitted pair    training_curve · reconstructions · samples · interpolations · gallery · latent_space(s)
    of a judgement      bounds_by_samples · gap_bars · khat_against_log_p · bracket · rank_histogram ·
                        coverage_curve · kl_by_dimension
"""

from pyro_vae.plots._bounds import bounds_by_samples, bracket, gap_bars, khat_against_log_p
from pyro_vae.plots._latents import coverage_curve, kl_by_dimension, rank_histogram
from pyro_vae.plots._pictures import (
    gallery,
    interpolations,
    latent_space,
    latent_spaces,
    reconstructions,
    samples,
    training_curve,
)

__all__ = [
    "bounds_by_samples",
    "bracket",
    "coverage_curve",
    "gallery",
    "gap_bars",
    "interpolations",
    "khat_against_log_p",
    "kl_by_dimension",
    "latent_space",
    "latent_spaces",
    "rank_histogram",
    "reconstructions",
    "samples",
    "training_curve",
]
