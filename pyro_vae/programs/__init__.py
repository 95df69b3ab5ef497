"""Programs: plain Pyro models and guides made of parts, and the `VAE` that holds a pair."""

from typing import TYPE_CHECKING

from pyro_vae._lazy import attach

if TYPE_CHECKING:
    from pyro_vae.programs import zoo as zoo
    from pyro_vae.programs._ex_post import aggregated_posterior as aggregated_posterior
    from pyro_vae.programs._ex_post import ex_post as ex_post
    from pyro_vae.programs.hamiltonian import Hamiltonian as Hamiltonian
    from pyro_vae.programs.pair import Guide as Guide
    from pyro_vae.programs.pair import Model as Model
    from pyro_vae.programs.semi_amortized import SemiAmortized as SemiAmortized
    from pyro_vae.programs.vae import VAE as VAE
else:
    __getattr__, __dir__, __all__ = attach(__name__)
