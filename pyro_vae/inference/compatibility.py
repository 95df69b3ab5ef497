"""What does not go together is refused before training, with the reason and a remedy."""

from __future__ import annotations

import warnings
from typing import Any

from pyro.infer.autoguide import AutoGuide

from pyro_vae.inference.cases import examine
from pyro_vae.inference.rules import NOTES, RULES
from pyro_vae.sites import is_subsample
from pyro_vae.traces import Program


def check(model: Program, guide: Program, batch: tuple[Any, ...], loss: Any) -> bool:
    """Refuse what does not go together by a ValueError, warn of what should be known; whether the guide has a point
    site.
    """
    case = examine(model, guide, batch, loss)
    reason = next((found for rule in RULES if (found := rule(case)) is not None), None)
    if reason is not None:
        raise ValueError(reason)
    for note in NOTES:
        if (text := note(case)) is not None:
            warnings.warn(text, stacklevel=4)
    return case.point is not None


def rows_held(guide: Program) -> tuple[str, int] | None:
    """The latent site for whose every row an automatic guide holds parameters, and how many rows.

    None for one that has seen no data yet, for global latents, and for a plate of which it sees a part by index.
    """
    trace = getattr(guide, "prototype_trace", None) if isinstance(guide, AutoGuide) else None
    # Some of Pyro's guides keep nodes in it that are no sites.
    for name, site in () if trace is None else [(n, s) for n, s in trace.nodes.items() if s.get("type") == "sample"]:
        if site["is_observed"] or is_subsample(site["fn"]):
            continue
        for frame in site["cond_indep_stack"]:
            if frame.vectorized and frame.full_size in (None, -1, frame.size):
                return name, int(frame.size)
    return None
