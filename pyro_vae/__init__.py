"""Fit, swap and judge variational autoencoders written as Pyro programs.

    import pyro_vae as pv

    pv.fit(model, guide, data)    two plain Pyro programs, p(z) p(x | z) and q(z | x), then the data
    pv.fit(vae, data)             the same where one thing holds both, as `vae.model` and `vae.guide`; so everywhere

    the pair        VAE (holds one made of parts)  Model  Guide  SemiAmortized  Hamiltonian  autoencoder
    its parts       pv.posteriors  pv.priors  pv.likelihoods  pv.networks  pv.distributions  pv.zoo (ready-made pairs)
    fit             fit  History  Objective  Compiled  ex_post  fit_guide  pv.callbacks (TensorBoard, MLflow, W&B)
    bounds          elbo  iwae  renyi  vr_max  miwae  ciwae  piwae  cubo  wake_sleep (all in pv.bounds)
                    reconstruction  map_estimate (for guides that are a point)
    regularizers    mmd  total_correlation  free_bits
    how good        log_likelihood  elbo_terms  Estimate  ais  bdmc  quadrature  identity  judge (everything)
    who is ahead    compare (pairs and runs)  study (arms x seeds, resumable)
    whose fault     gaps  compare_guides  reference  guide_distances  sbc  gradient_lab
    the latents     active_units  collapse  kl_per_dimension  mutual_information  rate_distortion  probe
    use             open (a run folder)  impute  anomaly_scores  roc_auc  energy_distance  to_arviz  pv.plots
    data            load  Dataset  Split  binarize  dequantize  LinearGaussian (exact answers)  pv.data
    log densities   particles  Particles  log_joint  log_q  simulate
    parts of yours  pv.testing (the laws that every part obeys)
    processes       alone (what one of several does by itself; all else they share)

All quantities are in nats; bounds and estimates go up, losses go down. A name is imported when it is first used.
"""

from typing import TYPE_CHECKING

from pyro_vae._lazy import attach

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pyro_vae import callbacks as callbacks
    from pyro_vae import data as data
    from pyro_vae import plots as plots
    from pyro_vae import testing as testing
    from pyro_vae.app.comparing import compare as compare
    from pyro_vae.app.comparing import study as study
    from pyro_vae.app.opening import open as open
    from pyro_vae.data import Dataset as Dataset
    from pyro_vae.data import LinearGaussian as LinearGaussian
    from pyro_vae.data import Split as Split
    from pyro_vae.data import binarize as binarize
    from pyro_vae.data import dequantize as dequantize
    from pyro_vae.data import load as load
    from pyro_vae.inference import Compiled as Compiled
    from pyro_vae.inference import History as History
    from pyro_vae.inference import Objective as Objective
    from pyro_vae.inference import alone as alone
    from pyro_vae.inference import bounds as bounds
    from pyro_vae.inference import ciwae as ciwae
    from pyro_vae.inference import cubo as cubo
    from pyro_vae.inference import elbo as elbo
    from pyro_vae.inference import fit as fit
    from pyro_vae.inference import free_bits as free_bits
    from pyro_vae.inference import iwae as iwae
    from pyro_vae.inference import map_estimate as map_estimate
    from pyro_vae.inference import miwae as miwae
    from pyro_vae.inference import mmd as mmd
    from pyro_vae.inference import piwae as piwae
    from pyro_vae.inference import reconstruction as reconstruction
    from pyro_vae.inference import renyi as renyi
    from pyro_vae.inference import total_correlation as total_correlation
    from pyro_vae.inference import vr_max as vr_max
    from pyro_vae.inference import wake_sleep as wake_sleep
    from pyro_vae.judging import Estimate as Estimate
    from pyro_vae.judging import active_units as active_units
    from pyro_vae.judging import ais as ais
    from pyro_vae.judging import anomaly_scores as anomaly_scores
    from pyro_vae.judging import bdmc as bdmc
    from pyro_vae.judging import collapse as collapse
    from pyro_vae.judging import compare_guides as compare_guides
    from pyro_vae.judging import elbo_terms as elbo_terms
    from pyro_vae.judging import energy_distance as energy_distance
    from pyro_vae.judging import fit_guide as fit_guide
    from pyro_vae.judging import gaps as gaps
    from pyro_vae.judging import gradient_lab as gradient_lab
    from pyro_vae.judging import guide_distances as guide_distances
    from pyro_vae.judging import identity as identity
    from pyro_vae.judging import impute as impute
    from pyro_vae.judging import judge as judge
    from pyro_vae.judging import kl_per_dimension as kl_per_dimension
    from pyro_vae.judging import log_likelihood as log_likelihood
    from pyro_vae.judging import mutual_information as mutual_information
    from pyro_vae.judging import probe as probe
    from pyro_vae.judging import quadrature as quadrature
    from pyro_vae.judging import rate_distortion as rate_distortion
    from pyro_vae.judging import reference as reference
    from pyro_vae.judging import roc_auc as roc_auc
    from pyro_vae.judging import sbc as sbc
    from pyro_vae.judging import to_arviz as to_arviz
    from pyro_vae.parts import distributions as distributions
    from pyro_vae.parts import likelihoods as likelihoods
    from pyro_vae.parts import networks as networks
    from pyro_vae.parts import posteriors as posteriors
    from pyro_vae.parts import priors as priors
    from pyro_vae.programs import VAE as VAE
    from pyro_vae.programs import Guide as Guide
    from pyro_vae.programs import Hamiltonian as Hamiltonian
    from pyro_vae.programs import Model as Model
    from pyro_vae.programs import SemiAmortized as SemiAmortized
    from pyro_vae.programs import ex_post as ex_post
    from pyro_vae.programs import zoo as zoo
    from pyro_vae.programs.zoo import autoencoder as autoencoder
    from pyro_vae.traces import Particles as Particles
    from pyro_vae.traces import log_joint as log_joint
    from pyro_vae.traces import log_q as log_q
    from pyro_vae.traces import particles as particles
    from pyro_vae.traces import simulate as simulate
else:
    __getattr__, __dir__, __all__ = attach(__name__, "__version__")
