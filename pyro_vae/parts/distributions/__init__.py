"""Distributions that Pyro lacks, or computes slowly."""

from typing import TYPE_CHECKING

from pyro_vae._lazy import attach

if TYPE_CHECKING:
    from pyro_vae.parts.distributions.bernoulli import BernoulliLogits as BernoulliLogits
    from pyro_vae.parts.distributions.bernoulli import ContinuousBernoulliLogits as ContinuousBernoulliLogits
    from pyro_vae.parts.distributions.counts import LevelsAsCounts as LevelsAsCounts
    from pyro_vae.parts.distributions.counts import NegativeBinomialLogMean as NegativeBinomialLogMean
    from pyro_vae.parts.distributions.counts import PoissonLogRate as PoissonLogRate
    from pyro_vae.parts.distributions.flow import Pushforward as Pushforward
    from pyro_vae.parts.distributions.levels import CategoricalLevels as CategoricalLevels
    from pyro_vae.parts.distributions.levels import DiscretizedLogistic as DiscretizedLogistic
    from pyro_vae.parts.distributions.mixture import DiagonalNormalMixture as DiagonalNormalMixture
    from pyro_vae.parts.distributions.mixture import SharedMixture as SharedMixture
    from pyro_vae.parts.distributions.normal import CholeskyNormal as CholeskyNormal
    from pyro_vae.parts.distributions.normal import LowRankNormal as LowRankNormal
    from pyro_vae.parts.distributions.spherical import HypersphericalUniform as HypersphericalUniform
    from pyro_vae.parts.distributions.spherical import VonMisesFisher as VonMisesFisher
else:
    __getattr__, __dir__, __all__ = attach(__name__)
