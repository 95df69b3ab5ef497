"""Ready-made pairs beyond the plain VAE, each a convenience over two plain Pyro programs.

    autoencoder      a point z(x) instead of q(z | x), no prior term
    Hierarchical     p(z_L) ... p(z_1 | z_2) p(x | z_1)
    Conditional      p(z | y) p(x | z, y), y known
    SemiSupervised   p(y) p(z) p(x | z, y), y known for some data and summed out for the others
    Mixture          p(c) p(z | c) p(x | z), c never known and summed out

Their parts are callables that return distributions, so the user's own drop in.
"""

from pyro_vae.programs.zoo.assembly import autoencoder
from pyro_vae.programs.zoo.conditional import Conditional, Joined
from pyro_vae.programs.zoo.hierarchical import Hierarchical
from pyro_vae.programs.zoo.mixture import Clusters, Mixture
from pyro_vae.programs.zoo.semi_supervised import Classifier, SemiSupervised

__all__ = [
    "Classifier",
    "Clusters",
    "Conditional",
    "Hierarchical",
    "Joined",
    "Mixture",
    "SemiSupervised",
    "autoencoder",
]
