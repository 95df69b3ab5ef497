"""Judging: how good any model/guide pair is, in numbers that carry their error."""

from typing import TYPE_CHECKING

from pyro_vae._lazy import attach

if TYPE_CHECKING:
    from pyro_vae.judging._calibration import Calibration as Calibration
    from pyro_vae.judging._calibration import calibration as calibration
    from pyro_vae.judging._calibration import sbc as sbc
    from pyro_vae.judging._collapse import Collapse as Collapse
    from pyro_vae.judging._collapse import LinearOptimum as LinearOptimum
    from pyro_vae.judging._collapse import collapse as collapse
    from pyro_vae.judging._collapse import linear_optimum as linear_optimum
    from pyro_vae.judging._gaps import FamilyGaps as FamilyGaps
    from pyro_vae.judging._gaps import Gaps as Gaps
    from pyro_vae.judging._gaps import gap_table as gap_table
    from pyro_vae.judging._gaps import gaps as gaps
    from pyro_vae.judging._identity import identity as identity
    from pyro_vae.judging.annealing import ais as ais
    from pyro_vae.judging.annealing import bdmc as bdmc
    from pyro_vae.judging.anomalies import anomaly_scores as anomaly_scores
    from pyro_vae.judging.anomalies import roc_auc as roc_auc
    from pyro_vae.judging.arviz import to_arviz as to_arviz
    from pyro_vae.judging.distances import Distance as Distance
    from pyro_vae.judging.distances import GuideDistances as GuideDistances
    from pyro_vae.judging.distances import energy_distance as energy_distance
    from pyro_vae.judging.distances import guide_distances as guide_distances
    from pyro_vae.judging.estimates import ElboTerms as ElboTerms
    from pyro_vae.judging.estimates import RateDistortion as RateDistortion
    from pyro_vae.judging.estimates import elbo_terms as elbo_terms
    from pyro_vae.judging.estimates import log_likelihood as log_likelihood
    from pyro_vae.judging.estimates import rate_distortion as rate_distortion
    from pyro_vae.judging.evidence import Annealed as Annealed
    from pyro_vae.judging.evidence import Bracket as Bracket
    from pyro_vae.judging.evidence import Estimate as Estimate
    from pyro_vae.judging.gradients import GradientLab as GradientLab
    from pyro_vae.judging.gradients import GradientQuality as GradientQuality
    from pyro_vae.judging.gradients import gradient_lab as gradient_lab
    from pyro_vae.judging.grids import Quadrature as Quadrature
    from pyro_vae.judging.grids import quadrature as quadrature
    from pyro_vae.judging.guides import Comparison as Comparison
    from pyro_vae.judging.guides import compare_guides as compare_guides
    from pyro_vae.judging.guides import fit_guide as fit_guide
    from pyro_vae.judging.imputation import Imputation as Imputation
    from pyro_vae.judging.imputation import impute as impute
    from pyro_vae.judging.information import Accuracy as Accuracy
    from pyro_vae.judging.information import MutualInformation as MutualInformation
    from pyro_vae.judging.information import mutual_information as mutual_information
    from pyro_vae.judging.information import probe as probe
    from pyro_vae.judging.judgement import Judgement as Judgement
    from pyro_vae.judging.judgement import judge as judge
    from pyro_vae.judging.latents import ActiveUnits as ActiveUnits
    from pyro_vae.judging.latents import DimensionKL as DimensionKL
    from pyro_vae.judging.latents import active_units as active_units
    from pyro_vae.judging.latents import kl_per_dimension as kl_per_dimension
    from pyro_vae.judging.latents import posterior_means as posterior_means
    from pyro_vae.judging.references import Reference as Reference
    from pyro_vae.judging.references import reference as reference
    from pyro_vae.judging.results import Mean as Mean
    from pyro_vae.judging.weights import khat_limit as khat_limit
    from pyro_vae.judging.weights import pareto_k as pareto_k
    from pyro_vae.judging.weights import pareto_smoothed as pareto_smoothed
else:
    __getattr__, __dir__, __all__ = attach(__name__)
