"""Programs run and read: traces at drawn or at given values, and the log densities in them."""

from typing import TYPE_CHECKING

from pyro_vae._lazy import attach

if TYPE_CHECKING:
    from pyro_vae.traces._particles import Particles as Particles
    from pyro_vae.traces._particles import draw as draw
    from pyro_vae.traces._particles import particles as particles
    from pyro_vae.traces.agreement import missing_values as missing_values
    from pyro_vae.traces.agreement import other_mask as other_mask
    from pyro_vae.traces.cuts import Cut as Cut
    from pyro_vae.traces.given import log_joint as log_joint
    from pyro_vae.traces.given import log_q as log_q
    from pyro_vae.traces.layouts import Layout as Layout
    from pyro_vae.traces.layouts import layout as layout
    from pyro_vae.traces.layouts import nesting_of as nesting_of
    from pyro_vae.traces.layouts import plate_nesting as plate_nesting
    from pyro_vae.traces.runs import Program as Program
    from pyro_vae.traces.runs import run_at as run_at
    from pyro_vae.traces.runs import sites as sites
    from pyro_vae.traces.runs import traced as traced
    from pyro_vae.traces.simulation import Simulation as Simulation
    from pyro_vae.traces.simulation import predict as predict
    from pyro_vae.traces.simulation import simulate as simulate
else:
    __getattr__, __dir__, __all__ = attach(__name__)
