"""Figures: numbers and tensors in, matplotlib figures out; no display is needed and nothing global is touched.

    of a fitted pair    training_curve · reconstructions · samples · interpolations · gallery · latent_space(s)
    of a judgement      bounds_by_samples · gap_bars · khat_against_log_p · bracket · rank_histogram ·
                        coverage_curve · kl_by_dimension · number_bars (of any table)

    of a comparison     differences · cost · curves_by_time · khat_maps · side_by_side · critical_difference

    asked of a pair     latent_scatter · latent_clouds · latent_grid · histograms · traverse · morph · attribute ·
                        posterior_contours · rate_distortion

    what log p(x) is    identity_bars · elbo_curves

What draws one pair of axes takes ``ax=``, where it draws then, instead of into a figure of its own; ``title=`` stands
above the picture. All return the figure.
"""

from typing import TYPE_CHECKING

from pyro_vae._lazy import attach

if TYPE_CHECKING:
    from pyro_vae.plots._bounds import bounds_by_samples as bounds_by_samples
    from pyro_vae.plots._bounds import bracket as bracket
    from pyro_vae.plots._bounds import gap_bars as gap_bars
    from pyro_vae.plots._bounds import khat_against_log_p as khat_against_log_p
    from pyro_vae.plots._bounds import number_bars as number_bars
    from pyro_vae.plots._comparisons import cost as cost
    from pyro_vae.plots._comparisons import critical_difference as critical_difference
    from pyro_vae.plots._comparisons import curves_by_time as curves_by_time
    from pyro_vae.plots._comparisons import differences as differences
    from pyro_vae.plots._comparisons import khat_maps as khat_maps
    from pyro_vae.plots._comparisons import side_by_side as side_by_side
    from pyro_vae.plots._latents import coverage_curve as coverage_curve
    from pyro_vae.plots._latents import elbo_curves as elbo_curves
    from pyro_vae.plots._latents import identity_bars as identity_bars
    from pyro_vae.plots._latents import kl_by_dimension as kl_by_dimension
    from pyro_vae.plots._latents import latent_clouds as latent_clouds
    from pyro_vae.plots._latents import rank_histogram as rank_histogram
    from pyro_vae.plots._lecture import attribute as attribute
    from pyro_vae.plots._lecture import histograms as histograms
    from pyro_vae.plots._lecture import latent_grid as latent_grid
    from pyro_vae.plots._lecture import latent_scatter as latent_scatter
    from pyro_vae.plots._lecture import morph as morph
    from pyro_vae.plots._lecture import posterior_contours as posterior_contours
    from pyro_vae.plots._lecture import rate_distortion as rate_distortion
    from pyro_vae.plots._lecture import traverse as traverse
    from pyro_vae.plots._pictures import gallery as gallery
    from pyro_vae.plots._pictures import interpolations as interpolations
    from pyro_vae.plots._pictures import latent_space as latent_space
    from pyro_vae.plots._pictures import latent_spaces as latent_spaces
    from pyro_vae.plots._pictures import reconstructions as reconstructions
    from pyro_vae.plots._pictures import samples as samples
    from pyro_vae.plots._pictures import training_curve as training_curve
else:
    __getattr__, __dir__, __all__ = attach(__name__)
