"""Whether a datum is scored by itself: the same latents of it, in other company.

A mean over the batch in a network, or batch normalisation without running statistics, makes log p(x_b, z_b) and
log q(z_b | x_b) functions of the other rows too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.inference.rehearsal import rehearse
from pyro_vae.inference.trees import at
from pyro_vae.randomness import forked
from pyro_vae.traces import Program

# Data in the first company: a few make a tiny run.
_FEW = 4


def seen_by_others(programs: Sequence[Program], data: tuple[Any, ...]) -> str | None:
    """Which program's log density of datum 0 at given latents depends on who else is in the batch.

    The pair runs on the first few data, and on as many copies of datum 0 with the latents that it had there. Nothing is
    said of one datum, of data that are not tensors with a row a datum, of sites outside of the one plate of the data or
    of a part of it, of programs that do not run on few data, nor of programs with noise of their own.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z - z.mean(), 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> seen_by_others((model, guide), (torch.tensor([0.0, 50.0, 90.0]),))[:66]
        'the model scores datum 0 differently alone and beside other data ('
    """
    model, guide = programs
    if isinstance(guide, AutoGuide) or not data or not all(isinstance(x, Tensor) and x.dim() for x in data):
        return None
    size = len(data[0])
    if size < 2 or any(len(x) != size for x in data) or not any(x.is_floating_point() for x in data):
        return None
    few = min(size, _FEW)
    try:
        with torch.no_grad():
            beside = at(data, slice(few))
            first, drawn = _scores(model, guide, beside, few)
            alike = {name: {**site, "value": site["value"][[0] * few]} for name, site in drawn.items()}
            second, _ = _scores(model, _at(guide, alike), at(data, torch.zeros(few, dtype=torch.long)), few)
            moved = [who for who in first if _differ(first[who], second[who])]
            if not moved:
                return None
            again, _ = _scores(model, _at(guide, drawn), beside, few, reseed=True)
    except Exception:  # noqa: BLE001 - programs that this does not fit are not judged by it
        return None
    who = moved[0]
    if _differ(first[who], again[who]):
        return None
    alone, others = sum(second[who]), sum(first[who])
    return (
        f"the {who} scores datum 0 differently alone and beside other data ({alone:.4g} nats among copies of itself, "
        f"{others:.4g} nats among others, at the same latents), so that per-datum numbers depend on the batch. A "
        "network mixes the rows, as a mean over the batch or batch normalisation without running statistics does: use "
        "LayerNorm, or statistics that are held fixed."
    )


def _scores(
    model: Program, guide: Program, batch: tuple[Any, ...], size: int, reseed: bool = False
) -> tuple[dict[str, list[float]], Mapping[str, Any]]:
    """Per program the log densities of datum 0, site by site, and the guide's sites."""
    with forked():
        if reseed:
            torch.manual_seed(size)
        shown = rehearse((model, guide), batch)
    if shown.error is not None:
        raise shown.error
    found = {"model": shown.sites, "guide": shown.latents}
    return {who: [_score(site, size) for site in sites.values()] for who, sites in found.items()}, shown.latents


def _score(site: Any, size: int) -> float:
    """The log density of datum 0; refused of sites in other plates than that of the data, and of scaled ones."""
    value = scale_and_mask(site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"]), mask=site["mask"])
    (plate,), scale = site["cond_indep_stack"], site["scale"]
    whole = plate.vectorized and plate.dim == -1 and plate.size == size and plate.full_size in (None, -1, size)
    if not whole or value.shape != (size,) or isinstance(scale, Tensor) or scale != 1:
        raise ValueError("a site lies in other plates than that of the data, or carries a scale")
    return float(value[0])


def _at(guide: Program, drawn: Mapping[str, Any]) -> Program:
    """A guide that draws given values."""
    trace = Trace()
    for name, site in drawn.items():
        trace.add_node(name, **site)
    replayed: Program = poutine.replay(guide, trace=trace)
    return replayed


def _differ(one: list[float], two: list[float]) -> bool:
    """Whether two scores differ by more than rounding."""
    if len(one) != len(two):
        raise ValueError("the sites are not the same")
    if not all(math.isfinite(x) for x in (*one, *two)):
        return False
    return any(abs(a - b) > 1e-3 * (1 + abs(a) + abs(b)) for a, b in zip(one, two, strict=True))
