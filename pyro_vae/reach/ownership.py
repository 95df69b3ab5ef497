"""The modules that programs own, wherever they hold them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from pyro_vae.reach.proof import Reach


def modules_of(*programs: Any) -> list[nn.Module]:
    """The modules that programs own, wherever they hold them: outermost ones, each once. None among programs is passed
    over.

    A program is a module, a method of one, or a function with modules in its closure, its globals, its arguments or the
    objects that it reads.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> modules_of(lambda x: net(x), None) == [net]
        True
    """
    return Reach(*(p for p in programs if p is not None), owned=True).modules


def parts_of(*programs: Any) -> list[nn.Module]:
    """The modules that programs own and all modules inside them, each once.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1))
        >>> parts_of(net) == [net, net[0]]
        True
    """
    return parts_in(modules_of(*programs))


def parts_in(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Modules and all that lie inside them, each once."""
    return list({id(part): part for module in modules for part in module.modules()}.values())
