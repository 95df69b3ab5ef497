"""Whose tensors are trained: a pair's own, whatever its parameters are called.

Pyro keys every parameter by name in one global store, and a name that is already
there wins over the module that asks for it. A second model with the same attribute
names, or a model and a guide that both call their network ``net``, then share one
set of tensors, and the others never move. `own_parameters` is the one place that
deals with this: while it is active, a ``pyro.param`` or ``pyro.module`` statement
that offers a module's own parameter gets exactly that parameter back.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.reach import modules_of


class _OwnParameters(Messenger):
    """Answers param statements with the parameter offered, and keeps names apart."""

    def __init__(self) -> None:
        super().__init__()
        self._owner: dict[str, Tensor] = {}

    def _pyro_param(self, msg: Any) -> None:
        offered = msg["args"][1] if len(msg["args"]) > 1 else None
        constraint = msg["kwargs"].get("constraint", constraints.real)
        if not isinstance(offered, nn.Parameter) or constraint is not constraints.real:
            return
        # pyro.infer.SVI finds what to optimise through this attribute.
        offered.unconstrained = weakref.ref(offered)  # type: ignore[attr-defined]
        msg["value"] = offered
        name = msg["name"]
        while self._owner.setdefault(name, offered) is not offered:
            name += "'"
        # A trace holds one parameter a name: without this, SVI would see only the last.
        msg["name"] = name


def _constrained_parameters(program: Any) -> dict[str, Tensor]:
    """Unconstrained tensors of a program's PyroParams, by the name Pyro gives them."""
    found: dict[str, Tensor] = {}
    owner = program if isinstance(program, nn.Module) else getattr(program, "__self__", None)
    if isinstance(owner, PyroModule):
        for path, module in owner.named_modules():
            for attribute in getattr(module, "_pyro_params", {}):
                root = owner._pyro_name
                name = ".".join(part for part in (root, path, attribute) if part)
                found[name] = getattr(module, attribute + "_unconstrained")
    return found


@contextmanager
def own_parameters(*programs: Any) -> Iterator[None]:
    """Run programs on their own parameters, untouched by what the param store holds.

    Parameters of modules are used in place and leave no trace in the store. Those
    that plain functions declare with ``pyro.param`` live in the store, as always.

    Args:
        programs: The model, the guide, or both.
    Raises:
        ValueError: Two of the programs own different constrained parameters
            (``PyroParam``) under one name, which Pyro cannot tell apart.
    Example:
        >>> net = nn.Linear(1, 1)
        >>> with own_parameters():
        ...     pyro.module("net", net).weight is pyro.param("net", net.weight)
        True
        >>> "net$$$weight" in pyro.get_param_store()
        False
    """
    mine: dict[str, Tensor] = {}
    for program in programs:
        for name, tensor in _constrained_parameters(program).items():
            if mine.setdefault(name, tensor) is not tensor:
                raise ValueError(
                    f"two programs own a constrained parameter named {name!r}, and Pyro would "
                    "train one tensor for both. Give each root module a name of its own: "
                    "PyroModule.__init__(self, name='guide')."
                )
    store = pyro.get_param_store()
    hidden = {name: (store._params[name], store._constraints[name]) for name in mine if name in store}
    for name in hidden:
        del store[name]
    try:
        with _OwnParameters():
            yield
    finally:
        for name in mine:
            if name in store:
                del store[name]
        for name, (tensor, constraint) in hidden.items():
            store.set_state({"params": {name: tensor}, "constraints": {name: constraint}})


def trainable(program: Any) -> list[nn.Parameter]:
    """Parameters with gradients of the modules that a program owns, each once; [] where it owns none."""
    found = {id(p): p for module in modules_of(program) for p in module.parameters() if p.requires_grad}
    return list(found.values())


def device_of(*programs: Any) -> torch.device | None:
    """The device of the first parameter or buffer found, frozen or not; None where no program owns one."""
    for module in modules_of(*programs):
        for tensor in (*module.parameters(), *module.buffers()):
            return tensor.device
    return None
