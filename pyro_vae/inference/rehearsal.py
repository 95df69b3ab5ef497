"""One run of a pair that leaves no trace: what it observes, what it is made of, or why it fails.

`diagnosis` says where a loss that is not finite came from: the pair is run again on the batch, and the first of its
densities that is not finite is named with its rows, in the order in which numbers reach it: the data, q, the draws, the
prior, the likelihood. A parameter that is not finite is older than all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_vae.evaluation import evaluating, undisturbed
from pyro_vae.inference.trees import leaves, rows
from pyro_vae.reach import modules_of
from pyro_vae.refusals import rows_in
from pyro_vae.sites import kind, sample_sites, unwrapped
from pyro_vae.traces import Program

_TRIES = 5  # a draw may be the reason, and another draw is not
_UNSCALED = 20.0  # a size of data at which networks with unit weights begin to overflow


# False to all who ask, and not the False that a distribution was given: after the run one can tell which it was.
_UNSAID: Any = 0


def lenient(fn: Any) -> bool:
    """Whether the fn of a site that a rehearsal made was told to score what lies outside of its support.

    Example:
        >>> import pyro.distributions as dist
        >>> model = lambda x: pyro.sample("x", dist.Bernoulli(0.5, validate_args=False), obs=x)
        >>> lenient(rehearse([model], (torch.ones(()),)).sites["x"]["fn"])
        True
    """
    return fn._validate_args is False


@dataclass
class Rehearsal:
    """What one run of a pair showed.

    `sites` are the first program's sample sites by name, empty where it failed, and `latents` those of the others;
    `parameters` those that the programs asked for or own, and of the modules that ran; `error` is what a program
    raised.
    """

    sites: Mapping[str, Any] = field(default_factory=dict)
    latents: dict[str, Any] = field(default_factory=dict)
    parameters: list[Tensor] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    error: Exception | None = None

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of the first floating parameter."""
        return next((p.dtype for p in self.parameters if p.is_floating_point()), None)

    def finite(self) -> bool:
        """Whether all draws and all log densities are finite numbers."""
        if self.error is not None:
            return False
        for site in (*self.sites.values(), *self.latents.values()):
            if isinstance(site["value"], Tensor) and not site["is_observed"] and not _finite(site["value"]):
                return False
            if not _finite(_log_prob(site)):
                return False
        return True


def rehearse(programs: Sequence[Program], batch: tuple[Any, ...]) -> Rehearsal:
    """Run a pair once on a batch, the first program at the draws of the second; what it showed, whether it succeeded or
    not.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(pyro.param("rehearsed", torch.zeros(())), 1.0), obs=x)
        >>> shown = rehearse([model], (torch.zeros(3),))
        >>> list(shown.sites), shown.dtype, "rehearsed" in pyro.get_param_store()
        (['x'], torch.float32, False)
    """
    shown = Rehearsal()
    for owner in modules_of(*programs):
        shown.parameters += [p for p in owner.parameters() if not isinstance(p, nn.UninitializedParameter)]
    asked: Any = poutine.trace(param_only=True)
    ran: dict[int, nn.Module] = {}
    hook = register_module_forward_pre_hook(lambda module, _: ran.update({id(module): module}))
    try:
        with undisturbed(), evaluating(*programs), pyro.validation_enabled(False), asked:
            Distribution.set_default_validate_args(_UNSAID)
            drawn: Trace | None = None
            for guide in programs[1:]:
                trace = poutine.trace(guide).get_trace(*batch)
                drawn = trace if drawn is None else drawn
                shown.latents |= {site["name"]: site for site in sample_sites(trace)}
            model = programs[0] if drawn is None else poutine.replay(programs[0], trace=drawn)
            trace = poutine.trace(model).get_trace(*batch)
            shown.sites = {site["name"]: site for site in sample_sites(trace)}
    except Exception as error:  # noqa: BLE001 - the programs' own, which the caller may raise
        shown.error = error
    finally:
        hook.remove()
    shown.modules = list(ran.values())
    values = [site["value"] for site in asked.trace.nodes.values() if site["type"] == "param"]
    shown.parameters += [value for value in values if isinstance(value, Tensor)]
    shown.parameters += [p for module in shown.modules for p in module.parameters(recurse=False)]
    return shown


def _log_prob(site: Any) -> Tensor:
    try:
        with torch.no_grad(), pyro.validation_enabled(False):
            value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    except Exception:  # noqa: BLE001 - a site that cannot say its density says nothing against the data
        return torch.zeros(())
    mask = site["mask"]
    return torch.where(mask, value, torch.zeros(())) if isinstance(mask, Tensor) else value


def _finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())


def diagnosis(
    value: float, step: int, programs: Sequence[Program], batch: tuple[Any, ...], index: Tensor | None = None
) -> str:
    """What to say of a loss that is not finite: the step, from 0, then as far as they are found the parameter, the site
    with its rows, of the data where it is known which ones the batch holds (`index`), and the data's range.

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
    own = [pair for owner in modules_of(*programs) for pair in owner.named_parameters()]
    store: Any = pyro.get_param_store()
    for name, parameter in (*own, *store._params.items()):
        named.setdefault(id(parameter), (name, parameter))
    return [name for name, parameter in named.values() if not bool(torch.isfinite(parameter).all())]


def _site(programs: Sequence[Program], batch: tuple[Any, ...], index: Tensor | None) -> str | None:
    where = functools.partial(rows_in, size=rows(batch), index=index, data_first=True)
    for path, leaf in leaves(batch):
        floating = isinstance(leaf, Tensor) and leaf.dim() and leaf.is_floating_point()
        if floating and not bool(torch.isfinite(leaf).all()):
            named = f" (argument {path[0]})" if path and path[0] else ""
            return f"The data{named} hold NaN or infinite values in {where(~torch.isfinite(leaf))}."
    for _ in range(_TRIES):
        torch.randint(2, ())  # another draw
        shown = rehearse(programs, batch)
        with torch.no_grad():
            found = _first(shown, where)
        if found is not None:
            return found
    return None


def _first(shown: Rehearsal, where: Callable[[Tensor], str]) -> str | None:
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
                return f"{what} has a {name} that is not finite in {where(~torch.isfinite(parameter))}."
        value = _log_prob(site)
        bad = ~torch.isfinite(value)
        if bool(bad.any()):
            worst = float(value[bad].flatten()[0])
            scale = fn.__dict__.get("scale")
            low = f" Its smallest scale is {float(scale.min()):.3g}." if isinstance(scale, Tensor) else ""
            return f"{what} has a log density of {worst} in {where(bad)}.{low if role == 'q' else ''}"
    return None


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
