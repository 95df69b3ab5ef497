"""Fit, swap and judge variational autoencoders written as Pyro programs.

    model, guide    plain Pyro programs for p(z) p(x | z) and q(z | x)
    fit             optimises any such pair by stochastic variational inference
    log_likelihood  says how good the result is, with errors

All quantities are in nats; bounds and estimates go up, losses go down.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyro_vae.version import __version__

if TYPE_CHECKING:
    from pyro_vae.data.datasets import load
    from pyro_vae.inference.bounds import elbo, iwae, map_estimate, reconstruction
    from pyro_vae.inference.compiled import Compiled
    from pyro_vae.inference.objectives import Objective
    from pyro_vae.inference.training import History, fit
    from pyro_vae.judging.estimates import Estimate, anomaly_scores, elbo_terms, log_likelihood
    from pyro_vae.judging.latents import active_units
    from pyro_vae.programs.guide import Guide
    from pyro_vae.programs.model import Model
    from pyro_vae.programs.vae import VAE
    from pyro_vae.programs.zoo import autoencoder
    from pyro_vae.traces import Particles, log_joint, log_q, particles, simulate

_HOME = {
    "data.datasets": ("load",),
    "inference.bounds": ("elbo", "iwae", "map_estimate", "reconstruction"),
    "inference.compiled": ("Compiled",),
    "inference.objectives": ("Objective",),
    "inference.training": ("History", "fit"),
    "judging.estimates": ("Estimate", "anomaly_scores", "elbo_terms", "log_likelihood"),
    "judging.latents": ("active_units",),
    "programs.guide": ("Guide",),
    "programs.model": ("Model",),
    "programs.vae": ("VAE",),
    "programs.zoo": ("autoencoder",),
    "traces": ("Particles", "log_joint", "log_q", "particles", "simulate"),
}

__all__ = [
    "VAE",
    "Compiled",
    "Estimate",
    "Guide",
    "History",
    "Model",
    "Objective",
    "Particles",
    "__version__",
    "active_units",
    "anomaly_scores",
    "autoencoder",
    "elbo",
    "elbo_terms",
    "fit",
    "iwae",
    "load",
    "log_joint",
    "log_likelihood",
    "log_q",
    "map_estimate",
    "particles",
    "reconstruction",
    "simulate",
]


def __getattr__(name: str) -> Any:
    """Import a name when it is first used, so that ``pyro-vae --help`` need not wait for torch."""
    for module, names in _HOME.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"pyro_vae.{module}"), name)
            return value
    raise AttributeError(f"module 'pyro_vae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
