"""The state of an optimiser by the names of its parameters, in this process or in another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pyro_vae.parameters import names_of


def path_of(constructor: Any) -> str:
    """Where an algorithm is imported from."""
    return f"{getattr(constructor, '__module__', '')}.{getattr(constructor, '__qualname__', repr(constructor))}"


def copied(value: Any) -> Any:
    """A value that no later step changes."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def matched(parameters: Sequence[Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[Tensor, str]:
    """Which saved name is whose: the same one, or the same but for the number of a program."""
    found = {}
    for p in parameters:
        kin = {name for own in names_of(p) for name in shapes if _numberless(name) == _numberless(own)}
        same = [name for name in names_of(p) if name in shapes] or (sorted(kin) if len(kin) == 1 else [])
        if not same:
            continue
        if list(shapes[same[0]]) != list(p.shape):
            raise ValueError(
                f"the state of the optimiser is of another pair: its {same[0]!r} has shape {tuple(shapes[same[0]])}, "
                f"this one's {tuple(p.shape)}."
            )
        found[p] = same[0]
    return found


def _numberless(name: str) -> str:
    root, dot, rest = name.partition(".")
    return root.rstrip("0123456789") + dot + rest
