"""Inference: from a bound to a fit, for any model and guide."""

from typing import TYPE_CHECKING

from pyro_vae._lazy import attach

if TYPE_CHECKING:
    from pyro_vae.inference.bounds import ciwae as ciwae
    from pyro_vae.inference.bounds import elbo as elbo
    from pyro_vae.inference.bounds import iwae as iwae
    from pyro_vae.inference.bounds import map_estimate as map_estimate
    from pyro_vae.inference.bounds import miwae as miwae
    from pyro_vae.inference.bounds import reconstruction as reconstruction
    from pyro_vae.inference.bounds import renyi as renyi
    from pyro_vae.inference.bounds import vr_max as vr_max
    from pyro_vae.inference.compiled import Compiled as Compiled
    from pyro_vae.inference.objectives import Objective as Objective
    from pyro_vae.inference.ranks import alone as alone
    from pyro_vae.inference.records import History as History
    from pyro_vae.inference.regularizers import free_bits as free_bits
    from pyro_vae.inference.regularizers import mmd as mmd
    from pyro_vae.inference.regularizers import total_correlation as total_correlation
    from pyro_vae.inference.split_bounds import cubo as cubo
    from pyro_vae.inference.split_bounds import piwae as piwae
    from pyro_vae.inference.split_bounds import wake_sleep as wake_sleep
    from pyro_vae.inference.training import fit as fit
else:
    __getattr__, __dir__, __all__ = attach(__name__)
