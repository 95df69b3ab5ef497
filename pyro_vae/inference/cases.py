"""A pair, a batch and a loss, with what one run of the programs shows: what the rules of a fit look at."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_vae.auxiliary import points_among
from pyro_vae.inference.estimators import needs_cut
from pyro_vae.inference.objectives import Objective
from pyro_vae.parameters import own_parameters
from pyro_vae.protocols import rescoring
from pyro_vae.traces import Program, sites


@dataclass(frozen=True)
class Case:
    """A pair, one batch, a loss, and what one run of each program showed.

    Its sample sites by name, the modules that it ran, and the guide's sites that are points without a density.
    """

    model: Program
    guide: Program
    batch: tuple[Any, ...]
    loss: Any
    model_sites: Mapping[str, Any]
    guide_sites: Mapping[str, Any]
    model_modules: tuple[nn.Module, ...]
    guide_modules: tuple[nn.Module, ...]
    points: tuple[str, ...] = ()

    @property
    def point(self) -> str | None:
        """The first guide site that is a point without a density."""
        return next(iter(self.points), None)

    @property
    def latents(self) -> list[str]:
        """Guide sites that are drawn."""
        return [name for name, site in self.guide_sites.items() if not site["is_observed"]]

    @property
    def together(self) -> int:
        """Samples that networks see in one pass."""
        if isinstance(self.loss, Objective):
            return self.loss.num_samples
        return getattr(self.loss, "num_particles", 1) if getattr(self.loss, "vectorize_particles", False) else 1

    @property
    def rescoring(self) -> str:
        """What it takes the guide to score a sample that it did not draw; "" where the loss does not ask for that."""
        loss = self.loss
        asks = isinstance(loss, Objective) and needs_cut(loss.bound, loss.estimator)
        return rescoring(self.guide, *self.guide_modules) if asks else ""


def examine(model: Program, guide: Program, batch: tuple[Any, ...], loss: Any) -> Case:
    """Run both programs once, the model at the guide's draws, without touching the random state."""
    seen: dict[str, list[nn.Module]] = {"guide": [], "model": []}
    found: dict[str, dict[str, Any]] = {}
    for name, ran in seen.items():
        # Dynamo would trace a hook into a network that is compiled already, and cannot trace this one.
        hook = register_module_forward_pre_hook(torch.compiler.disable(lambda module, _, ran=ran: ran.append(module)))
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Using .torch.compile")  # of such hooks
                found[name] = sites(guide, *batch) if name == "guide" else _at_draws(model, found["guide"], batch)
        finally:
            hook.remove()
    with own_parameters(guide):
        points = points_among(guide, found["guide"].values(), batch, {})
    modules = tuple(seen["model"]), tuple(seen["guide"])
    return Case(model, guide, batch, loss, found["model"], found["guide"], *modules, points)


def _at_draws(model: Program, drawn: Mapping[str, Any], batch: tuple[Any, ...]) -> dict[str, Any]:
    """The model's sites where it runs as in a step, at the guide's draws; where it does not run at them, those of its
    own draws, so that a rule can say what is wrong with the guide's."""
    given = Trace()
    for name, site in drawn.items():
        if not site["is_observed"]:
            given.add_node(name, **site)
    try:
        return sites(poutine.replay(model, trace=given), *batch)
    except Exception as error:  # noqa: BLE001 - whatever the programs raise
        try:
            return sites(model, *batch)
        except Exception:  # noqa: BLE001 - it fails anyhow, and in a step in the first way
            raise error from None
