"""What programs reach from Python: the modules that they own, and all that could change what they compute."""

from typing import TYPE_CHECKING

from pyro_vae._lazy import attach

if TYPE_CHECKING:
    from pyro_vae.reach.ownership import modules_of as modules_of
    from pyro_vae.reach.ownership import parts_in as parts_in
    from pyro_vae.reach.ownership import parts_of as parts_of
    from pyro_vae.reach.proof import Reach as Reach
else:
    __getattr__, __dir__, __all__ = attach(__name__)
