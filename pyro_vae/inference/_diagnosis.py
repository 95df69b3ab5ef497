"""Where a loss that is not finite came from.

A loss is log p(x | z) + log p(z) - log q(z | x), summed: the pair is run again on the batch, and the first of its
densities that is not finite is named with its rows, in the order in which numbers reach it: the data, q, the draws,
the prior, the likelihood. A parameter that is not finite is older than all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_vae.inference.rehearsal import Rehearsal, rehearse
from pyro_vae.inference.trees import leaves, rows
from pyro_vae.reach import modules_of
from pyro_vae.sites import kind, unwrapped
from pyro_vae.traces import Program

_TRIES = 5  # a draw may be the reason, and another draw is not
_UNSCALED = 20.0  # a size of data at which networks with unit weights begin to overflow
_NAMED = 5


def diagnosis(
    value: float, step: int, programs: Sequence[Program], batch: tuple[Any, ...], index: Tensor | None = None
) -> str:
    """What to say of a loss that is not finite.

    Args:
        value: The loss.
        step: The number of the step, from 0.
        programs: The model and the guide, as they are now.
        batch: The batch of that step.
        index: The rows of the data that it holds, where they are known.
    Returns:
        The step, then as far as they are found the parameter, the site with its rows, and the data's range.
    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        >>> print(diagnosis(-math.inf, 7, [model], (torch.tensor([0.0, 1e30]),), torch.tensor([4, 2])))
        the loss became -inf at step 7. Lower learning_rate, set clip_norm (100 is a mild value), or look for a scale
        that collapses to zero. Site 'x' of the model (Normal, likelihood) has a log density of -inf in row 2 of the
        data. The data of this batch lie in [0, 1e+30].
    """
    parts = [f"the loss became {value} at step {step}."]
    if step:
        parts.append(
            "Lower learning_rate, set clip_norm (100 is a mild value), or look for a scale that collapses to zero."
        )
    broken = _broken(programs)
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        parts.append(f"Parameter {broken[0]!r}{more} is not finite.")
    found = _site(programs, batch, index)
    if found is not None:
        parts.append(found)
    low, high = _range(batch)
    large = max(abs(low), abs(high)) > _UNSCALED
    if step == 0 and large:
        parts.append(
            f"Nothing has been learned yet, and the data are unscaled: they lie in [{low:.4g}, {high:.4g}]. "
            "Standardise them, (x - x.mean(0)) / x.std(0), or divide images by 255."
        )
    elif step == 0:
        parts.append(
            "Nothing has been learned yet: it is how the pair starts. Look at initial scales and weights, or set "
            f"clip_norm. The data of this batch lie in [{low:.4g}, {high:.4g}]."
        )
    elif large:
        parts.append(f"The data of this batch lie in [{low:.4g}, {high:.4g}].")
    return " ".join(parts)


def _broken(programs: Sequence[Program]) -> list[str]:
    """Names of parameters that are not finite, in the order of the programs: the model's, the guide's, the store's."""
    named: dict[int, tuple[str, Tensor]] = {}
    for owner in modules_of(*programs):
        for name, parameter in owner.named_parameters():
            named.setdefault(id(parameter), (name, parameter))
    store: Any = pyro.get_param_store()
    for name, parameter in store._params.items():
        named.setdefault(id(parameter), (name, parameter))
    return [name for name, parameter in named.values() if not bool(torch.isfinite(parameter).all())]


def _site(programs: Sequence[Program], batch: tuple[Any, ...], index: Tensor | None) -> str | None:
    for path, leaf in leaves(batch):
        floating = isinstance(leaf, Tensor) and leaf.dim() and leaf.is_floating_point()
        if floating and not bool(torch.isfinite(leaf).all()):
            named = f" (argument {path[0]})" if path and path[0] else ""
            return f"The data{named} hold NaN or infinite values in {_rows(~torch.isfinite(leaf), rows(batch), index)}."
    for _ in range(_TRIES):
        torch.randint(2, ())  # another draw
        shown = rehearse(programs, batch)
        with torch.no_grad():
            found = _first(shown, rows(batch), index)
        if found is not None:
            return found
    return None


def _first(shown: Rehearsal, size: int, index: Tensor | None) -> str | None:
    if shown.error is not None:
        return f"The pair no longer runs on this batch: {' '.join(str(shown.error).split())[:200]}"
    drawn = [(site, "guide", "q") for site in shown.latents.values()]
    scored = sorted(shown.sites.values(), key=lambda site: site["is_observed"])
    of_model = [(site, "model", "likelihood" if site["is_observed"] else "prior") for site in scored]
    for site, program, role in (*drawn, *of_model):
        fn = unwrapped(site["fn"])
        what = f"Site {site['name']!r} of the {program} ({kind(fn)}, {role})"
        for name in getattr(fn, "arg_constraints", {}):
            parameter = fn.__dict__.get(name)
            if isinstance(parameter, Tensor) and not bool(torch.isfinite(parameter).all()):
                where = _rows(~torch.isfinite(parameter), size, index)
                return f"{what} has a {name} that is not finite in {where}."
        with pyro.validation_enabled(False):
            try:
                value = site["fn"].log_prob(site["value"])
            except Exception:  # noqa: BLE001 - a site that cannot say its density is not what this looks for
                continue
        if isinstance(site["mask"], Tensor):
            value = torch.where(site["mask"], value, torch.zeros_like(value))
        bad = ~torch.isfinite(value)
        if bool(bad.any()):
            worst = float(value[bad].flatten()[0])
            scale = fn.__dict__.get("scale")
            low = f" Its smallest scale is {float(scale.min()):.3g}." if isinstance(scale, Tensor) else ""
            return f"{what} has a log density of {worst} in {_rows(bad, size, index)}.{low if role == 'q' else ''}"
    return None


def _rows(bad: Tensor, size: int, index: Tensor | None) -> str:
    axis = next((d for d in range(bad.dim()) if bad.shape[d] == size), None)
    if axis is None:
        return "all rows"
    places = bad.movedim(axis, 0).reshape(size, -1).any(1).nonzero().flatten()
    if len(places) == size and size > _NAMED:
        return f"all {size} rows of the batch"
    numbers = (places if index is None else index.to(places.device)[places]).tolist()
    more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    listed = ", ".join(map(str, numbers[:_NAMED]))
    return f"row{'s' * (len(numbers) > 1)} {listed}{more} of the {'batch' if index is None else 'data'}"


def _range(batch: tuple[Any, ...] | Mapping[str, Any]) -> tuple[float, float]:
    """The smallest and the largest finite number of a batch."""
    lows, highs = [math.inf], [-math.inf]
    for _, leaf in leaves(batch):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            finite = leaf[torch.isfinite(leaf)]
            if finite.numel():
                lows.append(float(finite.min()))
                highs.append(float(finite.max()))
    return (min(lows), max(highs)) if len(lows) > 1 else (0.0, 0.0)
