"""What distributions refuse, in words: which site, which rows, and why, instead of a dump of all numbers.

Where torch refuses with the whole tensor, the pair is run once more without validation, and the first site that is
wrong is named.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.randomness import forked
from pyro_vae.sites import kind, sample_sites

_RAW = ("Expected parameter", "Expected value argument", "Error while computing log_prob")
_NAMED = 5


@contextlib.contextmanager
def in_words(programs: Sequence[Callable[..., Any]], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Run programs (the guide and the model, or one of them, in the order in which they run, on these arguments), and
    say of a distribution's refusal, a ValueError, which site and rows it is about.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(0.0, x.sqrt()), obs=x)
        >>> x = torch.tensor([1.0, -1.0])
        >>> with in_words([model], [x], {}):
        ...     model(x)
        Traceback (most recent call last):
        ...
        ValueError: site 'x' (Normal) has scale = nan in row 1 of the batch, wanted positive numbers. Scale or drop ...
    """
    try:
        yield
    except ValueError as error:
        reason = reworded(error, programs, args, kwargs)
        if reason is None:
            raise
        raise reason from error


def reworded(
    error: ValueError, programs: Sequence[Callable[..., Any]], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> ValueError | None:
    """What to raise in place of a distribution's refusal, or of one that Pyro added its trace to; None for any other
    error."""
    if not str(error).startswith(_RAW):
        return _without_trace(error)
    plain = f"a distribution of the pair refuses what it got: {' '.join(str(error).split())[:200]}"
    return ValueError(wrong_site(programs, args, kwargs) or plain)


def _without_trace(error: ValueError) -> ValueError | None:
    """A refusal without the shapes of all sites so far; where the plate is wrong they are what one needs, and stay."""
    said = without_trace(error)
    if said == str(error):
        return None
    if said.startswith("Shape mismatch inside plate"):
        shapes = str(error)[len(said) :]
        return ValueError(
            f"{said}. Did you forget .to_event(1)? All dimensions of a datum are to be its event.{shapes}"
        )
    return ValueError(said)


def without_trace(error: Exception) -> str:
    """What an error says, without the shapes of all sites so far that Pyro adds to it."""
    return re.split(r"\n *Trace Shapes:", str(error), maxsplit=1)[0]


def wrong_site(programs: Sequence[Callable[..., Any]], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """The first site whose parameters, value or density are wrong, and its rows; None if there is none."""
    size = next((len(x) for x in args if isinstance(x, Tensor) and x.dim()), 0)
    earlier = None
    try:
        with forked(), torch.no_grad(), pyro.validation_enabled(False), poutine.block():
            for program in programs:
                run = program if earlier is None else poutine.replay(program, trace=earlier)
                earlier = poutine.trace(run).get_trace(*args, **kwargs)
                for site in sample_sites(earlier):
                    found = _wrong(site, size)
                    if found is not None:
                        return found
    except Exception:  # noqa: BLE001 - what was raised first is said then
        return None
    return None


def _wrong(site: Any, size: int) -> str | None:
    fn, value = site["fn"], site["value"]
    inner = fn
    while hasattr(inner, "base_dist") and not getattr(inner, "transforms", None):
        inner = inner.base_dist
    what = f"site {site['name']!r} ({kind(inner)})"
    remedy = "Scale or drop what is far from all other data, or bound what the network says."
    for name, constraint in getattr(inner, "arg_constraints", {}).items():
        parameter = inner.__dict__.get(name)
        if isinstance(parameter, Tensor) and parameter.is_floating_point() and not constraint.is_discrete:
            bad = ~(constraint.check(parameter).reshape(-1).all() & torch.isfinite(parameter).all())
            if bool(bad):
                held = torch.isfinite(parameter)
                if bool(held.all()) and constraint.event_dim == 0:
                    held = constraint.check(parameter)
                worst = float(parameter[~held].flatten()[0]) if not bool(held.all()) else None
                shown = name if worst is None else f"{name} = {worst:.4g}"
                if worst is not None and worst <= 0 and constraint is torch.distributions.constraints.positive:
                    remedy = f"Have the network say log {name}, and take exp() of it, or softplus()."
                return f"{what} has {shown} in {rows_in(~held, size)}, wanted {_words(constraint)}. {remedy}"
    if isinstance(value, Tensor) and site["is_observed"]:
        try:
            ok = fn.support.check(value)
        except (NotImplementedError, RuntimeError, AttributeError):
            ok = torch.ones((), dtype=torch.bool)
        if isinstance(site["mask"], Tensor):
            ok = ok | ~site["mask"]
        if not bool(ok.all()):
            return (
                f"{what} observes what lies outside its support in {rows_in(~ok, size)}, wanted "
                f"{_words(getattr(inner, 'support', fn.support))}. Rescale or drop them, or take another likelihood."
            )
    density = fn.log_prob(value)
    if isinstance(site["mask"], Tensor):
        density = torch.where(site["mask"], density, torch.zeros_like(density))
    if bool(density.isnan().any()) or site["is_observed"] and bool(torch.isinf(density).any()):
        bad = ~torch.isfinite(density)
        return f"{what} has a log density of {float(density[bad].flatten()[0])} in {rows_in(bad, size)}. {remedy}"
    return None


def rows_in(bad: Tensor, size: int, index: Tensor | None = None, data_first: bool = False) -> str:
    """Where in a batch of so many data something is wrong, in words; by the rows of the data, where they are known."""
    dims = range(bad.dim()) if data_first else reversed(range(bad.dim()))
    axis = next((d for d in dims if size and bad.shape[d] == size), None)
    if axis is None:
        return "all rows"
    places = bad.movedim(axis, 0).reshape(size, -1).any(1).nonzero().flatten()
    if len(places) == size and size > _NAMED:
        return f"all {size} rows of the batch"
    numbers = (places if index is None else index.to(places.device)[places]).tolist()
    more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    listed = ", ".join(map(str, numbers[:_NAMED]))
    return f"row{'s' * (len(numbers) > 1)} {listed}{more} of the {'batch' if index is None else 'data'}"


def _words(constraint: Any) -> str:
    if constraint is torch.distributions.constraints.positive:
        return "positive numbers"
    if constraint is torch.distributions.constraints.real:
        return "finite numbers"
    return str(constraint)
