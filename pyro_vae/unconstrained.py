"""The parameters of a distribution as free tensors: what a guide is optimised in without its encoder.

A posterior hands out its own (`local_of`); of any other distribution `free_parameters` lifts the constraints. Where a
site depends on the draw of an earlier one, the guide runs, and something is added to what it gives: to what the heads
of its posteriors return (`Heads`), or to the free parameters at its sites (`Moved`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from pyro.distributions import MaskedDistribution, TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, transform_to

from pyro_vae.protocols import Build, Free, Headed, Local, Unamortized, has_head
from pyro_vae.reach import modules_of, parts_in


def free_parameters(distribution: TorchDistribution) -> tuple[Free, Build]:
    """The parameters of a distribution without constraints, by name, and a function from such parameters to it.

    It is a ValueError where its class and the parameters named in its ``arg_constraints``, under ``Independent`` or a
    mask, do not determine the distribution.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> free, build = free_parameters(dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1))
        >>> free["scale"], build(free).event_shape
        (tensor([0., 0., 0.]), torch.Size([3]))
    """
    if isinstance(distribution, Independent):
        free, inner = free_parameters(distribution.base_dist)
        return free, lambda given: inner(given).to_event(distribution.reinterpreted_batch_ndims)
    if isinstance(distribution, MaskedDistribution):
        free, inner = free_parameters(distribution.base_dist)
        return free, lambda given: inner(given).mask(distribution._mask)
    family = type(distribution)
    allowed = getattr(distribution, "arg_constraints", {})
    names = ("loc", "scale_tril") if isinstance(distribution, MultivariateNormal) else tuple(allowed)
    takes = set(inspect.signature(family.__init__).parameters) - {"self"}
    if not names or not takes - {"validate_args"} <= set(allowed):
        raise ValueError(f"{family.__name__} is not made of parameters in its arg_constraints alone")
    options: dict[str, Any] = {"validate_args": False} if "validate_args" in takes else {}
    try:
        ways = {name: transform_to(allowed[name]) for name in names}
        free = {name: ways[name].inv(getattr(distribution, name)) for name in names}
    except (NotImplementedError, AttributeError) as error:
        raise ValueError(f"{family.__name__} has parameters whose constraints cannot be lifted ({error})") from error
    return free, lambda given: family(**{name: ways[name](given[name]) for name in names}, **options)


class Moved(Messenger):
    """Adds changes, by site and then by the parameter's name, to the free parameters of a program's distributions."""

    def __init__(self, changes: Mapping[str, Free]) -> None:
        super().__init__()
        self.changes = changes

    def _pyro_sample(self, msg: Any) -> None:
        change = self.changes.get(msg["name"])
        if change is not None:
            free, build = free_parameters(msg["fn"])
            msg["fn"] = build({key: value + change[key] for key, value in free.items()})


def local_of(posterior: Headed, parameters: Tensor) -> Local:
    """The family of a posterior that `has_head` at free parameters for each datum, which start at these, (B, P).

    Of one without a `local` what the head returns is free.
    """
    if isinstance(posterior, Unamortized):
        return posterior.local(parameters)
    return Local({"parameters": parameters}, lambda free: posterior.family(free["parameters"]))


def heads_of(guide: Any) -> dict[str, Headed]:
    """The posteriors among a guide's modules that have a head, numbered."""
    parts = parts_in([guide] if isinstance(guide, nn.Module) else modules_of(guide))
    return {str(number): part for number, part in enumerate(parts) if has_head(part)}


class Heads:
    """What the heads of posteriors (of `heads_of`) return, recorded while it is entered, and changed where changes are
    given.

    `runs` counts how many times a head has run; `returned` is what each returned last, with gradients, before the
    change of its name was added.
    """

    def __init__(self, posteriors: Mapping[str, Headed], changes: Mapping[str, Tensor] | None = None) -> None:
        self.posteriors, self.changes = posteriors, changes
        self.runs = 0
        self.returned: Free = {}

    def cover(self, sites: Any) -> bool:
        """Whether as many heads ran as there are sites, once each."""
        return self.runs == len(self.returned) == len(sites)

    def __enter__(self) -> Heads:
        self._hooks = [
            posterior.head.register_forward_hook(functools.partial(self._hook, name))
            for name, posterior in self.posteriors.items()
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str, _: nn.Module, __: Any, out: Tensor) -> Tensor | None:
        self.runs += 1
        self.returned[name] = out
        return None if self.changes is None else out + self.changes[name]
