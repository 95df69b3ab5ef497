"""`to_arviz` under the name that programs outside know it by; it lives in `pyro_vae.judging.arviz`."""

from pyro_vae.judging.arviz import save_arviz, to_arviz

__all__ = ["save_arviz", "to_arviz"]
