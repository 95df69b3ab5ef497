"""Laws that every part obeys, for this package's parts and for your own.

A battery is a class; a part is put through it by a subclass that makes one, and pytest
finds the rest. In your own test file:

    class TestMine(PosteriorLaws):
        def make(self):
            return Mine(MLP((1, 4, 4), [8], None), latent_dim=2)

Each law is one test. Monte Carlo claims are held to standard errors computed on the spot.
"""

from typing import TYPE_CHECKING

from pyro_vae._lazy import attach

if TYPE_CHECKING:
    from pyro_vae.testing.pairs import PairLaws as PairLaws
    from pyro_vae.testing.parts import LEADING as LEADING
    from pyro_vae.testing.parts import LikelihoodLaws as LikelihoodLaws
    from pyro_vae.testing.parts import PosteriorLaws as PosteriorLaws
    from pyro_vae.testing.parts import PriorLaws as PriorLaws
    from pyro_vae.testing.parts import check as check
else:
    __getattr__, __dir__, __all__ = attach(__name__)
