"""What a fit does not train though it might be meant to, and why: nothing at all, or networks unknown to Pyro."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, TypeAlias

from torch import Tensor, nn

from pyro_vae.inference.batches import Batches

Gradients: TypeAlias = list[tuple[nn.Module, Tensor, Any]]


def untrained(parameters: Iterable[Tensor]) -> str:
    """Why no parameter had a gradient."""
    known = {id(p): p for p in parameters}.values()
    if known and all(isinstance(p, nn.Parameter) and not p.requires_grad for p in known):
        return (
            f"all {len(known)} parameters of model and guide have requires_grad=False, so there is nothing to train. "
            "Call requires_grad_(True) on what shall learn."
        )
    return (
        "no parameter of model or guide had a gradient, so there is nothing to train. Register networks with "
        'pyro.module("decoder", net) inside the programs, or write the programs as PyroModules.'
    )


def gradients(batches: Batches) -> Gradients:
    """Parameters of modules that ran in the programs, each with its gradient as it is, told by identity and version."""
    modules = [] if batches.shown is None else batches.shown.modules
    found = [(module, p) for module in modules for p in module.parameters(recurse=False) if p.requires_grad]
    return [(module, p, _seen(p)) for module, p in found]


def say_strays(before: Gradients, trained: Iterable[Tensor]) -> None:
    """Say which modules had a gradient in a step that trains others only: Pyro was not told of them."""
    known = {id(p) for p in trained}
    strays = [(module, p) for module, p, then in before if _seen(p) != then and id(p) not in known]
    if strays:
        module, parameter = strays[0]
        more = f", and {len(strays) - 1} more tensors" * (len(strays) > 1)
        warnings.warn(
            f"a {type(module).__name__} with parameters of shape {tuple(parameter.shape)}{more} had a gradient and "
            'is not trained, since neither program registers it. Add pyro.module("decoder", net) to the program '
            "that runs it; or net.requires_grad_(False), if it is to stay as it is.",
            stacklevel=3,
        )


def _seen(parameter: Tensor) -> tuple[int, int] | None:
    return None if parameter.grad is None else (id(parameter.grad), parameter.grad._version)
