"""Parts: networks, priors, likelihoods and posteriors, each returning a distribution."""

from typing import TYPE_CHECKING

from pyro_vae._lazy import attach

if TYPE_CHECKING:
    from pyro_vae.parts import distributions as distributions
    from pyro_vae.parts import likelihoods as likelihoods
    from pyro_vae.parts import networks as networks
    from pyro_vae.parts import posteriors as posteriors
    from pyro_vae.parts import priors as priors
else:
    __getattr__, __dir__, __all__ = attach(__name__)
