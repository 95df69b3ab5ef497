"""Figures: numbers and tensors in, matplotlib figures out; no display is needed and nothing global is touched.

    of a fitted pair    training_curve · reconstructions · samples · interpolations · gallery · latent_space(s)
    of a judgement      bounds_by_samples · gap_bars · khat_against_log_p · bracket · rank_histogram ·
                        coverage_curve · kl_by_dimension · number_bars (of any table)

    of a comparison     differences · cost · curves_by_time · khat_maps · side_by_side · critical_difference

    asked of a pair     latent_scatter · latent_clouds · latent_grid · histograms · traverse · morph · attribute ·
                        posterior_contours · rate_distortion · aggregated

    what log p(x) is    identity_bars · elbo_curves

What draws one pair of axes takes ``ax=``, where it draws then; all return the figure.
"""

from pyro_vae.plots._bounds import bounds_by_samples, bracket, gap_bars, khat_against_log_p, number_bars
from pyro_vae.plots._codes import aggregated, latent_clouds
from pyro_vae.plots._comparisons import (
    cost,
    critical_difference,
    curves_by_time,
    differences,
    khat_maps,
    side_by_side,
)
from pyro_vae.plots._latents import coverage_curve, kl_by_dimension, rank_histogram
from pyro_vae.plots._lecture import (
    attribute,
    histograms,
    latent_grid,
    latent_scatter,
    morph,
    posterior_contours,
    rate_distortion,
    traverse,
)
from pyro_vae.plots._pictures import (
    gallery,
    interpolations,
    latent_space,
    latent_spaces,
    reconstructions,
    samples,
    training_curve,
)
from pyro_vae.plots._terms import elbo_curves, identity_bars

__all__ = [
    "aggregated",
    "attribute",
    "bounds_by_samples",
    "bracket",
    "cost",
    "coverage_curve",
    "critical_difference",
    "curves_by_time",
    "differences",
    "elbo_curves",
    "gallery",
    "gap_bars",
    "histograms",
    "identity_bars",
    "interpolations",
    "khat_against_log_p",
    "khat_maps",
    "kl_by_dimension",
    "latent_clouds",
    "latent_grid",
    "latent_scatter",
    "latent_space",
    "latent_spaces",
    "morph",
    "number_bars",
    "posterior_contours",
    "rank_histogram",
    "rate_distortion",
    "reconstructions",
    "samples",
    "side_by_side",
    "training_curve",
    "traverse",
]
