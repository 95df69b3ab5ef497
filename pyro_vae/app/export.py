"""`to_arviz` under the name that programs outside know it by; it lives in `pyro_vae.judging.arviz`."""

from typing import Any

from pyro_vae.judging import arviz
from pyro_vae.judging.arviz import save_arviz
from pyro_vae.traces import Program

__all__ = ["save_arviz", "to_arviz"]


def to_arviz(model: Program, guide: Program, *data: Any, **options: Any) -> Any:
    """As `pyro_vae.to_arviz`, with several columns of data one after the other."""
    return arviz.to_arviz(model, guide, data[0] if len(data) == 1 else data, **options)
