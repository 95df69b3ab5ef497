"""One run of a pair that leaves no trace: what it observes, what it is made of, or why it fails.

Modules run in evaluation mode, whoever owns them; random states, the parameter store and the mode of every module are
put back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_vae.evaluation import evaluating, undisturbed
from pyro_vae.reach import modules_of
from pyro_vae.sites import sample_sites
from pyro_vae.traces import Program


class _Parameters(Messenger):
    """Notes the parameters that programs ask for."""

    def __init__(self, found: list[Tensor]) -> None:
        super().__init__()
        self.found = found

    def _pyro_post_param(self, msg: Any) -> None:
        if isinstance(msg["value"], Tensor):
            self.found.append(msg["value"])


# False to all who ask, and not the False that a distribution was given: after the run one can tell which it was.
_UNSAID: Any = 0


def lenient(fn: Any) -> bool:
    """Whether a distribution that a rehearsal made was told to score what lies outside of its support.

    Args:
        fn: The fn of a site.
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

    Attributes:
        sites: The first program's sample sites by name; empty where it failed.
        latents: The other programs' sample sites by name.
        parameters: Parameters that the programs asked for or own, and those of the modules that ran.
        modules: Modules that ran.
        error: What a program raised, None if nothing.
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
    asked: list[Tensor] = []
    ran: dict[int, nn.Module] = {}
    hook = register_module_forward_pre_hook(lambda module, _: ran.update({id(module): module}))
    try:
        with undisturbed(), evaluating(*programs), pyro.validation_enabled(False), _Parameters(asked):
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
    shown.parameters += asked
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
