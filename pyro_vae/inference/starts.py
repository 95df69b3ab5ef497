"""What a pair wants to see of all the data before its first step.

A module anywhere in a pair may have a method ``before_fit(batches)``. `fit` calls it once with the data as an iterable
of batches (tuples of the programs' arguments, large, in their order), before anything else is run: to refuse them, as
labels that no class has, or to start at their statistics. So what can be known of the data up front costs nothing in
a step, and no step need read values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from pyro_vae.inference.batches import Batches

_ROWS = 4096


class _Pass:
    """The data once more from the start, at each iteration; the random state stays as it was."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        with torch.random.fork_rng():
            yield from Batches(self.data, _ROWS, shuffle=False)


def before_fit(modules: Sequence[nn.Module], data: Any) -> None:
    """Let the parts of a pair see the data.

    Args:
        modules: The pair's, from outside.
        data: As for `fit`.
    Raises:
        ValueError: What a part says against the data.
    """
    parts = {id(part): part for module in modules for part in module.modules()}
    for part in parts.values():
        look = getattr(part, "before_fit", None)
        if callable(look):
            look(_Pass(data))
